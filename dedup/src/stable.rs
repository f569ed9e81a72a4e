//! Stable pages: content that is shared, found by fingerprint, counted by sharers.

use std::collections::HashMap;

use crate::fingerprint::Fingerprint;
use crate::item::POOL_PAGES_MAX;
use crate::page::PoolPage;
use crate::pool_map::PoolMap;

#[derive(Clone, Copy, Debug)]
struct StablePage {
    fingerprint: Fingerprint,
    sharers: u32,
}

const UNUSED: StablePage = StablePage {
    fingerprint: Fingerprint(0),
    sharers: 0,
};

/// The stable pages of one domain: KSM's stable tree, as a hash index.
///
/// Two different contents with one fingerprint cannot both be stable; the second stays unshared.
/// With 64 bits that is a loss of nothing, and never an error: bytes are compared before a merge.
#[derive(Debug)]
pub(crate) struct StablePages {
    pages: Vec<StablePage>,
    by_fingerprint: HashMap<Fingerprint, PoolPage>,
    map: PoolMap,
    /// Pages that lost their last sharer and wait to be punched out of the pool.
    dead: Vec<PoolPage>,
    shared_pages: u64,
    sharers: u64,
}

impl StablePages {
    pub(crate) fn new() -> StablePages {
        StablePages {
            pages: Vec::new(),
            by_fingerprint: HashMap::new(),
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
        let entry = size_of::<(Fingerprint, PoolPage)>() + 1;
        (self.pages.capacity() * size_of::<StablePage>() + self.by_fingerprint.capacity() * entry)
            as u64
    }

    pub(crate) fn find(&self, fingerprint: Fingerprint) -> Option<PoolPage> {
        self.by_fingerprint.get(&fingerprint).copied()
    }

    pub(crate) fn fingerprint(&self, page: PoolPage) -> Fingerprint {
        self.pages[page.0 as usize].fingerprint
    }

    pub(crate) fn sharers_of(&self, page: PoolPage) -> u32 {
        self.pages[page.0 as usize].sharers
    }

    /// Takes up to `pages` consecutive free pages of the pool, to be [`StablePages::insert`]ed or
    /// [`StablePages::abandon`]ed one by one.
    pub(crate) fn take_run(&mut self, pages: u32) -> Option<(PoolPage, u32)> {
        let (first, len) = self.map.take_run(pages)?;
        let end = first.0 as usize + len as usize;
        if self.pages.len() < end {
            self.pages.resize(end, UNUSED);
        }
        Some((first, len))
    }

    /// Makes a taken page stable, without sharers yet.
    pub(crate) fn insert(&mut self, page: PoolPage, fingerprint: Fingerprint) {
        self.pages[page.0 as usize] = StablePage {
            fingerprint,
            sharers: 0,
        };
        self.by_fingerprint.insert(fingerprint, page);
        self.shared_pages += 1;
    }

    /// Gives a taken page back to be punched: it never became stable.
    pub(crate) fn abandon(&mut self, page: PoolPage) {
        self.dead.push(page);
    }

    pub(crate) fn add_sharer(&mut self, page: PoolPage) {
        self.pages[page.0 as usize].sharers += 1;
        self.sharers += 1;
    }

    /// Takes one sharer off; the page dies with its last one.
    pub(crate) fn drop_sharer(&mut self, page: PoolPage) {
        let stable = &mut self.pages[page.0 as usize];
        debug_assert!(
            stable.sharers > 0,
            "pool page {} has no sharer to drop",
            page.0
        );
        stable.sharers -= 1;
        self.sharers -= 1;
        self.drop_if_unused(page);
    }

    /// Lets a stable page die that no region shares (its first sharers failed to be mapped).
    pub(crate) fn drop_if_unused(&mut self, page: PoolPage) {
        let stable = self.pages[page.0 as usize];
        if stable.sharers == 0 {
            self.by_fingerprint.remove(&stable.fingerprint);
            self.pages[page.0 as usize] = UNUSED;
            self.shared_pages -= 1;
            self.dead.push(page);
        }
    }

    /// Dead pages as runs, for the caller to punch and then to [`StablePages::reclaim`].
    pub(crate) fn dead_runs(&mut self) -> Vec<(PoolPage, u32)> {
        self.dead.sort_unstable();
        crate::page::runs(&self.dead, usize::MAX, |a, b| a.plus(1) == *b)
            .map(|run| (run[0], u32::try_from(run.len()).unwrap_or(u32::MAX)))
            .collect()
    }

    /// Makes the dead pages free for new content.
    pub(crate) fn reclaim(&mut self) {
        for page in self.dead.drain(..) {
            self.map.give_back(page);
        }
        if self.shared_pages == 0 {
            self.pages = Vec::new();
            self.by_fingerprint.shrink_to_fit();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
