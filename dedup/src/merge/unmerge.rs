//! Unmerge: every merged page becomes a private page again.
//!
//! The kernel's own copy-on-write does it (`MADV_POPULATE_WRITE`), so guests run on and nothing
//! needs protecting. The VMAs of the pool stay, with private pages in them; where there are many, or
//! pages of zeros between them, their block is built anew.

use std::io;

use crate::backing::Backing;
use crate::base::budget::{Reservation, Shortage, bytes_of};
use crate::base::page::{HUGE_PAGE_PAGES, PageRange, range_pages, runs};
use crate::index::layouts::block_of;
use crate::merge::domain::Scanner;
use crate::pages::region::Entered;
use crate::pages::region_items::Items;

/// Pages unshared between two looks at the exiting flag; each takes about 9 us.
pub(crate) const UNSHARE_PAGES: u32 = 64;

impl<B: Backing> Scanner<B> {
    /// Gives every merged page of a region its own copy. Ends early if the region is exiting.
    ///
    /// # Errors
    /// When a copy can't be had. Pages not unmerged by then stay merged and accounted for.
    pub(crate) fn unmerge_region(&mut self, inside: &Entered<'_, B>) -> io::Result<()> {
        let unmerged = self.unmerge_blocks(inside);
        // Also what was unmerged before it failed.
        self.publish_region(inside.region);
        unmerged
    }

    fn unmerge_blocks(&mut self, inside: &Entered<'_, B>) -> io::Result<()> {
        let id = inside.region.id();
        let pages = inside.backing().pages();
        for start in (0..pages).step_by(HUGE_PAGE_PAGES as usize) {
            if !self.items(id).knows_block(start) {
                continue;
            }
            let block = block_of(start, pages);
            self.unshare_all(inside, &block, Items::is_merged)?;
            for page in block.clone() {
                if self.items(id).state(page).is_private() {
                    self.note_private(id, page);
                }
            }
            self.give_mappings_back(inside, &block);
            // Those that are left would keep pages of the pool.
            self.unshare_all(inside, &block, Items::may_show_zeros)?;
            // Else the pool stays beside all copies, until the last region is done.
            self.reclaim();
        }
        Ok(())
    }

    /// Gives pages their own copies.
    fn unshare_all(
        &mut self,
        inside: &Entered<'_, B>,
        range: &PageRange,
        is_to_be: impl Fn(&Items, u32) -> bool,
    ) -> io::Result<()> {
        let items: &Items = self.items(inside.region.id());
        let pages: Vec<u32> = (range.clone())
            .filter(|&page| is_to_be(items, page))
            .collect();
        let is_next = |a: &u32, b: &u32| a + 1 == *b;
        for run in runs(&pages, UNSHARE_PAGES as usize, is_next) {
            if inside.is_exiting() {
                return Ok(());
            }
            self.unshare(inside, run[0]..run[run.len() - 1] + 1)?;
        }
        Ok(())
    }

    fn unshare(&mut self, inside: &Entered<'_, B>, range: PageRange) -> io::Result<()> {
        let id = inside.region.id();
        let Some(_reserved) = self.reserve_copies(inside, range_pages(&range))? else {
            return Ok(());
        };
        let unshared = inside.backing().unshare(range.clone());
        for page in range {
            if unshared.is_ok() {
                self.unshared_by_guest(id, page);
                self.note_private(id, page);
            } else if let Some(pending) = self.pending(id) {
                // How many got their copy before it failed, the pages themselves will tell.
                pending.insert(page);
            }
        }
        unshared
    }

    /// Reserves memory for private copies of `pages` pages, and may wait for it: what the exit of
    /// a region gives back feeds it. `None` when that is the region in hand.
    fn reserve_copies(
        &mut self,
        inside: &Entered<'_, B>,
        pages: u32,
    ) -> Result<Option<Reservation>, Shortage> {
        if !self.budget.has_room(bytes_of(pages)) {
            // What has lost its last sharer so far.
            self.reclaim();
        }
        match self.budget.reserve(bytes_of(pages), || inside.is_exiting()) {
            Err(Shortage::Cancelled) if inside.is_exiting() => Ok(None),
            reserved => reserved.map(Some),
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
