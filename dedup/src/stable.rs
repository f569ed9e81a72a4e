//! Stable pages: content that is shared, found by fingerprint, counted by sharers.

use hashbrown::HashTable;

use crate::fingerprint::Fingerprint;
use crate::item::POOL_PAGES_MAX;
use crate::page::PoolPage;
use crate::pool_map::PoolMap;

/// Pages for which room is made at least when the pool grows.
const GROWTH_PAGES_MIN: usize = 1024;

/// In place of a count of sharers: a *hole*. It is taken, holds nothing, and costs no memory in the
/// pool. Pages that lie over it are their guests' own; the first to become stable takes it.
const HOLE: u32 = u32::MAX;

/// The stable pages of one domain: KSM's stable tree, as a hash index.
///
/// Two different contents with one fingerprint cannot both be stable; the second stays unshared.
/// With 64 bits that is a loss of nothing, and never an error: bytes are compared before a merge.
///
/// Kept small, because it counts against what is saved: 12 bytes for a stable page, and 5 for its
/// entry in the index, which names the pool page and finds the fingerprint there.
#[derive(Debug)]
pub(crate) struct StablePages {
    /// By pool page; meaningless where there are no sharers and none are expected.
    fingerprints: Vec<Fingerprint>,
    /// Guest pages that are mapped to each pool page.
    sharers_of: Vec<u32>,
    by_fingerprint: HashTable<PoolPage>,
    map: PoolMap,
    /// Pages that lost their last sharer and wait to be punched out of the pool.
    dead: Vec<PoolPage>,
    shared_pages: u64,
    sharers: u64,
}

impl StablePages {
    pub(crate) fn new() -> StablePages {
        StablePages {
            fingerprints: Vec::new(),
            sharers_of: Vec::new(),
            by_fingerprint: HashTable::new(),
            map: PoolMap::new(POOL_PAGES_MAX),
            dead: Vec::new(),
            shared_pages: 0,
            sharers: 0,
        }
    }

    /// Stable pages in use (`pages_shared`).
    pub(crate) fn shared_pages(&self) -> u64 {
        self.shared_pages
    }

    /// Guest pages that are mapped to a stable page (`pages_shared + pages_sharing`).
    pub(crate) fn sharers(&self) -> u64 {
        self.sharers
    }

    pub(crate) fn metadata_bytes(&self) -> u64 {
        let index = self.by_fingerprint.allocation_size();
        (self.fingerprints.capacity() * size_of::<Fingerprint>()
            + self.sharers_of.capacity() * size_of::<u32>()
            + index) as u64
    }

    pub(crate) fn find(&self, fingerprint: Fingerprint) -> Option<PoolPage> {
        let is_it = |&page: &PoolPage| self.fingerprint(page) == fingerprint;
        self.by_fingerprint.find(fingerprint.0, is_it).copied()
    }

    pub(crate) fn fingerprint(&self, page: PoolPage) -> Fingerprint {
        self.fingerprints[page.0 as usize]
    }

    /// Guest pages that share a page; none if nothing is stable there.
    pub(crate) fn sharers_of(&self, page: PoolPage) -> u32 {
        let sharers = self.sharers_of.get(page.0 as usize).copied();
        sharers.filter(|&sharers| sharers != HOLE).unwrap_or(0)
    }

    fn is_hole(&self, page: PoolPage) -> bool {
        self.sharers_of.get(page.0 as usize) == Some(&HOLE)
    }

    /// Leaves a taken page out: it keeps the distance between its neighbours for those who map all of
    /// them at once. It comes back when the stable pages next to it, or next to the other holes there,
    /// are gone. Both ends of a run that was taken must not be holes.
    pub(crate) fn leave_hole(&mut self, page: PoolPage) {
        self.sharers_of[page.0 as usize] = HOLE;
    }

    /// Takes a hole, to be [`StablePages::insert`]ed or [`StablePages::abandon`]ed. False if the page
    /// is none.
    pub(crate) fn claim_hole(&mut self, page: PoolPage) -> bool {
        let is_hole = self.is_hole(page);
        if is_hole {
            self.sharers_of[page.0 as usize] = 0;
        }
        is_hole
    }

    /// Gives back the holes that `pages`, neighbours in one direction, begin with, if there is no
    /// stable page behind them.
    fn free_holes(&mut self, pages: impl Iterator<Item = u32>) {
        let mut holes = Vec::new();
        for page in pages.map(PoolPage) {
            if self.is_hole(page) {
                holes.push(page);
            } else if self.sharers_of(page) > 0 {
                return;
            } else {
                break;
            }
        }
        for hole in holes {
            self.sharers_of[hole.0 as usize] = 0;
            self.map.give_back(hole);
        }
    }

