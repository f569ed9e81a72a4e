//! What the holder of the worker mutex owns: items, stable pages, unstable candidates, counters.

use std::sync::Arc as StdArc;
use std::time::Instant;

use crate::backing::Backing;
use crate::base::budget::Budget;
use crate::base::page::{PAGE_WORDS, PageBuf, PageRange, PoolPage, pages_to_bytes, range_pages};
use crate::base::stats::{RegionStats, Stats, net_bytes};
use crate::base::sync::{self, Arc};
use crate::base::vmas::{VmaAccount, Vmas};
use crate::index::prehashed::RegionMap;
use crate::index::stable::StablePages;
use crate::index::unstable::Unstable;
use crate::merge::tuning::{BASE_PAGES_MIN, HEAL_VMAS_MIN, HUGE_PAGE_SHARED_PAGES_MIN};
use crate::pages::backoff::{INTERVAL, Intervals, Looks, MAP_AFTER};
use crate::pages::dirty::{PageSet, Watch};
use crate::pages::item::PageState;
use crate::pages::region::{Region, RegionId};
use crate::pages::region_items::Items;

/// A region that the worker has met, with what it knows of its pages.
#[derive(Debug)]
pub(crate) struct Attached<B> {
    pub(crate) region: Arc<Region<B>>,
    pub(crate) items: Items,
    /// For a region whose dirty pages somebody can tell.
    pub(crate) watch: Option<Watch>,
    /// Pages that a pass has to visit here, as the last one knew when it began.
    pub(crate) due_pages: u32,
    /// For a watched region: when its dirty pages are asked for.
    pub(crate) looks: Looks,
    /// Where the next look for a block begins that is to be built anew.
    pub(crate) heal_from: u32,
}

impl<B> Attached<B> {
    /// A calm page is to be mapped elsewhere, but not yet.
    pub(crate) fn will_map(&mut self, page: u32, checksum: u32) {
        self.items.set_state(page, PageState::Unshared { checksum });
        let watch = self.watch.iter_mut();
        watch.for_each(|watch| watch.to_map.insert(page));
    }

    /// Whether a page of the region is calm, found no equal, and was of this checksum when it was
    /// last read.
    pub(crate) fn is_alone(&self, page: u32, checksum: u32) -> bool {
        page < self.items.pages() && self.items.state(page) == PageState::Unshared { checksum }
    }
}

/// The state of scanning.
#[derive(Debug)]
pub(crate) struct Scanner<B: Backing> {
    pub(crate) pool: B::Pool,
    /// What may be allocated.
    pub(crate) budget: StdArc<Budget>,
    pub(crate) stable: StablePages,
    pub(crate) unstable: Unstable,
    pub(crate) attached: RegionMap<Attached<B>>,
    pub(crate) vmas: Vmas,
    pub(crate) pages_scanned: u64,
    pub(crate) pages_skipped: u64,
    pub(crate) pages_discarded: u64,
    pub(crate) intervals: Intervals,
    /// Somebody waits for full scans: pages are not put off.
    pub(crate) hurried: bool,
    /// Memory is short: each pass looks at what was written to.
    pub(crate) is_short: bool,
    pub(crate) full_scans: u64,
    /// Shareable pages of a huge page from which on it is split.
    pub(crate) huge_page_shared_pages_min: u32,
    /// Mappings in a block from which on it may be healed.
    pub(crate) heal_vmas_min: u32,
    /// Pages of a block that must equal their places before it is based.
    pub(crate) base_pages_min: u32,
    /// Intervals that a page of a watched region must have been calm for to be mapped elsewhere.
    pub(crate) map_after: u16,
    /// Where the next sweep of the pool begins.
    pub(crate) sweep_from: PoolPage,
    /// Where a page is copied to, to be hashed.
    pub(crate) scratch: Box<PageBuf>,
    /// Pages that changed their state in this pass: nothing of it means that sleeping is right.
    pub(crate) changes: u64,
}

