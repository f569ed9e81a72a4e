//! Basing a block: it becomes one mapping of a block of places, in which what equals a place needs
//! no copy.
//!
//! The new mapping is built aside. Pages of the guest's own are copied there while it runs on, which
//! takes 1.5 us each, and compared again under protection, which takes 0.1 to 0.3. Pages without
//! content get the kernel's zero page, so that nothing is ever absent over a place: whatever is
//! filled into one later shows nowhere. Then all of it is moved over the guest's block, in one step
//! for those who read it.
//!
//! The same gives a block with many mappings that are not worth it back one. Mapping it anew in place
//! was rejected: readers would see other content until it is filled.

use std::io;

use crate::backing::Backing;
use crate::backing::linux::Urgent;
use crate::base::budget::bytes_of;
use crate::base::complaints::complain;
use crate::base::page::{HUGE_PAGE_PAGES, PageRange, PoolPage, range_pages, runs};
use crate::index::fingerprint::Fingerprint;
use crate::index::layouts::{block_number, block_of, place_in};
use crate::merge::domain::Scanner;
use crate::merge::protected::Protected;
use crate::pages::item::PageState;
use crate::pages::region::{Entered, RegionId};
use crate::pages::region_items::Items;

/// Mappings for each page that would not be shared any more, from which on they are not worth it. A
/// page shared alone takes two, its own and its right neighbour's.
const VMAS_PER_SHARED_PAGE: u32 = 4;

/// Pages that may change between copying and protection before it is given up: each is copied again
/// while writers wait.
const CHANGED_PAGES_MAX: u32 = 32;

/// Pages of zeros over places of the pool from which on their block is built anew to give them back:
/// they can't be dropped one by one, because the place would show.
const ZEROS_MIN: usize = 32;

/// What a page of a block is built from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// A copy of what it shows.
    Copy,
    /// The zero page.
    Zeros,
    /// The place under it, which holds the same.
    Place,
}

/// Whether a block with so many mappings is to be built anew, if so many pages lose their sharing.
fn is_broken(vmas: u32, lost_pages: u32, vmas_min: u32) -> bool {
    vmas >= vmas_min && vmas > lost_pages.saturating_mul(VMAS_PER_SHARED_PAGE)
}

impl<B: Backing> Scanner<B> {
    /// Bases the block that `page` lies in on the block of places that begins at `first`, or on
    /// nothing. Returns whether it is based now: not if it changes too fast, or if fewer than
    /// `places_min` of its pages equal their places, or if one of its pages is pinned.
    ///
    /// # Errors
    /// When the kernel refuses. All is as it was then.
    pub(crate) fn base(
        &mut self,
        inside: &Entered<'_, B>,
        page: u32,
        first: Option<PoolPage>,
        places_min: u32,
    ) -> io::Result<bool> {
        let block = block_of(page, inside.backing().pages());
        let id = inside.region.id();
        let added = self.items(id).vmas_added_by_remap(&block);
        let may_build = self.may_build() && self.takes_vmas(added, HUGE_PAGE_PAGES);
        // Whoever shows zeros over a place is sought by the one guest page that it stands for.
        let is_theirs =
            first.is_none_or(|first| self.stable.layouts.stands_for(first, block.start));
        let is_pinned = inside.region.pins.has_any(&block);
        if inside.is_exiting() || !may_build || !is_theirs || is_pinned {
            return Ok(false);
        }
        let pages = block.clone();
        let mut sources: Vec<Source> = pages.map(|page| self.source(inside, page, first)).collect();
        let at_place = sources.iter().filter(|&&source| source == Source::Place);
        if at_place.count() < places_min as usize {
            return Ok(false);
        }
        // Its mapping calls hold the lock that page faults of all guests need: not while it is off its CPU.
        let _urgent = Urgent::begin();
        let staged = inside.backing().stage(&self.pool, block.clone(), first);
        self.vmas.note_tried(added, &staged);
        let staging = staged?;
        self.build(inside, &staging, block.start, &sources)?;
        let mut protected = Protected::new(inside, block.clone())?;
        if protected.any_pinned() {
            return Ok(false);
        }
        let is_corrected = self.correct(inside, block.start, first, &mut sources, &staging)?;
        if !is_corrected || inside.is_exiting() {
            return Ok(false);
        }
        let replaced = protected.replace(staging);
        self.vmas.note_tried(added, &replaced);
        replaced?;
        self.note_based(inside, &block, first, &sources);
        Ok(true)
    }

    /// The block of places that a page's block is based on.
    pub(crate) fn base_of(&self, id: RegionId, page: u32) -> Option<PoolPage> {
        let base = self.attached.get(&id)?.items.base(page);
        // A block goes with its last mapping, and others may have taken the place of each of these.
        base.filter(|&first| self.stable.layouts.stands_for(first, page))
    }

    /// Whether there is memory for the copies, which are there before the old pages go. It is never
    /// worth a guest's end.
    pub(crate) fn may_build(&self) -> bool {
        self.budget.has_room(bytes_of(HUGE_PAGE_PAGES))
    }

