//! A region's items: one per page, with the counts that the statistics need kept beside them.

use crate::backoff::{Backoff, Interval};
use crate::item::{Item, PageState};
use crate::page::{PageRange, PoolPage};

/// How many pages of a region are in each state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct StateCounts {
    pub(crate) volatile_pages: u32,
    pub(crate) unshared_pages: u32,
    pub(crate) zero_pages: u32,
    pub(crate) stable_pages: u32,
}

impl StateCounts {
    fn of(&mut self, state: PageState) -> Option<&mut u32> {
        match state {
            PageState::Untracked => None,
            PageState::Volatile { .. } => Some(&mut self.volatile_pages),
            PageState::Unshared { .. } => Some(&mut self.unshared_pages),
            PageState::Zero => Some(&mut self.zero_pages),
            PageState::Stable(_) => Some(&mut self.stable_pages),
        }
    }
}

/// The items of one region. Only the holder of the worker mutex touches them.
#[derive(Debug)]
pub(crate) struct Items {
    items: Vec<Item>,
    counts: StateCounts,
    vmas: u32,
    /// When state changes happen.
    pub(crate) now: Interval,
    /// Intervals that a merge must last.
    pub(crate) worth: u16,
}

impl Items {
    /// No page seen yet; the region is one VMA.
    pub(crate) fn new(pages: u32) -> Items {
        let mut items = vec![Item::default(); pages as usize];
        if let Some(first) = items.first_mut() {
            *first = first.with_vma_start(true);
        }
        Items {
            items,
            counts: StateCounts::default(),
            vmas: 1,
            now: Interval::default(),
            worth: 0,
        }
    }

    pub(crate) fn counts(&self) -> StateCounts {
        self.counts
    }

    /// VMAs that the region takes at most (the kernel may have merged some of them).
    pub(crate) fn vmas(&self) -> u32 {
        self.vmas
    }

    /// Pages of the region.
    pub(crate) fn pages(&self) -> u32 {
        u32::try_from(self.items.len()).unwrap_or(u32::MAX)
    }

    pub(crate) fn metadata_bytes(&self) -> u64 {
        (self.items.len() * size_of::<Item>()) as u64
    }

    pub(crate) fn state(&self, page: u32) -> PageState {
        self.items[page as usize].state()
    }

    pub(crate) fn in_pool_vma(&self, page: u32) -> bool {
        self.pool_page_under(page).is_some()
    }

    /// The page of the pool that a page is mapped to, written over or not.
    pub(crate) fn pool_page_under(&self, page: u32) -> Option<PoolPage> {
        self.items[page as usize].pool_page_under()
    }

    /// The page of the pool that is to be tried first for a page that lies over none.
    pub(crate) fn hint(&self, page: u32) -> Option<PoolPage> {
        self.items[page as usize].hint()
    }

    pub(crate) fn set_hint(&mut self, page: u32, hint: PoolPage) {
        let item = &mut self.items[page as usize];
        *item = item.with_hint(hint);
    }

    /// Whether any page of the range lies in a mapping of the pool.
    pub(crate) fn any_in_pool_vma(&self, range: &PageRange) -> bool {
        self.items[range.start as usize..range.end as usize]
            .iter()
            .any(|item| item.pool_page_under().is_some())
    }

    pub(crate) fn set_state(&mut self, page: u32, state: PageState) {
        let item = &mut self.items[page as usize];
        if let Some(count) = self.counts.of(item.state()) {
            *count -= 1;
        }
        if let Some(count) = self.counts.of(state) {
            *count += 1;
        }
        *item = item.with_state_at(state, self.now, self.worth);
    }

    pub(crate) fn backoff(&self, page: u32) -> Backoff {
        self.items[page as usize].backoff()
    }

    pub(crate) fn set_backoff(&mut self, page: u32, backoff: Backoff) {
        let item = &mut self.items[page as usize];
        *item = item.with_backoff(backoff);
    }

