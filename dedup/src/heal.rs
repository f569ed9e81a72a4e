//! Healing: gives back the VMAs of runs that are not worth them any more.
//!
//! A guest that writes to shared pages gets private ones, but the mappings of the pool stay under
//! them, and each costs kernel memory and counts against the budget. Where a block of memory has
//! many mappings and hardly a shared page left, it is copied into one new mapping, which is moved
//! over the old ones in one step.
//!
//! Mapping the range anew in place was rejected: a reader would see zeros until it is filled. The
//! moved mapping cannot become one with its neighbours (its pages keep the offset at which they
//! were first written, `mm/vma.c`, `can_vma_merge_after`), so that only broken blocks are healed.

use std::io;

use crate::backing::Backing;
use crate::budget::bytes_of;
use crate::huge::block_of;
use crate::item::PageState;
use crate::page::{HUGE_PAGE_PAGES, PageRange};
use crate::protected::Protected;
use crate::region::Entered;
use crate::scanner::Scanner;

/// Mappings in a block of 512 pages below which it is left alone: copying it takes as long as
/// merging a thousand pages.
pub(crate) const HEAL_VMAS_MIN: u32 = 16;

/// Mappings for each shared page from which on they are not worth it. A page shared alone takes
/// two, its own and its right neighbour's.
const VMAS_PER_SHARED_PAGE: u32 = 4;

/// Pages copied under one protection: their writers wait, for half a millisecond or so. A block that
/// is healed keeps a mapping for each such part.
pub(crate) const PART_PAGES: u32 = HUGE_PAGE_PAGES / 4;

/// Whether a block with so many mappings is to be healed.
fn is_broken(vmas: u32, shared_pages: u32, vmas_min: u32) -> bool {
    vmas >= vmas_min && vmas > shared_pages.saturating_mul(VMAS_PER_SHARED_PAGE)
}

impl<B: Backing> Scanner<B> {
    /// Heals the block that `page` lies in, if it is broken.
    pub(crate) fn heal(&mut self, inside: &Entered<'_, B>, page: u32) {
        let block = block_of(page);
        let block = block.start..block.end.min(inside.backing().pages());
        let vmas_min = self.heal_vmas_min;
        let items = self.items(inside.region.id());
        if !is_broken(items.vmas_in(&block), items.stable_in(&block), vmas_min) {
            return;
        }
        // The copy is there before the old pages go. Healing is never worth a guest's end.
        if !self.budget.has_room(bytes_of(HUGE_PAGE_PAGES)) {
            return;
        }
        let id = inside.region.id();
        for start in block.clone().step_by(PART_PAGES as usize) {
            let part = start..block.end.min(start + PART_PAGES);
            // Nothing is won where there is one mapping.
            if self.items(id).vmas_in(&part) < 2 {
                continue;
            }
            if let Err(error) = self.rebuild(inside, part.clone()) {
                // It costs VMAs and nothing else.
                log::warn!("cannot heal pages {part:?} of region {}: {error}", id.0);
            }
        }
    }

    fn rebuild(&mut self, inside: &Entered<'_, B>, part: PageRange) -> io::Result<()> {
        if inside.is_exiting() {
            return Ok(());
        }
        let id = inside.region.id();
        let mut protected = Protected::new(inside.backing(), part.clone(), true)?;
        let items = self.items(id);
        // What a private page or a page of the pool shows must be there; all else is zeros.
        let under: Vec<bool> = part.clone().map(|page| items.in_pool_vma(page)).collect();
        protected.rebuild(&under)?;
        for page in part.clone() {
            if let PageState::Stable(pool_page) = self.items(id).state(page) {
                self.stable.drop_sharer(pool_page);
                self.items(id).set_state(page, PageState::Untracked);
                let pending = self.pending(id).into_iter();
                pending.for_each(|pending| pending.insert(page));
            }
        }
        // Last: a stable page's item names its pool page by the mapping under it.
        self.remap(id, &part, None);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_blocks_with_many_mappings_for_few_shared_pages_are_broken() {
        let is_broken = |vmas, shared_pages| is_broken(vmas, shared_pages, HEAL_VMAS_MIN);
        assert!(!is_broken(1, 0), "one mapping is the least there can be");
        assert!(!is_broken(HEAL_VMAS_MIN - 1, 0));
        assert!(is_broken(HEAL_VMAS_MIN, 0));
        assert!(!is_broken(512, 256), "every other page is shared");
        assert!(is_broken(100, 10));
        assert!(
            !is_broken(2 * 10, 10),
            "what healing leaves is not healed again"
        );
    }
}
