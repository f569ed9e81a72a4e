//! Stable pages: content that is shared, found by fingerprint, counted by sharers.

use std::collections::BTreeSet;

use hashbrown::HashTable;

use crate::base::page::PoolPage;
use crate::index::fingerprint::Fingerprint;
use crate::index::layouts::Layouts;

/// Pages for which room is made at least when the pool grows.
const GROWTH_PAGES_MIN: usize = 1024;

/// What one entry of the ordered index takes, in nodes that are three quarters full.
const REPEATED_BYTES: usize = 24;

/// What an entry of the set of kept places takes.
const KEPT_BYTES: usize = 8;

/// In place of a count of sharers: a place that never held anything. It costs no memory in the pool.
const EMPTY: u32 = u32::MAX;

/// A place that holds nothing any more. It was punched, or is kept.
const BARE: u32 = u32::MAX - 1;

/// The stable pages of one domain: KSM's stable tree, as a hash index. Each lies at a place of a
/// layout. One content may lie at several places: a page for each of them, once in a domain, is
/// less than a mapping for each page of each guest.
///
/// Kept small, because it counts against what is saved: 12 bytes for a place, and 5 for a stable
/// page's entry in the index, which names the place and finds the fingerprint there.
#[derive(Debug, Default)]
pub(crate) struct StablePages {
    /// By place; meaningless where there are no sharers and none are expected.
    fingerprints: Vec<Fingerprint>,
    /// Guest pages that are mapped to each place, [`EMPTY`], [`BARE`], or 0 for a place that is about
    /// to hold something or to be emptied.
    sharers_of: Vec<u32>,
    /// One stable page of each content.
    by_fingerprint: HashTable<PoolPage>,
    /// The other ones, by fingerprint: thousands may hold the same, which would make the entries of
    /// a hash index one long chain.
    repeated: BTreeSet<(u64, PoolPage)>,
    /// Which guest pages the places stand for, and who is mapped there.
    pub(crate) layouts: Layouts,
    /// Where the places begin that never held anything.
    used_below: PoolPage,
    /// Pages that lost their last sharer and wait to be punched out of the pool.
    dead: Vec<PoolPage>,
    /// Bare places that were not punched, because a guest page may show zeros there. Punching takes
    /// the kernel's zero page away from all who are mapped there (`mm/memory.c`, `zap_present_ptes`),
    /// and what is filled into the place later would show to them.
    kept: BTreeSet<PoolPage>,
    /// Where the next look at some of them begins.
    kept_from: PoolPage,
    shared_pages: u64,
    sharers: u64,
}

impl StablePages {
    /// Stable pages in use (`pages_shared`).
    pub(crate) fn shared_pages(&self) -> u64 {
        self.shared_pages
    }

    /// Guest pages that are mapped to a stable page (`pages_shared + pages_sharing`).
    pub(crate) fn sharers(&self) -> u64 {
        self.sharers
    }

    /// Pages of the pool that nobody shares, kept for the sake of guest pages of zeros.
    pub(crate) fn kept_pages(&self) -> u64 {
        self.kept.len() as u64
    }

    /// Pages that take memory in the pool.
    pub(crate) fn pool_pages(&self) -> u64 {
        self.shared_pages + self.kept_pages()
    }

    pub(crate) fn metadata_bytes(&self) -> u64 {
        let index = self.by_fingerprint.allocation_size();
        let repeated = self.repeated.len() * REPEATED_BYTES + self.kept.len() * KEPT_BYTES;
        (self.fingerprints.capacity() * size_of::<Fingerprint>()
            + self.sharers_of.capacity() * size_of::<u32>()
            + index
            + repeated) as u64
    }

    /// A stable page of this fingerprint.
    pub(crate) fn find(&self, fingerprint: Fingerprint) -> Option<PoolPage> {
        let is_it = |&page: &PoolPage| self.fingerprints[page.0 as usize] == fingerprint;
        self.by_fingerprint.find(fingerprint.0, is_it).copied()
    }

