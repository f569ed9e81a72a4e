//! What the holder of the worker mutex owns: items, stable pages, unstable candidates, counters.

use std::collections::HashMap;
use std::sync::Arc;

use crate::backing::{Backing, Pool};
use crate::fingerprint::Fingerprint;
use crate::items::Items;
use crate::page::{PageRange, PoolPage, pages_to_bytes};
use crate::region::{Region, RegionId};
use crate::stable::StablePages;
use crate::stats::{RegionStats, Stats, net_bytes};
use crate::sync;

/// A region that the worker has met, with what it knows of its pages.
#[derive(Debug)]
pub(crate) struct Attached<B> {
    pub(crate) region: Arc<Region<B>>,
    pub(crate) items: Items,
}

/// The state of scanning.
#[derive(Debug)]
pub(crate) struct Scanner<B: Backing> {
    pub(crate) pool: B::Pool,
    pub(crate) stable: StablePages,
    /// Calm pages of this pass by fingerprint. Weak knowledge: their content may change at any
    /// time, so a partner found here is compared under protection. Emptied after each pass.
    pub(crate) unstable: HashMap<Fingerprint, (RegionId, u32)>,
    attached: HashMap<RegionId, Attached<B>>,
    vmas: u64,
    vma_budget: u64,
    pages_over_vma_budget: u64,
    pub(crate) pages_scanned: u64,
    pub(crate) full_scans: u64,
    /// Pages that changed their state in this pass: nothing of it means that sleeping is right.
    pub(crate) changes: u64,
}

impl<B: Backing> Scanner<B> {
    pub(crate) fn new(pool: B::Pool, vma_budget: u32) -> Scanner<B> {
        Scanner {
            pool,
            stable: StablePages::new(),
            unstable: HashMap::new(),
            attached: HashMap::new(),
            vmas: 0,
            vma_budget: u64::from(vma_budget),
            pages_over_vma_budget: 0,
            pages_scanned: 0,
            full_scans: 0,
            changes: 0,
        }
    }

    /// Begins to follow a region's pages, if the worker has not met it yet.
    pub(crate) fn attach(&mut self, region: &Arc<Region<B>>) {
        let vmas = &mut self.vmas;
        self.attached.entry(region.id()).or_insert_with(|| {
            let items = Items::new(region.backing().pages());
            *vmas += u64::from(items.vmas());
            Attached {
                region: Arc::clone(region),
                items,
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
        self.vmas -= u64::from(attached.items.vmas());
        self.reclaim();
    }

    pub(crate) fn region(&self, id: RegionId) -> Option<Arc<Region<B>>> {
        self.attached
            .get(&id)
            .map(|attached| Arc::clone(&attached.region))
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

    /// Ends a pass over all regions.
    pub(crate) fn end_pass(&mut self) {
        self.unstable.clear();
        self.full_scans += 1;
    }

    /// Punches dead stable pages out of the pool.
    pub(crate) fn reclaim(&mut self) {
        for (first, pages) in self.stable.dead_runs() {
            if let Err(error) = self.pool.punch(first, pages) {
                // The pages stay allocated until they are filled anew: memory lost, nothing wrong.
                log::warn!(
                    "cannot punch {pages} pages out of the pool at {}: {error}",
                    first.0
                );
            }
        }
        self.stable.reclaim();
    }

    /// Whether the VMA budget allows `added` more VMAs for the sake of `pages` pages. The fuller
    /// the budget, the longer a run must be: the cheapest savings are left out first.
    pub(crate) fn takes_vmas(&mut self, added: i64, pages: u32) -> bool {
        let wanted = self.vmas.saturating_add_signed(added);
        let percent = wanted.saturating_mul(100) / self.vma_budget.max(1);
        let run_pages_min = match percent {
            0..50 => 1,
            50..75 => 2,
            75..90 => 8,
            _ => 32,
        };
        let allowed = added <= 0 || (wanted <= self.vma_budget && pages >= run_pages_min);
        if !allowed {
            self.pages_over_vma_budget += u64::from(pages);
        }
        allowed
    }

    /// Records that `range` of a region is now one mapping of its own.
    pub(crate) fn remap(&mut self, id: RegionId, range: &PageRange, first: Option<PoolPage>) {
        let items = self.items(id);
        let before = items.vmas();
        items.remap(range, first);
        let after = items.vmas();
        self.vmas = self.vmas + u64::from(after) - u64::from(before);
    }

    /// Publishes a region's counters where its handle reads them without the worker mutex.
    pub(crate) fn publish_region(&mut self, region: &Region<B>) {
        let items = self.items(region.id());
        let counts = items.counts();
        let merged = i64::from(counts.stable_pages) + i64::from(counts.zero_pages);
        let stats = RegionStats {
            items: [
                counts.volatile_pages,
                counts.unshared_pages,
                counts.stable_pages,
            ]
            .map(u64::from)
            .iter()
            .sum::<u64>()
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
            pages_sharing: self.stable.sharers() - self.stable.shared_pages(),
            pages_scanned: self.pages_scanned,
            full_scans: self.full_scans,
            pages_over_vma_budget: self.pages_over_vma_budget,
            vmas: self.vmas,
            vma_budget: self.vma_budget,
            ..Stats::default()
        };
        let unstable_entry_bytes = size_of::<(Fingerprint, (RegionId, u32))>() + 1;
        let mut metadata_bytes =
            self.stable.metadata_bytes() + (self.unstable.capacity() * unstable_entry_bytes) as u64;
        for attached in self.attached.values() {
            let counts = attached.items.counts();
            stats.pages_unshared += u64::from(counts.unshared_pages);
            stats.pages_volatile += u64::from(counts.volatile_pages);
            stats.pages_zero += u64::from(counts.zero_pages);
            metadata_bytes += attached.items.metadata_bytes();
        }
        stats.metadata_bytes = metadata_bytes;
        stats.pool_bytes = stats.pages_shared * pages_to_bytes(1) as u64;
        let saved = i64::try_from(stats.pages_sharing + stats.pages_zero).unwrap_or(i64::MAX);
        let extra_vmas = self.vmas - self.attached.len() as u64;
        stats.saved_bytes = net_bytes(saved, extra_vmas, metadata_bytes);
        stats
    }
}