impl<B: Backing> Scanner<B> {
    /// With so many mappings, which it shares with nobody.
    pub(crate) fn new(pool: B::Pool, vma_budget: u32) -> Scanner<B> {
        Scanner {
            pool,
            budget: Budget::new(),
            stable: StablePages::default(),
            unstable: Unstable::default(),
            attached: RegionMap::default(),
            vmas: Vmas::new(vma_budget, VmaAccount::new(u64::from(vma_budget))),
            pages_scanned: 0,
            pages_skipped: 0,
            pages_discarded: 0,
            intervals: Intervals::new(INTERVAL, Instant::now()),
            hurried: false,
            is_short: false,
            full_scans: 0,
            huge_page_shared_pages_min: HUGE_PAGE_SHARED_PAGES_MIN,
            heal_vmas_min: HEAL_VMAS_MIN,
            base_pages_min: BASE_PAGES_MIN,
            map_after: MAP_AFTER,
            sweep_from: PoolPage(0),
            scratch: Box::new([0; PAGE_WORDS]),
            changes: 0,
        }
    }

    /// Begins to follow a region's pages, if the worker has not met it yet.
    pub(crate) fn attach(&mut self, region: &Arc<Region<B>>) {
        let vmas = &mut self.vmas;
        self.attached.entry(region.id()).or_insert_with(|| {
            let items = Items::new(region.backing().pages());
            vmas.change(0, items.vmas());
            let watch = region
                .source()
                .map(|_| Watch::new(region.backing().pages()));
            Attached {
                region: Arc::clone(region),
                items,
                watch,
                due_pages: region.backing().pages(),
                looks: Looks::default(),
                heal_from: 0,
            }
        });
    }

    /// Forgets a region: its items, and its references to stable pages.
    pub(crate) fn detach(&mut self, id: RegionId) {
        let Some(attached) = self.attached.remove(&id) else {
            return;
        };
        for (_, pool_page) in attached.items.stable() {
            self.stable.drop_sharer(pool_page);
        }
        for pool_page in attached.items.all_under() {
            self.stable.layouts.unmap(pool_page);
        }
        let lease = self.vmas.detach(attached.items.vmas());
        // A region is detached once.
        let _ = attached.region.vmas.set(lease);
        self.reclaim();
        self.reclaim_kept(usize::MAX);
    }

    pub(crate) fn region(&self, id: RegionId) -> Option<Arc<Region<B>>> {
        self.attached
            .get(&id)
            .map(|attached| Arc::clone(&attached.region))
    }

    /// The first page from `page` on that a visit could learn something about.
    pub(crate) fn next_to_visit(&self, id: RegionId, page: u32) -> Option<u32> {
        let attached = self.attached.get(&id)?;
        match &attached.watch {
            Some(watch) if attached.looks.is_due || self.hurried => watch.next_from(page),
            Some(_) => None,
            None => Some(page),
        }
    }

    /// The pages of a watched region that are to be looked at in `window`.
    pub(crate) fn take_watched(
        &mut self,
        id: RegionId,
        window: PageRange,
    ) -> Option<Vec<(u32, bool)>> {
        Some(self.attached.get_mut(&id)?.watch.as_mut()?.take(window))
    }

    /// The pages of a watched region that are to be tried once they are calm.
    pub(crate) fn pending(&mut self, id: RegionId) -> Option<&mut PageSet> {
        Some(&mut self.attached.get_mut(&id)?.watch.as_mut()?.pending)
    }

    /// Has a page of a watched region looked at again as a dirty one.
    pub(crate) fn keep_dirty(&mut self, id: RegionId, page: u32) {
        let attached = self.attached(id);
        if let Some(watch) = attached.and_then(|attached| attached.watch.as_mut()) {
            watch.dirty.insert(page);
        }
    }

    pub(crate) fn attached(&mut self, id: RegionId) -> Option<&mut Attached<B>> {
        self.attached.get_mut(&id)
    }

    /// A page was given memory of its own, and is to be looked at as any new one.
    pub(crate) fn note_private(&mut self, id: RegionId, page: u32) {
        self.items(id).set_state(page, PageState::Private);
        let pending = self.pending(id).into_iter();
        pending.for_each(|pending| pending.insert(page));
    }

    /// Pages that a pass has to visit.
    pub(crate) fn due_pages(&self) -> u64 {
        let due_pages = |attached: &Attached<B>| u64::from(attached.due_pages);
        self.attached.values().map(due_pages).sum()
    }

    /// The items of a region that is attached.
    ///
    /// # Panics
    /// If it is not: callers attach a region before they work on it.
    pub(crate) fn items(&mut self, id: RegionId) -> &mut Items {
        &mut self
            .attached
            .get_mut(&id)
            .expect("a region under work is attached")
            .items
    }

