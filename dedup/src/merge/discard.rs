//! Discard: pages that their owner gives up, for a balloon or for free page reporting.
//!
//! `MADV_DONTNEED` alone would show what lies under a page: content of another guest, or what a place
//! is filled with later. So pages that lie over the pool get a mapping of nothing instead, in one step.
//! A page that lies over nothing only loses its memory.
//!
//! Rejected: building the block anew with the kernel's zero page over the places. It copies the rest of
//! the block for each request, and the pool keeps a place as long as somebody shows zeros over it.

use std::io;

use crate::backing::Backing;
use crate::backing::linux::Urgent;
use crate::base::page::{PageRange, range_pages};
use crate::index::layouts::block_of;
use crate::merge::domain::Scanner;
use crate::merge::protected::Protected;
use crate::pages::item::PageState;
use crate::pages::region::Entered;

impl<B: Backing> Scanner<B> {
    /// Gives up pages of one block: they show zeros afterwards and take no memory. Returns how many:
    /// all or none, which are left as they are if one is pinned, if there are no mappings left for
    /// them, or if the region is exiting.
    ///
    /// # Errors
    /// When the kernel refuses. All is as it was then.
    pub(crate) fn discard(
        &mut self,
        inside: &Entered<'_, B>,
        pages: &PageRange,
    ) -> io::Result<u32> {
        if *pages != block_of(pages.start, inside.backing().pages()) {
            self.split_if_huge(inside, pages.start);
        }
        let discarded = self.try_discard(inside, pages);
        let block = block_of(pages.start, inside.backing().pages());
        let items = self.items(inside.region.id());
        if items.knows_block(pages.start) && items.stable_in(&block) == 0 {
            self.give_mappings_back(inside, &block);
        }
        self.reclaim();
        self.publish_region(inside.region);
        discarded
    }

    fn try_discard(&mut self, inside: &Entered<'_, B>, pages: &PageRange) -> io::Result<u32> {
        let items = self.items(inside.region.id());
        // Then all of them as one: pages of both kinds may take turns, and each run some ten calls.
        let are_over_pool = pages.clone().any(|page| items.in_pool_vma(page));
        let added = match are_over_pool {
            true => items.vmas_added_by_remap(pages),
            false => 0,
        };
        let count = range_pages(pages);
        if !self.takes_vmas(added, count) {
            return Ok(0);
        }
        // Its mapping calls hold the lock that page faults of all guests need.
        let _urgent = Urgent::begin();
        let mut staging = None;
        if are_over_pool {
            let staged = inside.backing().stage(&self.pool, pages.clone(), None);
            self.vmas.note_tried(added, &staged);
            staging = Some(staged?);
        }
        let mut protected = Protected::new(inside, pages.clone())?;
        if protected.any_pinned() || inside.is_exiting() {
            return Ok(0);
        }
        match staging {
            Some(staging) => {
                let replaced = protected.replace(staging);
                self.vmas.note_tried(added, &replaced);
                replaced?;
            }
            None => {
                protected.discard(std::slice::from_ref(pages))?;
            }
        }
        drop(protected);
        self.note_discarded(inside, pages, are_over_pool);
        Ok(count)
    }

    fn note_discarded(&mut self, inside: &Entered<'_, B>, pages: &PageRange, were_over_pool: bool) {
        let id = inside.region.id();
        for page in pages.clone() {
            self.unshared_by_guest(id, page);
            self.items(id).set_state(page, PageState::Untracked);
        }
        if were_over_pool {
            // Last: a stable page's item names its pool page by the mapping under it.
            self.remap(id, pages, None);
            let mut block = block_of(pages.start, inside.backing().pages());
            let items = self.items(id);
            if !block.any(|page| items.in_pool_vma(page)) {
                items.set_base(pages.start, None);
            }
        }
        self.pages_discarded += u64::from(range_pages(pages));
    }
}
