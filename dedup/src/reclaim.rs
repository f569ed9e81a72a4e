//! Pool pages that nobody shares go back to the kernel.

use crate::backing::{Backing, Pool};
use crate::page::PoolPage;
use crate::scanner::Scanner;

/// Unused runs that one sweep gives back: some milliseconds at most.
const SWEEP_RUNS_MAX: usize = 64;

impl<B: Backing> Scanner<B> {
    /// Punches dead stable pages out of the pool.
    pub(crate) fn reclaim(&mut self) {
        for (first, pages) in self.stable.dead_runs() {
            self.punch(first, pages);
        }
        self.stable.reclaim();
    }

    /// Punches unused runs again, if the pool holds more than is in use.
    ///
    /// To punch a part of a huge page the kernel splits it, and if somebody looks at it just then it
    /// fills that part with zeros instead, keeps it, and says nothing (`mm/truncate.c`,
    /// `truncate_inode_partial_folio`). Asking what is there takes a microsecond a pass.
    pub(crate) fn sweep_pool(&mut self) {
        let allocated_pages = match self.pool.allocated_pages() {
            Ok(allocated_pages) => allocated_pages,
            Err(error) => {
                log::warn!("cannot tell how many pages the pool holds: {error}");
                return;
            }
        };
        if allocated_pages <= self.stable.shared_pages() {
            return;
        }
        let runs = self.stable.unused_runs(self.sweep_from, SWEEP_RUNS_MAX);
        self.sweep_from = match runs.get(SWEEP_RUNS_MAX - 1) {
            Some(&(first, _)) => first.plus(1),
            None => PoolPage(0),
        };
        for (first, pages) in runs {
            self.punch(first, pages);
        }
    }

    fn punch(&self, first: PoolPage, pages: u32) {
        if let Err(error) = self.pool.punch(first, pages) {
            // The pages stay allocated until a sweep: memory lost, nothing wrong.
            log::warn!(
                "cannot punch {pages} pages out of the pool at {}: {error}",
                first.0
            );
        }
    }
}
