//! Which pages of the pool are free. Pure bookkeeping.

use std::collections::BTreeMap;

use crate::page::PoolPage;

/// Free extents by their first page, and where the never-used rest begins.
#[derive(Debug)]
pub(crate) struct PoolMap {
    free: BTreeMap<u32, u32>,
    unused_from: u32,
    pages_max: u32,
}

impl PoolMap {
    pub(crate) fn new(pages_max: u32) -> PoolMap {
        PoolMap {
            free: BTreeMap::new(),
            unused_from: 0,
            pages_max,
        }
    }

    /// Takes up to `pages` consecutive pages: the first extent that holds them all, else the
    /// never-used rest, else the largest extent there is. `None` when the pool is full.
    ///
    /// Runs stay runs: a scattered pool would cost one VMA for each page of every later sharer.
    pub(crate) fn take_run(&mut self, pages: u32) -> Option<(PoolPage, u32)> {
        let fitting = self
            .free
            .iter()
            .find(|&(_, &len)| len >= pages)
            .map(|(&first, _)| first);
        if let Some(first) = fitting {
            return Some(self.take_from_extent(first, pages));
        }
        if self.pages_max - self.unused_from >= pages {
            let first = self.unused_from;
            self.unused_from += pages;
            return Some((PoolPage(first), pages));
        }
        let rest = self.pages_max - self.unused_from;
        let largest = self.free.iter().max_by_key(|&(_, &len)| len);
        match largest.map(|(&first, &len)| (first, len)) {
            Some((first, len)) if len >= rest => Some(self.take_from_extent(first, len)),
            _ if rest > 0 => {
                let first = self.unused_from;
                self.unused_from = self.pages_max;
                Some((PoolPage(first), rest))
            }
            _ => None,
        }
    }

    fn take_from_extent(&mut self, first: u32, pages: u32) -> (PoolPage, u32) {
        let len = self.free.remove(&first).unwrap_or(0);
        if len > pages {
            self.free.insert(first + pages, len - pages);
        }
        (PoolPage(first), pages)
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
            for page in taken {
                map.give_back(PoolPage(page));
            }
            prop_assert_eq!(map.take_run(64), Some((PoolPage(0), 64)));
        }
    }
}