    /// What a page of a block is likely to be built from.
    fn source(&self, inside: &Entered<'_, B>, page: u32, first: Option<PoolPage>) -> Source {
        if self.is_put_off_watched(inside.region.id(), page) {
            // Nobody tells what is written to it: it must not count as merged.
            return Source::Copy;
        }
        let place = first.map(|first| place_in(first, page));
        let place = place.filter(|&place| self.stable.sharers_of(place) > 0);
        let backing = inside.backing();
        if place.is_some_and(|place| backing.equals_pool(page, &self.pool, place)) {
            Source::Place
        } else if backing.is_zero(page) {
            Source::Zeros
        } else {
            Source::Copy
        }
    }

    /// Whether a page of a watched region is left alone because it was busy.
    pub(crate) fn is_put_off_watched(&self, id: RegionId, page: u32) -> bool {
        self.attached.get(&id).is_some_and(|attached| {
            let mut watch = attached.watch.iter();
            attached.items.state(page).is_volatile()
                && watch.any(|watch| !watch.pending.contains(page))
        })
    }

    fn build(
        &self,
        inside: &Entered<'_, B>,
        staging: &B::Staging,
        mut next: u32,
        sources: &[Source],
    ) -> io::Result<()> {
        for run in runs(sources, usize::MAX, |a, b| a == b) {
            let pages = next..next + u32::try_from(run.len()).unwrap_or(0);
            next = pages.end;
            self.stage(inside, staging, pages, run[0])?;
        }
        Ok(())
    }

    /// Compares a protected block with what was built, and corrects what changed meanwhile. False if
    /// that is too much.
    fn correct(
        &self,
        inside: &Entered<'_, B>,
        start: u32,
        first: Option<PoolPage>,
        sources: &mut [Source],
        staging: &B::Staging,
    ) -> io::Result<bool> {
        let backing = inside.backing();
        let mut changed_pages = 0;
        for (page, source) in (start..).zip(sources) {
            let is_right = match *source {
                Source::Copy => backing.equals_staged(staging, page),
                Source::Zeros => backing.is_zero(page),
                Source::Place => first.is_some_and(|first| {
                    backing.equals_pool(page, &self.pool, place_in(first, page))
                }),
            };
            if is_right {
                continue;
            }
            changed_pages += 1;
            if changed_pages > CHANGED_PAGES_MAX {
                return Ok(false);
            }
            if *source != Source::Place {
                backing.unstage(staging, page)?;
            }
            *source = self.source(inside, page, first);
            self.stage(inside, staging, page..page + 1, *source)?;
        }
        Ok(true)
    }

    fn stage(
        &self,
        inside: &Entered<'_, B>,
        staging: &B::Staging,
        pages: PageRange,
        source: Source,
    ) -> io::Result<()> {
        match source {
            Source::Copy => inside.backing().stage_copies(staging, pages),
            Source::Zeros => inside.backing().stage_zeros(staging, pages),
            Source::Place => Ok(()),
        }
    }

    /// Accounts for a block that was put in place.
    fn note_based(
        &mut self,
        inside: &Entered<'_, B>,
        block: &PageRange,
        first: Option<PoolPage>,
        sources: &[Source],
    ) {
        let id = inside.region.id();
        let places: Vec<(u32, PoolPage)> = (block.clone().zip(sources))
            .filter(|&(_, &source)| source == Source::Place)
            .filter_map(|(page, _)| Some((page, place_in(first?, page))))
            .collect();
        for &(_, place) in &places {
            // Before any is dropped: a place must not die in between.
            self.stable.add_sharer(place);
        }
        for (page, &source) in block.clone().zip(sources) {
            let state = self.items(id).state(page);
            if let PageState::Stable(pool_page) = state {
                self.stable.drop_sharer(pool_page);
            }
            match (source, state) {
                (Source::Zeros, PageState::Untracked) | (Source::Place, _) => {}
                (Source::Zeros, PageState::Private | PageState::Dirty) => {
                    self.items(id).set_state(page, PageState::Untracked);
                }
                (Source::Zeros, _) => self.items(id).set_state(page, PageState::Zero),
                // It has memory of its own again, or was written to.
                (Source::Copy, PageState::Stable(_) | PageState::Zero) => {
                    self.note_private(id, page);
                }
                (Source::Copy, _) => {}
            }
        }
        // Last: a stable page's item names its pool page by the mapping under it.
        self.remap(id, block, first);
        let items = self.items(id);
        items.set_base(block.start, first);
        for &(page, place) in &places {
            items.set_state(page, PageState::Stable(place));
        }
        self.changes += u64::from(range_pages(block));
    }

