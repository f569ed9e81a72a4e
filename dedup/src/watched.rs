//! One window of a watched region: only what was written to, or not yet tried, is looked at.

use std::io;

use crate::backing::{Backing, Residency};
use crate::backoff::{Interval, WORTH};
use crate::complaints::complain;
use crate::item::PageState;
use crate::page::{PageRange, runs};
use crate::region::{Entered, RegionId};
use crate::scanner::Scanner;
use crate::visit::Plan;

/// Dirty pages that cost as much as one that is read. Counted in full, they would fill batches
/// with next to no work between the pauses: with eight busy guests a pass took so long that each
/// page was written to in it, and none was ever found calm.
const DIRTY_PER_READ: u32 = 16;

/// Pages between two of a range that is asked about in one call. A page that was ever merged alone
/// has a mapping of its own, and each takes the kernel 0.4 us to pass by.
const GAP_PAGES_MAX: u32 = 16;

impl<B: Backing> Scanner<B> {
    /// Begins a pass over a region: learns what was written to, and what need not wait any more.
    pub(crate) fn begin_region(&mut self, inside: &Entered<'_, B>) {
        let (intervals, hurried) = (&self.intervals, self.hurried);
        let interval = intervals.current();
        let map_after = self.map_after;
        let pass = u32::try_from(self.full_scans & u64::from(u32::MAX)).unwrap_or(0);
        let has_vmas = self.vmas.have_plenty();
        let Some(attached) = self.attached.get_mut(&inside.region.id()) else {
            return;
        };
        let (Some(watch), Some(source)) = (&mut attached.watch, inside.region.source()) else {
            attached.items.now = Interval(pass);
            return;
        };
        attached.looks.begin(intervals, hurried);
        if !attached.looks.is_due {
            attached.due_pages = 0;
            return;
        }
        attached.items.now = interval;
        attached.items.worth = WORTH;
        watch.release_to_map(&attached.items, if hurried { 0 } else { map_after });
        if has_vmas && attached.items.counts().left_out_pages > 0 {
            let left_out = attached.items.left_out();
            left_out.for_each(|page| watch.pending.insert(page));
        }
        watch.look(&attached.items, hurried, |dirty, ignored| {
            if let Err(error) = source.collect(dirty, ignored) {
                let id = inside.region.id().0;
                complain!(Warn, "cannot tell the dirty pages of region {id}: {error}");
                dirty.insert_all();
            }
        });
        let (dirty_pages, other_pages) = watch.count();
        attached.due_pages = dirty_pages / DIRTY_PER_READ + other_pages;
        self.heal_next(inside);
    }

    /// Has a page that was just written to tried once it is calm, by its back-off.
    fn try_when_calm(&mut self, id: RegionId, page: u32) {
        let hurried = self.hurried;
        let Some(attached) = self.attached(id) else {
            return;
        };
        let backoff = attached.items.backoff(page);
        let Some(watch) = &mut attached.watch else {
            return;
        };
        if hurried || backoff.wait() == 0 {
            watch.pending.insert(page);
        } else {
            watch.put_off(page);
            self.pages_skipped += 1;
        }
    }

    /// Whether a page may get a mapping of its own now.
    pub(crate) fn may_map(&self, id: RegionId, page: u32) -> bool {
        self.attached.get(&id).is_some_and(|attached| {
            let items = &attached.items;
            let calm = items.backoff(page).elapsed(items.now);
            let is_calm = self.hurried || attached.watch.is_none() || calm >= self.map_after;
            is_calm && items.state(page).calm_checksum().is_some()
        })
    }

    /// Whether a page of a watched region is left alone because it was busy.
    pub(crate) fn is_put_off_watched(&self, id: RegionId, page: u32) -> bool {
        self.attached.get(&id).is_some_and(|attached| {
            let mut watch = attached.watch.iter();
            attached.items.state(page).is_volatile()
                && watch.any(|watch| !watch.pending.contains(page))
        })
    }

