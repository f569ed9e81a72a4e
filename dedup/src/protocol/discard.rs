//! Discard: what a region's owner gives up, on the owner's thread and in turns with the worker.

use crate::base::page::PageRange;
use crate::pages::pins::AccessError;
use crate::pages::region::RegionRef;
use crate::protocol::core::Shared;
use crate::protocol::scan_state::{Work, window_from};

impl<W: Work> Shared<W> {
    /// Gives up pages of a region, a window at a time: the worker, an unmerge or an exit wait for one
    /// at most. Returns how many.
    ///
    /// # Errors
    /// When the region is exiting or the kernel refuses. Pages before those are given up.
    pub(crate) fn discard(
        &self,
        region: &RegionRef<W::Memory>,
        pages: &PageRange,
    ) -> Result<u32, AccessError> {
        let mut discarded = 0;
        let mut next = pages.start;
        while next < pages.end {
            let window = window_from(next, pages.end);
            let mut scanner = self.lock_scanner_in_turn();
            let done = self.take_turn(&mut scanner, region, |scanner, inside| {
                scanner.discard(inside, &window)
            });
            self.publish(&scanner);
            discarded += done.ok_or(AccessError::Exiting)??;
            next = window.end;
        }
        Ok(discarded)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::backing::fake::{FakeMemory, FakePool};
    use crate::base::pace::Pace;
    use crate::base::sync;
    use crate::merge::domain::Scanner;
    use crate::protocol::control::{Control, Run};

    #[test]
    fn a_region_that_was_left_gives_up_nothing() {
        let pool = FakePool::default();
        let scanner = Scanner::new(pool.clone(), 1000);
        let shared = Shared::new(scanner, Control::new(Run::Merge, Pace::default()));
        let region = shared.register(FakeMemory::new(8, &pool), None);
        shared.exit(&region);
        let discarded = shared.discard(&region, &(0..8));
        assert!(matches!(discarded, Err(AccessError::Exiting)));
        assert_eq!(sync::lock(&region.stats).items, 0);
    }
}