    /// What a stable page is found by; `None` where nothing is stable.
    pub(crate) fn fingerprint(&self, page: PoolPage) -> Option<Fingerprint> {
        (self.sharers_of(page) > 0).then(|| self.fingerprints[page.0 as usize])
    }

    /// Guest pages that share a page; none if nothing is stable there.
    pub(crate) fn sharers_of(&self, page: PoolPage) -> u32 {
        match self.sharers_of.get(page.0 as usize) {
            Some(&sharers) if sharers < BARE => sharers,
            _ => 0,
        }
    }

    /// Whether a place could be filled.
    pub(crate) fn is_empty(&self, place: PoolPage) -> bool {
        let held = self.sharers_of.get(place.0 as usize);
        self.layouts.has(place) && matches!(held, None | Some(&(EMPTY | BARE)))
    }

    /// Takes an empty place, to be [`StablePages::insert`]ed or [`StablePages::abandon`]ed. False
    /// if it is not empty.
    pub(crate) fn claim(&mut self, place: PoolPage) -> bool {
        if !self.is_empty(place) {
            return false;
        }
        self.grow(place.0 as usize + 1);
        self.sharers_of[place.0 as usize] = 0;
        self.kept.remove(&place);
        self.used_below = self.used_below.max(place.plus(1));
        self.layouts.take(place);
        true
    }

