//! Which pages of the pool are free. Pure bookkeeping.

use std::collections::BTreeMap;

use crate::page::{HUGE_PAGE_PAGES, PoolPage};

/// Free extents by their first page, and where the never-used rest begins.
#[derive(Debug)]
pub(crate) struct PoolMap {
    free: BTreeMap<u32, u32>,
    unused_from: u32,
    /// Highest that `unused_from` ever was.
    used_below: u32,
    pages_max: u32,
}

impl PoolMap {
    pub(crate) fn new(pages_max: u32) -> PoolMap {
        PoolMap {
            free: BTreeMap::new(),
            unused_from: 0,
            used_below: 0,
            pages_max,
        }
    }

    /// Takes up to `pages` consecutive pages: the first extent that holds them all, else the
    /// never-used rest, else the largest extent there is. `None` when the pool is full.
    ///
    /// Runs stay runs: a scattered pool would cost one VMA for each page of every later sharer. A
    /// run of a huge page's length begins where a huge page can.
    pub(crate) fn take_run(&mut self, pages: u32) -> Option<(PoolPage, u32)> {
        let align_pages = if pages < HUGE_PAGE_PAGES {
            1
        } else {
            HUGE_PAGE_PAGES
        };
        let aligned = |first: u32| first.next_multiple_of(align_pages);
        let holds = |&(first, end): &(u32, u32)| end.saturating_sub(aligned(first)) >= pages;
        let extents = self.free.iter().map(|(&first, &len)| (first, first + len));
        if let Some((first, _)) = extents.clone().find(holds) {
            return Some(self.take_from_extent(first, aligned(first), pages));
        }
        if holds(&(self.unused_from, self.pages_max)) {
            let start = aligned(self.unused_from);
            if start > self.unused_from {
                self.free.insert(self.unused_from, start - self.unused_from);
            }
            self.use_up_to(start + pages);
            return Some((PoolPage(start), pages));
        }
        let rest = self.pages_max - self.unused_from;
        let largest = extents.max_by_key(|(first, end)| end - first);
        match largest.map(|(first, end)| (first, (end - first).min(pages))) {
            Some((first, len)) if len >= rest.min(pages) => {
                Some(self.take_from_extent(first, first, len))
            }
            _ if rest > 0 => {
                let (first, len) = (self.unused_from, rest.min(pages));
                self.use_up_to(first + len);
                Some((PoolPage(first), len))
            }
            _ => None,
        }
    }

    fn use_up_to(&mut self, end: u32) {
        self.unused_from = end;
        self.used_below = self.used_below.max(end);
    }

    /// Where the pages begin that were never handed out.
    pub(crate) fn used_below(&self) -> u32 {
        self.used_below
    }

    fn take_from_extent(&mut self, first: u32, start: u32, pages: u32) -> (PoolPage, u32) {
        let end = first + self.free.remove(&first).unwrap_or(0);
        if start > first {
            self.free.insert(first, start - first);
        }
        if end > start + pages {
            self.free.insert(start + pages, end - start - pages);
        }
        (PoolPage(start), pages)
    }

    /// Returns a page.
    pub(crate) fn give_back(&mut self, page: PoolPage) {
        let mut first = page.0;
        let mut len = 1;
        if let Some(after) = self.free.remove(&(first + 1)) {
            len += after;
        }
        if let Some((&before, &before_len)) = self.free.range(..first).next_back()
            && before + before_len == first
        {
            first = before;
            len += before_len;
        }
        if first + len == self.unused_from {
            self.free.remove(&first);
            self.unused_from = first;
        } else {
            self.free.insert(first, len);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_run_of_a_huge_pages_length_begins_where_a_huge_page_can() {
        let mut map = PoolMap::new(4 * HUGE_PAGE_PAGES);
        assert_eq!(map.take_run(10), Some((PoolPage(0), 10)));
        let huge = Some((PoolPage(HUGE_PAGE_PAGES), HUGE_PAGE_PAGES));
        assert_eq!(map.take_run(HUGE_PAGE_PAGES), huge);
        assert_eq!(
            map.take_run(20),
            Some((PoolPage(10), 20)),
            "the gap is not lost"
        );
        let first = PoolPage(2 * HUGE_PAGE_PAGES);
        assert_eq!(map.take_run(1), Some((PoolPage(30), 1)));
        assert_eq!(
            map.take_run(HUGE_PAGE_PAGES),
            Some((first, HUGE_PAGE_PAGES))
        );
        (0..HUGE_PAGE_PAGES).for_each(|page| map.give_back(PoolPage(HUGE_PAGE_PAGES + page)));
        assert_eq!(
            map.take_run(HUGE_PAGE_PAGES),
            huge,
            "out of a larger extent"
        );
    }

    #[test]
    fn a_pool_without_room_for_a_huge_page_gives_the_longest_run_it_has() {
        let mut map = PoolMap::new(HUGE_PAGE_PAGES + 100);
        assert_eq!(map.take_run(1), Some((PoolPage(0), 1)));
        let rest = Some((PoolPage(1), HUGE_PAGE_PAGES));
        assert_eq!(map.take_run(HUGE_PAGE_PAGES), rest);
    }

    proptest! {
        #[test]
        fn no_page_is_handed_out_twice_and_all_come_back(
            steps in proptest::collection::vec((any::<bool>(), 1..9u32, any::<usize>()), 1..120)
        ) {
            let mut map = PoolMap::new(64);
            let mut taken = BTreeSet::new();
            for (take, pages, pick) in steps {
                if take {
                    match map.take_run(pages) {
                        Some((first, len)) => {
                            prop_assert!(len <= pages);
                            for page in first.0..first.0 + len {
                                prop_assert!(page < 64 && taken.insert(page));
                            }
                        }
                        None => prop_assert_eq!(taken.len(), 64),
                    }
                } else if !taken.is_empty() {
                    let page = *taken.iter().nth(pick % taken.len()).unwrap();
                    taken.remove(&page);
                    map.give_back(PoolPage(page));
                }
            }
            prop_assert!(taken.last().is_none_or(|&last| last < map.used_below()));
            for page in taken {
                map.give_back(PoolPage(page));
            }
            prop_assert_eq!(map.take_run(64), Some((PoolPage(0), 64)));
        }
    }
}