    /// Visits pages, each with whether it is dirty. A dirty page is not read: it is given time to
    /// calm down, the more the busier it was. One that is not has had that time, is read once and
    /// planned. Returns the pages read, to which dirty ones add a little.
    pub(crate) fn visit_watched(
        &mut self,
        inside: &Entered<'_, B>,
        pages: &[(u32, bool)],
        plan: &mut Plan,
    ) -> io::Result<u32> {
        let id = inside.region.id();
        let (merged_or_calm, written) = pages
            .iter()
            .partition::<Vec<_>, _>(|&&(page, dirty)| !dirty || self.items(id).is_merged(page));
        // Nothing else can have become of these, so nobody is asked what lies behind them.
        for (page, _) in written {
            self.note_written(id, page);
        }
        let mut found = Vec::new();
        for run in runs(&merged_or_calm, usize::MAX, |a, b| {
            b.0 - a.0 <= GAP_PAGES_MAX
        }) {
            let range = run[0].0..run[run.len() - 1].0 + 1;
            if let Err(error) = inside.backing().residency(range, &mut found) {
                let pages = merged_or_calm.iter();
                pages.for_each(|&(page, _)| self.keep_dirty(id, page));
                return Err(error);
            }
        }
        let mut found = found.into_iter().peekable();
        for &(page, dirty) in &merged_or_calm {
            if inside.is_exiting() {
                break;
            }
            while found.next_if(|(range, _)| range.end <= page).is_some() {}
            let residency = found.peek().filter(|(range, _)| range.contains(&page));
            let residency = residency.map(|&(_, residency)| residency);
            if dirty {
                self.visit_dirty(inside, page, residency);
            } else {
                self.visit_calm(inside, page, residency, plan);
            }
        }
        let dirty_pages = pages.iter().filter(|&&(_, dirty)| dirty).count();
        let count = |pages: usize| u32::try_from(pages).unwrap_or(u32::MAX);
        Ok(count(pages.len() - dirty_pages) + count(dirty_pages) / DIRTY_PER_READ)
    }

    /// A page was written to. One that was merged is known to be private now.
    fn note_written(&mut self, id: RegionId, page: u32) {
        self.unshared_by_guest(id, page);
        let items = self.items(id);
        let (before, backoff) = (items.state(page), items.backoff(page));
        let state = match before {
            // What it held when it was last read: its next visit compares.
            PageState::Unshared { checksum }
            | PageState::LeftOut { checksum }
            | PageState::Volatile { checksum } => PageState::Volatile { checksum },
            PageState::Untracked | PageState::Dirty => PageState::Dirty,
            _ => PageState::Volatile { checksum: 0 },
        };
        items.set_state(page, state);
        if before.is_volatile() {
            items.set_backoff(page, backoff.busy(items.now));
        }
        self.changes += u64::from(!before.is_volatile());
        self.try_when_calm(id, page);
    }

    /// A merged page that was written to, before it was merged or after.
    fn visit_dirty(&mut self, inside: &Entered<'_, B>, page: u32, residency: Option<Residency>) {
        let id = inside.region.id();
        match residency {
            Some(Residency::Private) => self.note_written(id, page),
            // Swapped, or being moved: nobody can tell yet.
            Some(Residency::Swapped) => self.keep_dirty(id, page),
            // The write came before the merge, and was compared with the rest.
            _ => {}
        }
    }

