//! Unmerge: every merged page becomes a private page again.
//!
//! The kernel's own copy-on-write does it (`MADV_POPULATE_WRITE`), so guests run on and nothing
//! needs protecting. The VMAs of the pool stay, with private pages in them; where there are many,
//! they are healed.

use std::io;

use crate::backing::Backing;
use crate::budget::{Reservation, Shortage, bytes_of};
use crate::item::PageState;
use crate::page::{HUGE_PAGE_PAGES, PageRange};
use crate::region::{Entered, RegionId};
use crate::scanner::Scanner;

/// Pages unshared between two looks at the exiting flag; each takes about 9 us.
const UNSHARE_PAGES: u32 = 64;

impl<B: Backing> Scanner<B> {
    /// Gives every merged page of a region its own copy. Ends early if the region is exiting.
    ///
    /// # Errors
    /// When a copy can't be had. Pages not unmerged by then stay merged and accounted for.
    pub(crate) fn unmerge_region(&mut self, inside: &Entered<'_, B>) -> io::Result<()> {
        let pages = inside.backing().pages();
        for start in (0..pages).step_by(UNSHARE_PAGES as usize) {
            if inside.is_exiting() {
                return Ok(());
            }
            let window = start..pages.min(start.saturating_add(UNSHARE_PAGES));
            self.unmerge_window(inside, window)?;
        }
        for block in (0..pages).step_by(HUGE_PAGE_PAGES as usize) {
            self.heal(inside, block);
        }
        self.publish_region(inside.region);
        Ok(())
    }

    fn unmerge_window(&mut self, inside: &Entered<'_, B>, window: PageRange) -> io::Result<()> {
        let id = inside.region.id();
        let mut next = window.start;
        while next < window.end {
            let items = self.items(id);
            let start = next;
            let merged = items.is_merged(start);
            while next < window.end && items.is_merged(next) == merged {
                next += 1;
            }
            if merged {
                let Some(_reserved) = self.reserve_copies(inside, next - start)? else {
                    return Ok(());
                };
                let unshared = inside.backing().unshare(start..next);
                // How many got their copy before it failed, the pages themselves will tell.
                if unshared.is_err() {
                    let pending = self.pending(id).into_iter();
                    pending.for_each(|pending| (start..next).for_each(|page| pending.insert(page)));
                }
                unshared?;
            }
            for page in start..next {
                self.forget_page(id, page);
            }
        }
        Ok(())
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

    fn forget_page(&mut self, id: RegionId, page: u32) {
        if let PageState::Stable(pool_page) = self.items(id).state(page) {
            self.stable.drop_sharer(pool_page);
        }
        self.items(id).set_state(page, PageState::Untracked);
        self.pending(id)
            .into_iter()
            .for_each(|pending| pending.insert(page));
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
