//! One window of a watched region: only what was written to, or not yet tried, is looked at.

use std::io;

use crate::backing::{Backing, Residency};
use crate::base::complaints::complain;
use crate::base::page::{PageRange, PoolPage, runs};
use crate::index::layouts::{block_number, place_in};
use crate::merge::domain::Scanner;
use crate::merge::plan::Plan;
use crate::pages::backoff::{Interval, WORTH};
use crate::pages::item::PageState;
use crate::pages::region::{Entered, RegionId};

/// Dirty pages that cost as much as one that is read. Counted in full, they would fill batches
/// with next to no work between the pauses: with eight busy guests a pass took so long that each
/// page was written to in it, and none was ever found calm.
const DIRTY_PER_READ: u32 = 16;

/// Pages that turn out to have no memory which cost as much as one that is read. Counted in full, those
/// of a new VM that has touched little of its memory would fill batches, and the other VMs of its
/// domain would wait for 100 ms a GiB. Nobody knows them before their visit, so pages that are due
/// count in full: batches are planned too large for them, never too small.
const ABSENT_PER_READ: u32 = 64;

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
        attached.looks.begin(intervals, hurried || self.is_short);
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

    /// Visits pages, each with whether it is dirty. A dirty page is not read: it is given time to
    /// calm down, the more the busier it was. One that is not has had that time, is read once and
    /// planned. Returns the pages read, to which the others add a little.
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
        let mut read_pages = 0;
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
                read_pages += u32::from(residency == Some(Residency::Private));
                self.visit_calm(inside, page, residency, plan);
            }
        }
        let dirty_pages = pages.iter().filter(|&&(_, dirty)| dirty).count();
        let count = |pages: usize| u32::try_from(pages).unwrap_or(u32::MAX);
        let others = count(pages.len() - dirty_pages).saturating_sub(read_pages);
        Ok(read_pages + count(dirty_pages) / DIRTY_PER_READ + others / ABSENT_PER_READ)
    }

    /// The stable page that a page is likely to be equal to: the one that it is mapped to and was written
    /// over, or the one at its place. Only if the page begins like it.
    pub(crate) fn guess(&self, inside: &Entered<'_, B>, page: u32) -> Option<PoolPage> {
        let id = inside.region.id();
        let items = &self.attached.get(&id)?.items;
        let blocks = match self.base_of(id, page) {
            Some(_) => &[],
            None => self.stable.layouts.blocks_of(block_number(page)),
        };
        let places = blocks.iter().map(|&first| place_in(first, page));
        (items.pool_page_under(page).into_iter())
            .chain(places)
            .filter(|&pool_page| self.stable.sharers_of(pool_page) > 0)
            .find(|&pool_page| inside.backing().may_equal_pool(page, &self.pool, pool_page))
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
mod tests;
