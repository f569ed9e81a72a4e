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
use crate::base::page::{PageRange, range_pages};
use crate::index::layouts::block_of;
use crate::merge::domain::Scanner;
use crate::merge::protected::Protected;
use crate::pages::item::PageState;
use crate::pages::region::Entered;

impl<B: Backing> Scanner<B> {
    /// Gives up pages of one block: they show zeros afterwards and take no memory. Returns how many;
    /// pinned ones are left as they are, and what is left to do when the region exits.
    ///
    /// # Errors
    /// When the kernel refuses. Pages before the one that it refused are given up.
    pub(crate) fn discard(
        &mut self,
        inside: &Entered<'_, B>,
        pages: &PageRange,
    ) -> io::Result<u32> {
        if *pages != block_of(pages.start, inside.backing().pages()) {
            self.split_if_huge(inside, pages.start);
        }
        let discarded = self.discard_runs(inside, pages);
        self.reclaim();
        self.publish_region(inside.region);
        discarded
    }

    fn discard_runs(&mut self, inside: &Entered<'_, B>, pages: &PageRange) -> io::Result<u32> {
        let id = inside.region.id();
        let mut discarded = 0;
        let mut next = pages.start;
        while next < pages.end && !inside.is_exiting() {
            let items = self.items(id);
            let is_over_pool = items.in_pool_vma(next);
            let is_other = |&page: &u32| items.in_pool_vma(page) != is_over_pool;
            let end = (next..pages.end).find(is_other).unwrap_or(pages.end);
            discarded += self.discard_run(inside, &(next..end))?;
            next = end;
        }
        Ok(discarded)
    }

    /// Gives up pages that all lie over the pool, or all over nothing.
    fn discard_run(&mut self, inside: &Entered<'_, B>, run: &PageRange) -> io::Result<u32> {
        let id = inside.region.id();
        let added = self.items(id).vmas_added_by_remap(run);
        let pages = range_pages(run);
        if self.items(id).in_pool_vma(run.start)
            && !self.takes_vmas(added, pages)
            && !self.base(inside, run.start, None, 0)?
        {
            return Ok(0);
        }
        let is_over_pool = self.items(id).in_pool_vma(run.start);
        let staging = match is_over_pool {
            true => Some(inside.backing().stage(&self.pool, run.clone(), None)?),
            false => None,
        };
        let mut protected = Protected::new(inside, run.clone())?;
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
                protected.discard(std::slice::from_ref(run))?;
            }
        }
        drop(protected);
        self.note_discarded(inside, run, is_over_pool);
        Ok(pages)
    }

    fn note_discarded(&mut self, inside: &Entered<'_, B>, run: &PageRange, was_over_pool: bool) {
        let id = inside.region.id();
        for page in run.clone() {
            self.unshared_by_guest(id, page);
            self.items(id).set_state(page, PageState::Untracked);
        }
        // Last: a stable page's item names its pool page by the mapping under it.
        if was_over_pool {
            self.remap(id, run, None);
        }
        if was_over_pool && *run == block_of(run.start, inside.backing().pages()) {
            self.items(id).set_base(run.start, None);
        }
        self.pages_discarded += u64::from(range_pages(run));
    }
}