    /// Makes room for places below `end`, by an eighth at a time: doubling would leave up to half of
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
        self.sharers_of.resize(end, EMPTY);
    }

    /// Makes a claimed place a stable page, without sharers yet.
    pub(crate) fn insert(&mut self, page: PoolPage, fingerprint: Fingerprint) {
        self.fingerprints[page.0 as usize] = fingerprint;
        if self.find(fingerprint).is_some() {
            self.repeated.insert((fingerprint.0, page));
        } else {
            self.index(page, fingerprint);
        }
        self.shared_pages += 1;
    }

    fn index(&mut self, page: PoolPage, fingerprint: Fingerprint) {
        let fingerprints = &self.fingerprints;
        let hash = |page: &PoolPage| fingerprints[page.0 as usize].0;
        self.by_fingerprint.insert_unique(fingerprint.0, page, hash);
    }

    fn forget(&mut self, page: PoolPage) {
        let fingerprint = self.fingerprints[page.0 as usize];
        let is_it = |&indexed: &PoolPage| indexed == page;
        let Ok(entry) = self.by_fingerprint.find_entry(fingerprint.0, is_it) else {
            self.repeated.remove(&(fingerprint.0, page));
            return;
        };
        entry.remove();
        let same = (fingerprint.0, PoolPage(0))..=(fingerprint.0, PoolPage(u32::MAX));
        if let Some(&next) = self.repeated.range(same).next() {
            self.repeated.remove(&next);
            self.index(next.1, fingerprint);
        }
    }

    /// Gives a claimed place back to be punched: it never became stable.
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
        debug_assert!(
            *sharers > 0 && *sharers < BARE,
            "pool page {} has no sharer to drop",
            page.0
        );
        *sharers -= 1;
        self.sharers -= 1;
        if *sharers > 0 {
            return;
        }
        self.forget(page);
        self.shared_pages -= 1;
        self.dead.push(page);
    }

    /// Makes the places of dead pages empty, and returns them as runs, to be punched. Where
    /// `shows_zeros` tells that a guest page may show zeros there, the content is kept.
    pub(crate) fn take_dead(
        &mut self,
        shows_zeros: impl Fn(PoolPage, u32) -> bool,
    ) -> Vec<(PoolPage, u32)> {
        let mut dead = std::mem::take(&mut self.dead);
        dead.sort_unstable();
        dead.retain(|&place| {
            let is_kept = self.is_under_zeros(place, &shows_zeros);
            self.sharers_of[place.0 as usize] = BARE;
            self.layouts.give_back(place);
            if is_kept {
                self.kept.insert(place);
            }
            !is_kept
        });
        if self.shared_pages == 0 {
            self.by_fingerprint = HashTable::new();
        }
        self.forget_places();
        as_runs(&dead)
    }

    /// Looks at up to `places_max` kept places, going on where the last look ended. Returns those over
    /// which no guest page shows zeros any more, to be punched.
    pub(crate) fn take_kept(
        &mut self,
        places_max: usize,
        shows_zeros: impl Fn(PoolPage, u32) -> bool,
    ) -> Vec<(PoolPage, u32)> {
        let kept = self.kept.range(self.kept_from..);
        let kept = kept.chain(self.kept.range(..self.kept_from));
        let mut free: Vec<PoolPage> = kept.take(places_max).copied().collect();
        self.kept_from = free.last().map_or(PoolPage(0), |last| last.plus(1));
        free.sort_unstable();
        free.retain(|&place| !self.is_under_zeros(place, &shows_zeros));
        for place in &free {
            self.kept.remove(place);
        }
        self.forget_places();
        as_runs(&free)
    }

    fn is_under_zeros(
        &self,
        place: PoolPage,
        shows_zeros: &impl Fn(PoolPage, u32) -> bool,
    ) -> bool {
        let guest_page = self.layouts.guest_page(place);
        guest_page.is_some_and(|guest_page| shows_zeros(place, guest_page))
    }

    fn forget_places(&mut self) {
        if self.layouts.end() == PoolPage(0) {
            self.fingerprints = Vec::new();
            self.sharers_of = Vec::new();
        }
    }

    /// Up to `runs_max` runs of places from `from` on that hold nothing, to be punched again. Not those
    /// over which a guest page may show zeros.
    pub(crate) fn unused_runs(
        &self,
        from: PoolPage,
        runs_max: usize,
        shows_zeros: impl Fn(PoolPage, u32) -> bool,
    ) -> Vec<(PoolPage, u32)> {
        let mut found: Vec<(PoolPage, u32)> = Vec::new();
        for place in (from.0..self.used_below.0).map(PoolPage) {
            let is_bare = self.sharers_of.get(place.0 as usize) == Some(&BARE);
            let is_unused = (is_bare || !self.layouts.has(place))
                && !self.kept.contains(&place)
                && !self.is_under_zeros(place, &shows_zeros);
            if !is_unused {
                continue;
            }
            if let Some((first, len)) = found.last_mut()
                && first.plus(*len) == place
            {
                *len += 1;
            } else if found.len() < runs_max {
                found.push((place, 1));
            } else {
                break;
            }
        }
        found
    }
}