    /// VMAs that begin in a range.
    pub(crate) fn vmas_in(&self, range: &PageRange) -> u32 {
        let items = &self.items[range.start as usize..range.end as usize];
        count(items, |item| item.starts_vma())
    }

    /// Pages of a range that are mapped to a stable page.
    pub(crate) fn stable_in(&self, range: &PageRange) -> u32 {
        let items = &self.items[range.start as usize..range.end as usize];
        count(items, |item| matches!(item.state(), PageState::Stable(_)))
    }

    /// VMAs that the region would take more if `range` were mapped anew as one (may be negative).
    pub(crate) fn vmas_added_by_remap(&self, range: &PageRange) -> i64 {
        let starts = |page: u32| self.items.get(page as usize).map(|item| item.starts_vma());
        let inside = (range.start..range.end)
            .filter(|&page| starts(page) == Some(true))
            .count();
        let after = i64::from(starts(range.end) == Some(false));
        1 + after - i64::try_from(inside).unwrap_or(i64::MAX)
    }

    /// Records that `range` is now one mapping of its own, of the pool from `first` on, or of none.
    pub(crate) fn remap(&mut self, range: &PageRange, first: Option<PoolPage>) {
        let added = self.vmas_added_by_remap(range);
        for page in range.start..range.end {
            let item = &mut self.items[page as usize];
            let under = first.map(|first| first.plus(page - range.start));
            *item = item
                .with_pool_page(under)
                .with_vma_start(page == range.start);
        }
        if let Some(next) = self.items.get_mut(range.end as usize) {
            *next = next.with_vma_start(true);
        }
        self.vmas = u32::try_from(i64::from(self.vmas) + added).unwrap_or(0);
    }

    /// Pages that are mapped to a stable page, with that page.
    pub(crate) fn stable(&self) -> impl Iterator<Item = (u32, PoolPage)> {
        (0u32..)
            .zip(&self.items)
            .filter_map(|(page, item)| match item.state() {
                PageState::Stable(pool_page) => Some((page, pool_page)),
                _ => None,
            })
    }

    /// Whether the page was merged by the engine: shared, or dropped as zero.
    pub(crate) fn is_merged(&self, page: u32) -> bool {
        matches!(self.state(page), PageState::Stable(_) | PageState::Zero)
    }
}

fn count(items: &[Item], is_it: impl Fn(Item) -> bool) -> u32 {
    u32::try_from(items.iter().filter(|&&item| is_it(item)).count()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGES: u32 = 64;

    proptest! {
        #[test]
        fn counts_and_vmas_equal_a_recount(
            steps in proptest::collection::vec((0..PAGES, 1..8u32, 0..5u8, any::<bool>()), 1..200)
        ) {
            let mut items = Items::new(PAGES);
            for (page, len, kind, pool) in steps {
                let state = match kind {
                    0 => PageState::Untracked,
                    1 => PageState::Volatile { checksum: page },
                    2 => PageState::Unshared { checksum: page },
                    3 => PageState::Zero,
                    _ => PageState::Stable(PoolPage(page)),
                };
                items.set_state(page, state);
                items.remap(&(page..(page + len).min(PAGES)), pool.then_some(PoolPage(page)));
            }
            let count = |wanted: fn(PageState) -> bool| {
                u32::try_from((0..PAGES).filter(|&page| wanted(items.state(page))).count()).unwrap()
            };
            let counts = items.counts();
            prop_assert_eq!(counts.stable_pages, count(|s| matches!(s, PageState::Stable(_))));
            prop_assert_eq!(counts.zero_pages, count(|s| s == PageState::Zero));
            prop_assert_eq!(counts.volatile_pages, count(|s| matches!(s, PageState::Volatile { .. })));
            prop_assert_eq!(counts.unshared_pages, count(|s| matches!(s, PageState::Unshared { .. })));
            let starts = items.items.iter().filter(|item| item.starts_vma()).count();
            prop_assert_eq!(items.vmas() as usize, starts);
            prop_assert_eq!(items.stable().count(), counts.stable_pages as usize);
        }
    }
}
