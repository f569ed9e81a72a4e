//! What the protocol asks of the worker's state, as a trait: the scanner behind it in production,
//! a few lines in the models.

use std::io;
use std::sync::Arc as StdArc;

use crate::backing::Backing;
use crate::base::budget::Budget;
use crate::base::complaints::complain;
use crate::base::page::{HUGE_PAGE_PAGES, PageRange, range_pages};
use crate::base::stats::Stats;
use crate::base::sync::Arc;
use crate::merge::domain::Scanner;
use crate::pages::region::{Entered, Region, RegionId};

/// Pages between two looks at the exiting flag and at `run`. Windows lie as huge pages do, so that
/// each is judged as a whole.
const WINDOW_PAGES: u32 = HUGE_PAGE_PAGES;

/// The window that begins at `start`, in a region of `pages` pages.
pub(crate) fn window_from(start: u32, pages: u32) -> PageRange {
    start..pages.min((start / WINDOW_PAGES + 1).saturating_mul(WINDOW_PAGES))
}

/// What a step came to.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Visited {
    /// Pages visited.
    pub(crate) pages: u32,
    /// Where to go on in the same region; `None` when it is done for this pass.
    pub(crate) next: Option<u32>,
}

/// What a batch came to.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Batch {
    /// Passes that ended in it.
    pub(crate) passes: u64,
    /// State changes seen in the passes that ended.
    pub(crate) changes: u64,
    /// Pages visited.
    pub(crate) pages: u64,
    /// Pages that a pass has to visit, as far as it is known.
    pub(crate) due_pages: u64,
}

/// What the worker mutex guards.
pub(crate) trait Work: std::fmt::Debug {
    /// A region's memory.
    type Memory: std::fmt::Debug;

    /// Gives back all of a region's memory. Called by its exit, with no lock held and perhaps while
    /// the worker is inside.
    fn free_all(memory: &Self::Memory);

    /// Begins to follow a region's pages, if the worker has not met it yet.
    fn attach(&mut self, region: &Arc<Region<Self::Memory>>);

    /// Whether the worker has met a region.
    fn is_attached(&self, id: RegionId) -> bool;

    /// Forgets a region, whose memory is not touched any more.
    fn detach(&mut self, id: RegionId);

    /// Visits an attached region's window at `page`.
    fn visit(&mut self, inside: &Entered<'_, Self::Memory>, page: u32) -> Visited;

    /// Gives every merged page of an attached region its own copy; ends early if it is exiting.
    ///
    /// # Errors
    /// When a copy can't be had. Pages not unmerged by then stay merged and accounted for.
    fn unmerge(&mut self, inside: &Entered<'_, Self::Memory>) -> io::Result<()>;

    /// Gives up pages of one block of an attached region. Returns how many: all or none.
    ///
    /// # Errors
    /// When the kernel refuses. All is as it was then.
    fn discard(&mut self, inside: &Entered<'_, Self::Memory>, pages: &PageRange)
    -> io::Result<u32>;

    /// Told before a batch whether somebody waits for passes, and whether memory is short.
    fn set_hurried(&mut self, hurried: bool, is_short: bool);

    /// Pages that a pass has to visit, as far as it is known.
    fn due_pages(&self) -> u64;

    /// What may be allocated.
    fn budget(&self) -> StdArc<Budget>;

    /// Gives back stable pages that nobody shares any more.
    fn reclaim(&mut self);

    /// Ends a pass over all regions. Returns the state changes seen in it.
    fn end_pass(&mut self) -> u64;

    /// Starts anew, once nothing is merged any more.
    fn start_over(&mut self);

    /// Counters of the domain, `slots` left for the caller to fill in.
    fn stats(&self) -> Stats;
}

impl<B: Backing + std::fmt::Debug> Work for Scanner<B> {
    type Memory = B;

    fn free_all(memory: &B) {
        memory.free_all();
    }

    fn attach(&mut self, region: &Arc<Region<B>>) {
        Scanner::attach(self, region);
    }

    fn is_attached(&self, id: RegionId) -> bool {
        self.region(id).is_some()
    }

    fn detach(&mut self, id: RegionId) {
        Scanner::detach(self, id);
    }

    fn visit(&mut self, inside: &Entered<'_, B>, page: u32) -> Visited {
        let (id, pages) = (inside.region.id(), inside.backing().pages());
        if page == 0 {
            self.begin_region(inside);
        }
        let start = self.next_to_visit(id, page).unwrap_or(pages);
        let window = window_from(start, pages);
        let end = window.end;
        let full_pages = range_pages(&window);
        let visited = self.scan_window(inside, window).unwrap_or_else(|error| {
            complain!(Warn, "cannot scan region {}: {error}", id.0);
            full_pages
        });
        Visited {
            pages: visited,
            next: (end < pages).then_some(end),
        }
    }

    fn unmerge(&mut self, inside: &Entered<'_, B>) -> io::Result<()> {
        self.unmerge_region(inside)
    }

    fn discard(&mut self, inside: &Entered<'_, B>, pages: &PageRange) -> io::Result<u32> {
        Scanner::discard(self, inside, pages)
    }

    fn set_hurried(&mut self, hurried: bool, is_short: bool) {
        self.hurried = hurried;
        self.is_short = is_short;
    }

    fn due_pages(&self) -> u64 {
        Scanner::due_pages(self)
    }

    fn budget(&self) -> StdArc<Budget> {
        StdArc::clone(&self.budget)
    }

    fn reclaim(&mut self) {
        Scanner::reclaim(self);
    }

    fn end_pass(&mut self) -> u64 {
        Scanner::end_pass(self);
        std::mem::take(&mut self.changes)
    }

    fn start_over(&mut self) {
        self.reclaim_kept(usize::MAX);
        self.unstable.forget_all();
        self.full_scans = 0;
    }

    fn stats(&self) -> Stats {
        Scanner::stats(self)
    }
}