/// Ascending places as runs.
fn as_runs(places: &[PoolPage]) -> Vec<(PoolPage, u32)> {
    crate::base::page::runs(places, usize::MAX, |a, b| a.plus(1) == *b)
        .map(|run| (run[0], u32::try_from(run.len()).unwrap_or(u32::MAX)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::page::HUGE_PAGE_PAGES;

    fn with_block() -> (StablePages, PoolPage) {
        let mut stable = StablePages::default();
        let first = stable.layouts.add(0).expect("the pool is empty");
        (stable, first)
    }

    fn fill(stable: &mut StablePages, place: PoolPage, fingerprint: u64) {
        assert!(stable.claim(place));
        stable.insert(place, Fingerprint(fingerprint));
        stable.add_sharer(place);
    }

    #[test]
    fn a_page_dies_with_its_last_sharer_and_its_place_is_filled_again() {
        let (mut stable, first) = with_block();
        let place = first.plus(9);
        fill(&mut stable, place, 42);
        stable.add_sharer(place);
        assert_eq!((stable.shared_pages(), stable.sharers()), (1, 2));
        assert!(!stable.claim(place), "it is taken");
        stable.drop_sharer(place);
        assert_eq!(stable.find(Fingerprint(42)), Some(place));
        stable.drop_sharer(place);
        assert_eq!(stable.find(Fingerprint(42)), None);
        assert!(!stable.claim(place), "it is not punched yet");
        stable.layouts.map(place);
        assert_eq!(stable.take_dead(|_, _| false), [(place, 1)]);
        assert!(stable.claim(place));
        stable.abandon(place);
        assert_eq!(stable.take_dead(|_, _| false), [(place, 1)]);
        assert!(stable.is_empty(place), "a page is still mapped there");
        stable.layouts.unmap(place);
        assert!(!stable.is_empty(place), "the block is gone");
    }

    #[test]
    fn a_content_is_found_for_as_long_as_one_place_holds_it() {
        let (mut stable, first) = with_block();
        let places: Vec<PoolPage> = (0..50).map(|page| first.plus(page)).collect();
        places.iter().for_each(|&place| fill(&mut stable, place, 7));
        let mut left = places.clone();
        while let Some(found) = stable.find(Fingerprint(7)) {
            assert!(left.contains(&found));
            left.retain(|&place| place != found);
            stable.drop_sharer(found);
        }
        assert!(left.is_empty(), "{left:?}");
        assert_eq!(stable.take_dead(|_, _| false), [(first, 50)]);
        assert_eq!(stable.metadata_bytes(), 0);
    }

    #[test]
    fn a_place_under_zeros_is_punched_when_nobody_shows_them_any_more() {
        let (mut stable, first) = with_block();
        (0..HUGE_PAGE_PAGES).for_each(|page| stable.layouts.map(first.plus(page)));
        for offset in [0, 3, 4, 6] {
            fill(&mut stable, first.plus(offset), u64::from(offset));
        }
        for offset in [0, 3, 4] {
            stable.drop_sharer(first.plus(offset));
        }
        let zeros = |_: PoolPage, page: u32| page == 0 || page == 4;
        assert_eq!(stable.take_dead(zeros), [(first.plus(3), 1)]);
        assert_eq!((stable.shared_pages(), stable.pool_pages()), (1, 3));
        assert_eq!(stable.unused_runs(first, 9, zeros), [(first.plus(3), 1)]);
        assert_eq!(stable.take_kept(9, zeros), []);
        assert!(stable.claim(first), "it is filled anew");
        assert_eq!(stable.pool_pages(), 2);
        let none = |_: PoolPage, _: u32| false;
        assert_eq!(stable.take_kept(9, none), [(first.plus(4), 1)]);
        assert_eq!(stable.pool_pages(), 1);
        assert_eq!(stable.unused_runs(first, 9, none), [(first.plus(3), 2)]);
    }

    #[test]
    fn kept_places_are_looked_at_in_turns() {
        let (mut stable, first) = with_block();
        (0..HUGE_PAGE_PAGES).for_each(|page| stable.layouts.map(first.plus(page)));
        for offset in 0..6 {
            fill(&mut stable, first.plus(offset), u64::from(offset));
            stable.drop_sharer(first.plus(offset));
        }
        assert_eq!(stable.take_dead(|_, _| true), []);
        let last = |_: PoolPage, page: u32| page != 5;
        assert_eq!(stable.take_kept(4, last), []);
        assert_eq!(stable.take_kept(4, last), [(first.plus(5), 1)]);
        let none = |_: PoolPage, _: u32| false;
        let runs = [(first, 1), (first.plus(2), 3)];
        assert_eq!(stable.take_kept(4, none), runs);
        assert_eq!(stable.take_kept(4, none), [(first.plus(1), 1)]);
        assert_eq!(stable.kept_pages(), 0);
    }

    #[test]
    fn dead_pages_are_punched_as_runs() {
        let (mut stable, first) = with_block();
        for offset in [2, 0, 3] {
            assert!(stable.claim(first.plus(offset)));
            stable.abandon(first.plus(offset));
        }
        let runs = stable.take_dead(|_, _| false);
        assert_eq!(runs, [(first, 1), (first.plus(2), 2)]);
    }
}