    /// Accounts for a guest's write to a page that was shared.
    pub(crate) fn unshared_by_guest(&mut self, id: RegionId, page: u32) {
        if let PageState::Stable(pool_page) = self.items(id).state(page) {
            self.stable.drop_sharer(pool_page);
        }
    }

    /// Ends a pass over all regions.
    pub(crate) fn end_pass(&mut self) {
        let attached = &self.attached;
        self.unstable.end_pass(|id, page, checksum| {
            let attached = attached.get(&id);
            attached.is_some_and(|attached| attached.is_alone(page, checksum))
        });
        self.full_scans += 1;
        self.vmas.end_pass();
        self.intervals.end_pass(Instant::now());
        self.sweep_pool();
    }

    /// Whether there may be `added` more VMAs for the sake of `pages` pages.
    pub(crate) fn takes_vmas(&self, added: i64, pages: u32) -> bool {
        self.vmas.allow(added, pages)
    }

    /// Records that `range` of a region is now one mapping of its own.
    pub(crate) fn remap(&mut self, id: RegionId, range: &PageRange, first: Option<PoolPage>) {
        let items = self.items(id);
        let before = items.vmas();
        let under: Vec<PoolPage> = (range.clone())
            .filter_map(|page| items.pool_page_under(page))
            .collect();
        items.remap(range, first);
        let after = items.vmas();
        self.vmas.change(before, after);
        // Before the others go: a block of places must not go in between.
        if let Some(first) = first {
            let places = (0..range_pages(range)).map(|page| first.plus(page));
            places.for_each(|place| self.stable.layouts.map(place));
        }
        for pool_page in under {
            self.stable.layouts.unmap(pool_page);
        }
    }

    /// Publishes a region's counters where its handle reads them without the worker mutex.
    pub(crate) fn publish_region(&mut self, region: &Region<B>) {
        let items = self.items(region.id());
        let counts = items.counts();
        let merged = i64::from(counts.stable_pages) + i64::from(counts.zero_pages);
        let stats = RegionStats {
            items: u64::from(counts.volatile_pages)
                + u64::from(counts.unshared_pages)
                + u64::from(counts.left_out_pages)
                + u64::from(counts.stable_pages)
                + u64::from(counts.zero_pages),
            pages_merging: u64::from(counts.stable_pages),
            pages_zero: u64::from(counts.zero_pages),
            pages_unshared: u64::from(counts.unshared_pages),
            pages_volatile: u64::from(counts.volatile_pages),
            vmas: u64::from(items.vmas()),
            profit_bytes: net_bytes(
                merged,
                u64::from(items.vmas()).saturating_sub(1),
                items.metadata_bytes(),
            ),
        };
        *sync::lock(&region.stats) = stats;
    }

    /// Counters of the domain, `slots` left for the caller to fill in.
    pub(crate) fn stats(&self) -> Stats {
        let mut stats = Stats {
            pages_shared: self.stable.shared_pages(),
            // Saturating: a batch that panicked may have left founded pages without sharers.
            pages_sharing: (self.stable.sharers()).saturating_sub(self.stable.shared_pages()),
            pages_scanned: self.pages_scanned,
            pages_skipped: self.pages_skipped,
            pages_discarded: self.pages_discarded,
            full_scans: self.full_scans,
            vmas: self.vmas.used(),
            vma_budget: self.vmas.budget(),
            ..Stats::default()
        };
        let mut metadata_bytes = self.stable.metadata_bytes() + self.unstable.metadata_bytes();
        for attached in self.attached.values() {
            let counts = attached.items.counts();
            stats.pages_unshared += u64::from(counts.unshared_pages);
            stats.pages_volatile += u64::from(counts.volatile_pages);
            stats.pages_zero += u64::from(counts.zero_pages);
            stats.pages_over_vma_budget += u64::from(counts.left_out_pages);
            let watch = attached.watch.as_ref();
            metadata_bytes += attached.items.metadata_bytes();
            metadata_bytes += watch.map_or(0, Watch::metadata_bytes);
        }
        stats.metadata_bytes = metadata_bytes;
        stats.pool_bytes = self.stable.pool_pages() * pages_to_bytes(1) as u64;
        let saved = i64::try_from(stats.pages_sharing + stats.pages_zero).unwrap_or(i64::MAX)
            - i64::try_from(self.stable.kept_pages()).unwrap_or(0);
        let extra_vmas = self.vmas.used() - self.attached.len() as u64;
        stats.saved_bytes = net_bytes(saved, extra_vmas, metadata_bytes);
        stats
    }
}
