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
        if let Err(error) = self.rebuild(inside, block.clone()) {
            // It costs VMAs and nothing else.
            let id = inside.region.id().0;
            log::warn!("cannot heal pages {block:?} of region {id}: {error}");
        }
    }

    fn rebuild(&mut self, inside: &Entered<'_, B>, block: PageRange) -> io::Result<()> {
        if inside.is_exiting() {
            return Ok(());
        }
        let id = inside.region.id();
        let mut protected = Protected::new(inside.backing(), block.clone(), true)?;
        let items = self.items(id);
        // What a private page or a page of the pool shows must be there; all else is zeros.
        let under: Vec<bool> = block.clone().map(|page| items.in_pool_vma(page)).collect();
        protected.rebuild(&under)?;
        for page in block.clone() {
            if let PageState::Stable(pool_page) = self.items(id).state(page) {
                self.stable.drop_sharer(pool_page);
                self.items(id).set_state(page, PageState::Untracked);
                let pending = self.pending(id).into_iter();
                pending.for_each(|pending| pending.insert(page));
            }
        }
        // Last: a stable page's item names its pool page by the mapping under it.
        self.remap(id, &block, None);
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