    /// Takes up to `pages` consecutive free pages of the pool, to be [`StablePages::insert`]ed or
    /// [`StablePages::abandon`]ed one by one.
    pub(crate) fn take_run(&mut self, pages: u32) -> Option<(PoolPage, u32)> {
        let (first, len) = self.map.take_run(pages)?;
        let end = first.0 as usize + len as usize;
        self.grow(end);
        Some((first, len))
    }

    /// Makes room for pages below `end`, by an eighth at a time: doubling would leave up to half of
    /// the room unused, and it counts against what is saved.
    fn grow(&mut self, end: usize) {
        let len = self.fingerprints.len();
        if end <= len {
            return;
        }
        if end > self.fingerprints.capacity() {
            let more = (end - len).max(len / 8).max(GROWTH_PAGES_MIN);
            self.fingerprints.reserve_exact(more);
            self.sharers_of.reserve_exact(more);
        }
        self.fingerprints.resize(end, Fingerprint(0));
        self.sharers_of.resize(end, 0);
    }

    /// Makes a taken page stable, without sharers yet.
    pub(crate) fn insert(&mut self, page: PoolPage, fingerprint: Fingerprint) {
        self.fingerprints[page.0 as usize] = fingerprint;
        self.sharers_of[page.0 as usize] = 0;
        let fingerprints = &self.fingerprints;
        let hash = |page: &PoolPage| fingerprints[page.0 as usize].0;
        self.by_fingerprint.insert_unique(fingerprint.0, page, hash);
        self.shared_pages += 1;
    }

    /// Gives a taken page back to be punched: it never became stable.
    pub(crate) fn abandon(&mut self, page: PoolPage) {
        self.dead.push(page);
    }

    pub(crate) fn add_sharer(&mut self, page: PoolPage) {
        self.sharers_of[page.0 as usize] += 1;
        self.sharers += 1;
    }

    /// Takes one sharer off; the page dies with its last one.
    pub(crate) fn drop_sharer(&mut self, page: PoolPage) {
        let sharers = &mut self.sharers_of[page.0 as usize];
        debug_assert!(*sharers > 0, "pool page {} has no sharer to drop", page.0);
        *sharers -= 1;
        self.sharers -= 1;
        self.drop_if_unused(page);
    }

    fn drop_if_unused(&mut self, page: PoolPage) {
        if self.sharers_of(page) > 0 {
            return;
        }
        let fingerprint = self.fingerprint(page);
        if let Ok(entry) = self
            .by_fingerprint
            .find_entry(fingerprint.0, |&indexed| indexed == page)
        {
            entry.remove();
        }
        self.shared_pages -= 1;
        self.dead.push(page);
    }

    /// Dead pages as runs, for the caller to punch and then to [`StablePages::reclaim`].
    pub(crate) fn dead_runs(&mut self) -> Vec<(PoolPage, u32)> {
        self.dead.sort_unstable();
        crate::page::runs(&self.dead, usize::MAX, |a, b| a.plus(1) == *b)
            .map(|run| (run[0], u32::try_from(run.len()).unwrap_or(u32::MAX)))
            .collect()
    }

    /// Up to `runs_max` runs of pages that nobody shares, from `from` on, among those that were ever
    /// taken. Free pages and holes, if no page is taken that is yet to become stable.
    pub(crate) fn unused_runs(&self, from: PoolPage, runs_max: usize) -> Vec<(PoolPage, u32)> {
        let mut found: Vec<(PoolPage, u32)> = Vec::new();
        for page in (from.0..self.map.used_below()).map(PoolPage) {
            if self.sharers_of(page) > 0 {
                continue;
            }
            if let Some((first, len)) = found.last_mut()
                && first.plus(*len) == page
            {
                *len += 1;
            } else if found.len() < runs_max {
                found.push((page, 1));
            } else {
                break;
            }
        }
        found
    }

