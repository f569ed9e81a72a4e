//! Pool pages that nobody shares go back to the kernel.

use crate::backing::{Backing, Pool};
use crate::base::complaints::complain;
use crate::base::page::PoolPage;
use crate::index::prehashed::RegionMap;
use crate::merge::domain::{Attached, Scanner};

/// Unused runs that one sweep gives back: some milliseconds at most.
const SWEEP_RUNS_MAX: usize = 64;

/// Kept places that one sweep looks at: each is sought in all regions.
const SWEEP_PLACES_MAX: usize = 256;

/// Whether anybody's page `page` lies over its place and may show zeros there. Blocks are based on
/// places of their own number only, so there are no others.
fn shows_zeros<B>(attached: &RegionMap<Attached<B>>, place: PoolPage, page: u32) -> bool {
    attached.values().map(|it| &it.items).any(|items| {
        items.knows_block(page)
            && items.pool_page_under(page) == Some(place)
            && items.may_show_zeros(page)
    })
}

impl<B: Backing> Scanner<B> {
    /// Punches dead stable pages out of the pool.
    pub(crate) fn reclaim(&mut self) {
        let attached = &self.attached;
        let dead = (self.stable).take_dead(|place, page| shows_zeros(attached, place, page));
        self.punch(&dead);
    }

    /// Punches kept places over which nobody shows zeros any more, of the next `places_max`.
    pub(crate) fn reclaim_kept(&mut self, places_max: usize) {
        let attached = &self.attached;
        let shows_zeros = |place, page| shows_zeros(attached, place, page);
        let free = self.stable.take_kept(places_max, shows_zeros);
        self.punch(&free);
    }

    /// Punches unused runs again, if the pool holds more than is in use.
    ///
    /// To punch a part of a huge page the kernel splits it, and if somebody looks at it just then it
    /// fills that part with zeros instead, keeps it, and says nothing (`mm/truncate.c`,
    /// `truncate_inode_partial_folio`). Asking what is there takes a microsecond a pass.
    pub(crate) fn sweep_pool(&mut self) {
        self.reclaim_kept(SWEEP_PLACES_MAX);
        let allocated_pages = match self.pool.allocated_pages() {
            Ok(allocated_pages) => allocated_pages,
            Err(error) => {
                complain!(Warn, "cannot tell how many pages the pool holds: {error}");
                return;
            }
        };
        if allocated_pages <= self.stable.pool_pages() {
            return;
        }
        let attached = &self.attached;
        let shows_zeros = |place, page| shows_zeros(attached, place, page);
        let runs = (self.stable).unused_runs(self.sweep_from, SWEEP_RUNS_MAX, shows_zeros);
        self.sweep_from = match runs.get(SWEEP_RUNS_MAX - 1) {
            Some(&(first, _)) => first.plus(1),
            None => PoolPage(0),
        };
        self.punch(&runs);
    }

    fn punch(&self, runs: &[(PoolPage, u32)]) {
        for &(first, pages) in runs {
            if let Err(error) = self.pool.punch(first, pages) {
                // The pages stay allocated until a sweep: memory lost, nothing wrong.
                let first = first.0;
                complain!(
                    Warn,
                    "cannot punch {pages} pages out of the pool at {first}: {error}"
                );
            }
        }
    }
}