    fn visit_calm(
        &mut self,
        inside: &Entered<'_, B>,
        page: u32,
        residency: Option<Residency>,
        plan: &mut Plan,
    ) {
        let id = inside.region.id();
        if self.items(id).is_merged(page) && residency != Some(Residency::Private) {
            return;
        }
        if residency == Some(Residency::Swapped) {
            self.keep_dirty(id, page);
        }
        if residency == Some(Residency::Private) {
            // A merged page that is private was given its copy by an unmerge that failed.
            self.unshared_by_guest(id, page);
            self.changes += 1;
            if let Some(pool_page) = self.guess(inside, page) {
                let items = self.items(id);
                let is_calm = items.state(page).calm_checksum().is_some();
                if !is_calm && !matches!(items.state(page), PageState::Volatile { .. }) {
                    items.set_state(page, PageState::Volatile { checksum: 0 });
                }
                plan.guessed.push((page, pool_page));
            } else {
                self.read_and_plan(inside, page, plan);
            }
        } else {
            self.items(id).set_state(page, PageState::Untracked);
        }
    }

    /// Takes pages that were merged, or found to be alone or absent, off the list of those to try.
    /// Those of `later` are tried once more.
    pub(crate) fn settle_watched(
        &mut self,
        inside: &Entered<'_, B>,
        window: PageRange,
        later: &[u32],
    ) {
        let Some(attached) = self.attached(inside.region.id()) else {
            return;
        };
        let Some(watch) = &mut attached.watch else {
            return;
        };
        let tried: Vec<u32> = watch.pending.iter_in(window).collect();
        for page in tried {
            let state = attached.items.state(page);
            let is_open = state.is_volatile() || state == PageState::Private;
            if !is_open && !later.contains(&page) {
                watch.pending.remove(page);
            }
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::time::{Duration, Instant};

    use crate::backing::fake::{FakeMemory, FakePool};
    use crate::backoff::Intervals;
    use crate::control::{Control, Pace, Run};
    use crate::scanner::Scanner;
    use crate::shared::Shared;

    fn world(pages: u32) -> (Shared<Scanner<FakeMemory>>, FakeMemory) {
        world_of(pages, 1000)
    }

    fn world_of(pages: u32, vma_budget: u32) -> (Shared<Scanner<FakeMemory>>, FakeMemory) {
        let pool = FakePool::default();
        let mut scanner = Scanner::new(pool.clone(), vma_budget);
        scanner.intervals = Intervals::new(Duration::ZERO, Instant::now());
        scanner.map_after = 0;
        let shared = Shared::new(scanner, Control::new(Run::Merge, Pace::default()));
        let memory = FakeMemory::new(pages, &pool);
        shared.register(memory.clone(), Some(memory.source()));
        (shared, memory)
    }

    /// Waits that a page was given in 20 times three passes, before each of which it was written to
    /// or, without a content to write, only called dirty.
    fn waits(content: impl Fn(u64) -> Option<u64>) -> u64 {
        let (shared, memory) = world(4);
        let pass = || while shared.batch(u32::MAX).passes == 0 {};
        memory.write(1, 7);
        for version in 0..20 {
            match content(version) {
                Some(content) => memory.write(1, content),
                None => memory.name_dirty(1),
            }
            (0..3).for_each(|_| pass());
        }
        shared.stats().pages_skipped
    }

    #[test]
    fn a_page_that_is_called_dirty_and_holds_what_it_held_is_not_put_off() {
        assert_eq!(waits(|_| None), 0);
        assert!(waits(|version| Some(100 + version)) > 2);
    }

    #[test]
    fn no_stable_page_is_founded_with_a_page_that_changed_since() {
        let (shared, memory) = world(4);
        let pass = || while shared.batch(u32::MAX).passes == 0 {};
        let settle = || (0..4).for_each(|_| pass());
        memory.write(1, 7);
        settle();
        memory.write(1, 8);
        settle();
        memory.write(2, 7);
        settle();
        let stats = shared.stats();
        assert_eq!(
            (stats.pages_unshared, stats.pages_shared),
            (2, 0),
            "{stats:?}"
        );
        // Both can still be found.
        memory.write(0, 7);
        memory.write(3, 8);
        settle();
        let stats = shared.stats();
        assert_eq!(
            (stats.pages_shared, stats.pages_sharing),
            (2, 2),
            "{stats:?}"
        );
    }

    #[test]
    fn pages_over_the_vma_budget_are_tried_once() {
        const PAGES: u32 = 9;
        // Two regions take two VMAs, and no page here has a neighbour to share one with.
        let (shared, one) = world_of(PAGES, 2);
        let pool = shared.lock_scanner().pool.clone();
        let other = FakeMemory::new(PAGES, &pool);
        shared.register(other.clone(), Some(other.source()));
        for page in (1..PAGES).step_by(2) {
            one.write(page, u64::from(page));
            other.write(PAGES - 1 - page, u64::from(page));
        }
        one.write(0, 100);
        other.write(0, 200);
        let scanned = || {
            (0..20).for_each(|_| while shared.batch(u32::MAX).passes == 0 {});
            let stats = shared.stats();
            let alone = stats.pages_unshared + stats.pages_over_vma_budget;
            assert_eq!((stats.pages_shared, alone), (0, 10), "{stats:?}");
            assert!(stats.pages_over_vma_budget >= 4, "{stats:?}");
            stats.pages_scanned
        };
        assert_eq!(scanned(), scanned());
    }

    #[test]
    fn what_is_equal_elsewhere_is_mapped_once_it_was_calm_for_long() {
        const PAGES: u32 = 8;
        let (shared, one) = world(PAGES);
        let mut scanner = shared.lock_scanner();
        scanner.map_after = 20;
        let pool = scanner.pool.clone();
        drop(scanner);
        let other = FakeMemory::new(PAGES, &pool);
        shared.register(other.clone(), Some(other.source()));
        for page in 0..PAGES {
            one.write(page, u64::from(page + 1));
            other.write(PAGES - 1 - page, u64::from(page + 1));
        }
        let pass = || while shared.batch(u32::MAX).passes == 0 {};
        (0..15).for_each(|_| pass());
        let stats = shared.stats();
        assert_eq!((stats.pages_shared, stats.pages_unshared), (0, 16));
        let scanned = stats.pages_scanned;
        (0..3).for_each(|_| pass());
        assert_eq!(
            shared.stats().pages_scanned,
            scanned,
            "nobody looks meanwhile"
        );
        (0..12).for_each(|_| pass());
        assert_eq!(shared.stats().pages_sharing, u64::from(PAGES));
    }

    #[test]
    fn a_long_run_elsewhere_is_mapped_without_a_wait() {
        const RUN_PAGES: u32 = 20;
        let (shared, one) = world(2 * RUN_PAGES);
        let mut scanner = shared.lock_scanner();
        scanner.map_after = 1000;
        let pool = scanner.pool.clone();
        drop(scanner);
        let other = FakeMemory::new(2 * RUN_PAGES, &pool);
        shared.register(other.clone(), Some(other.source()));
        for page in 0..RUN_PAGES {
            one.write(page, u64::from(page + 1));
            other.write(page + RUN_PAGES, u64::from(page + 1));
        }
        (0..15).for_each(|_| while shared.batch(u32::MAX).passes == 0 {});
        let stats = shared.stats();
        assert_eq!(stats.pages_sharing, u64::from(RUN_PAGES), "{stats:?}");
        assert_eq!(stats.vmas, 4, "{stats:?}");
    }

    #[test]
    fn what_is_written_to_a_page_that_is_put_off_is_not_asked_for() {
        let (shared, memory) = world(4);
        let pass = || while shared.batch(u32::MAX).passes == 0 {};
        let mut looks_ignored = 0;
        for version in 0..60 {
            memory.write(1, 100 + version);
            pass();
            looks_ignored += u32::from(memory.is_ignored(1));
        }
        assert!(looks_ignored > 40, "{looks_ignored} of 60 looks");
        // Left alone, it is found to be calm.
        (0..70).for_each(|_| pass());
        assert_eq!(shared.stats().pages_unshared, 1, "{:?}", shared.stats());
        assert!(!memory.is_ignored(1));
    }
}