    /// Makes the dead pages free for new content.
    pub(crate) fn reclaim(&mut self) {
        for page in std::mem::take(&mut self.dead) {
            self.map.give_back(page);
            self.free_holes((0..page.0).rev());
            self.free_holes(page.0 + 1..POOL_PAGES_MAX);
        }
        if self.shared_pages == 0 {
            self.fingerprints = Vec::new();
            self.sharers_of = Vec::new();
            self.by_fingerprint = HashTable::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_page_dies_with_its_last_sharer_and_is_used_again() {
        let mut stable = StablePages::new();
        let (page, 1) = stable.take_run(1).unwrap() else {
            panic!("one page asked for")
        };
        stable.insert(page, Fingerprint(42));
        stable.add_sharer(page);
        stable.add_sharer(page);
        assert_eq!((stable.shared_pages(), stable.sharers()), (1, 2));
        stable.drop_sharer(page);
        assert_eq!(stable.find(Fingerprint(42)), Some(page));
        stable.drop_sharer(page);
        assert_eq!(stable.find(Fingerprint(42)), None);
        assert_eq!(stable.dead_runs(), [(page, 1)]);
        stable.reclaim();
        assert_eq!(stable.take_run(1), Some((page, 1)));
        assert_eq!((stable.shared_pages(), stable.sharers()), (0, 0));
    }

    proptest! {
        #[test]
        fn holes_come_back_with_the_last_stable_page_beside_them(
            runs in proptest::collection::vec(proptest::collection::vec(any::<bool>(), 0..9), 1..12),
            order in any::<u64>(),
        ) {
            let mut stable = StablePages::new();
            let mut inserted = Vec::new();
            for (name, middle) in (1..).zip(runs) {
                let is_page: Vec<bool> = [&[true], &middle[..], &[true]].concat();
                let pages = u32::try_from(is_page.len()).unwrap();
                let (first, _) = stable.take_run(pages).unwrap();
                for (page, is_page) in (first.0..).map(PoolPage).zip(is_page) {
                    if is_page {
                        stable.insert(page, Fingerprint(name << 32 | u64::from(page.0)));
                        stable.add_sharer(page);
                        inserted.push(page);
                    } else {
                        stable.leave_hole(page);
                        prop_assert_eq!(stable.sharers_of(page), 0);
                    }
                }
            }
            let mut order = order;
            while !inserted.is_empty() {
                order = order.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let at = usize::try_from(order >> 33).unwrap() % inserted.len();
                stable.drop_sharer(inserted.swap_remove(at));
                if order & 1 << 20 == 0 {
                    stable.reclaim();
                    let pages = u32::try_from(stable.sharers_of.len()).unwrap();
                    for page in (0..pages).map(PoolPage).filter(|&page| stable.is_hole(page)) {
                        let mut beside = (page.0..pages).map(PoolPage);
                        let next = beside.find(|&page| !stable.is_hole(page)).unwrap();
                        let mut beside = (0..page.0).rev().map(PoolPage);
                        let before = beside.find(|&page| !stable.is_hole(page)).unwrap();
                        prop_assert!(inserted.contains(&next) || inserted.contains(&before));
                    }
                }
            }
            stable.reclaim();
            prop_assert_eq!(stable.take_run(1000), Some((PoolPage(0), 1000)));
            prop_assert_eq!(stable.map.take_run(1), Some((PoolPage(1000), 1)));
        }
    }

    #[test]
    fn a_hole_is_claimed_once_and_dies_like_any_page() {
        let mut stable = StablePages::new();
        let (first, _) = stable.take_run(3).unwrap();
        for page in [first, first.plus(2)] {
            stable.insert(page, Fingerprint(u64::from(page.0)));
            stable.add_sharer(page);
        }
        let hole = first.plus(1);
        stable.leave_hole(hole);
        assert!(stable.claim_hole(hole));
        assert!(!stable.claim_hole(hole) && !stable.claim_hole(first));
        stable.insert(hole, Fingerprint(9));
        stable.add_sharer(hole);
        stable.drop_sharer(hole);
        assert_eq!(stable.dead_runs(), [(hole, 1)]);
        stable.reclaim();
        assert_eq!(stable.take_run(1), Some((hole, 1)));
    }

    #[test]
    fn unused_pages_are_free_ones_and_holes() {
        let mut stable = StablePages::new();
        let (first, _) = stable.take_run(8).unwrap();
        for offset in [0, 3, 4] {
            stable.insert(first.plus(offset), Fingerprint(u64::from(offset)));
            stable.add_sharer(first.plus(offset));
        }
        (1..3).for_each(|offset| stable.leave_hole(first.plus(offset)));
        (5..8).for_each(|offset| stable.abandon(first.plus(offset)));
        stable.reclaim();
        let runs = [(first.plus(1), 2), (first.plus(5), 3)];
        assert_eq!(stable.unused_runs(first, 9), runs);
        assert_eq!(stable.unused_runs(first, 1), runs[..1]);
        assert_eq!(stable.unused_runs(first.plus(3), 9), runs[1..]);
    }

    #[test]
    fn dead_pages_are_punched_as_runs() {
        let mut stable = StablePages::new();
        let (first, 4) = stable.take_run(4).unwrap() else {
            panic!("four pages asked for")
        };
        for offset in [2, 0, 3] {
            stable.abandon(first.plus(offset));
        }
        assert_eq!(stable.dead_runs(), [(first, 1), (first.plus(2), 2)]);
    }
}