    /// Builds the block that `page` lies in anew if its mappings are not worth it any more, or if
    /// that gives enough back.
    pub(crate) fn heal(&mut self, inside: &Entered<'_, B>, page: u32) {
        let id = inside.region.id();
        let items = self.items(id);
        if !items.knows_block(page) {
            return;
        }
        let block = block_of(page, inside.backing().pages());
        let (vmas, shared_pages) = (items.vmas_in(&block), items.stable_in(&block));
        let of_zeros = Some(Fingerprint::of_zeros().checksum());
        let zeros = block.clone().filter(|&page| {
            items.in_pool_vma(page) && items.state(page).calm_checksum() == of_zeros
        });
        let gives_back = zeros.count() >= ZEROS_MIN.min(block.len() / 2);
        if vmas < self.heal_vmas_min && !gives_back {
            return;
        }
        let known = self.stable.layouts.blocks_of(block_number(page));
        let base = self.base_of(id, page);
        // The oldest of those that are nearly as good as the best: all of a domain's guests are to come
        // to the same, or each content would lie in several.
        let scored: Vec<(u32, PoolPage)> = (known.iter())
            .map(|&first| (self.shareable_at(id, &block, first, true), first))
            .collect();
        let most = scored.iter().map(|&(pages, _)| pages).max().unwrap_or(0);
        let is_good = |&&(pages, _): &&(u32, PoolPage)| pages > 0 && pages >= most - most / 8;
        let best = scored.iter().find(is_good).copied();
        // Over nothing if nothing is shared: zeros would keep the places that they lie over.
        let base = base.filter(|_| shared_pages > 0);
        let (kept, first) = best.map_or((0, base), |(pages, first)| (pages, Some(first)));
        let lost_pages = shared_pages.saturating_sub(kept);
        if !gives_back && !is_broken(vmas, lost_pages, self.heal_vmas_min) {
            return;
        }
        let is_pinned = inside.region.pins.has_any(&block);
        if is_pinned || inside.is_exiting() || !self.may_build() {
            return;
        }
        let filled = first.map_or_else(Vec::new, |first| self.refill(inside, &block, first));
        // There may have been no memory for some of the places.
        let kept = first.map_or(0, |first| self.shareable_at(id, &block, first, false));
        let lost_pages = shared_pages.saturating_sub(kept);
        if gives_back || is_broken(vmas, lost_pages, self.heal_vmas_min) {
            self.rebuild(inside, page, first);
        }
        for place in filled {
            self.stable.drop_sharer(place);
        }
    }

    /// Looks at the next block of a region: what its pages are mapped to may have become worth building
    /// it anew while nobody wrote to it.
    pub(crate) fn heal_next(&mut self, inside: &Entered<'_, B>) {
        let Some(attached) = self.attached(inside.region.id()) else {
            return;
        };
        let items = &attached.items;
        let mut starts = (0..items.pages()).step_by(HUGE_PAGE_PAGES as usize);
        let is_next = |&page: &u32| page >= attached.heal_from && items.knows_block(page);
        let next = starts.find(is_next);
        attached.heal_from = next.map_or(0, |page| page + HUGE_PAGE_PAGES);
        if let Some(page) = next {
            self.heal(inside, page);
            self.reclaim();
        }
    }

    /// Has a block of which nothing is shared any more lie over nothing, if it has many mappings, or
    /// pages of zeros for which places would be kept.
    pub(crate) fn give_mappings_back(&mut self, inside: &Entered<'_, B>, block: &PageRange) {
        let vmas_min = self.heal_vmas_min;
        let items: &Items = self.items(inside.region.id());
        let shows_zeros = block.clone().any(|page| items.may_show_zeros(page));
        if shows_zeros || items.vmas_in(block) >= vmas_min {
            self.rebuild(inside, block.start, None);
        }
    }

    fn rebuild(&mut self, inside: &Entered<'_, B>, page: u32, first: Option<PoolPage>) {
        if let Err(error) = self.base(inside, page, first, 0) {
            // It costs VMAs and nothing else.
            let id = inside.region.id().0;
            complain!(
                Warn,
                "cannot heal the block of page {page} of region {id}: {error}"
            );
        }
    }

    /// Pages of a block whose stable page holds what their place holds. With `if_filled`, those too that
    /// could: the place is empty.
    fn shareable_at(
        &self,
        id: RegionId,
        block: &PageRange,
        first: PoolPage,
        if_filled: bool,
    ) -> u32 {
        let Some(attached) = self.attached.get(&id) else {
            return 0;
        };
        let is_shareable = |&page: &u32| match attached.items.state(page) {
            PageState::Stable(pool_page) => {
                let place = place_in(first, page);
                let held = self.stable.fingerprint(place);
                (if_filled && self.can_move(page, pool_page, place))
                    || self.stable.fingerprint(pool_page) == held
            }
            _ => false,
        };
        u32::try_from(block.clone().filter(is_shareable).count()).unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merge::tuning::HEAL_VMAS_MIN;

    #[test]
    fn only_blocks_with_many_mappings_for_few_shared_pages_are_broken() {
        let is_broken = |vmas, shared_pages| is_broken(vmas, shared_pages, HEAL_VMAS_MIN);
        assert!(!is_broken(1, 0), "one mapping is the least there can be");
        assert!(!is_broken(HEAL_VMAS_MIN - 1, 0));
        assert!(is_broken(HEAL_VMAS_MIN, 0));
        assert!(!is_broken(512, 256), "every other page is shared");
        assert!(is_broken(100, 10));
    }
}
