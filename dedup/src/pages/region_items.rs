//! A region's items: one per page, with the counts that the statistics need kept beside them.

use crate::base::page::{HUGE_PAGE_PAGES, PageRange, PoolPage};
use crate::pages::backoff::{Backoff, Interval};
use crate::pages::item::{Item, PageState};

/// How many pages of a region are in each state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct StateCounts {
    pub(crate) volatile_pages: u32,
    pub(crate) unshared_pages: u32,
    pub(crate) left_out_pages: u32,
    pub(crate) zero_pages: u32,
    pub(crate) stable_pages: u32,
}

impl StateCounts {
    fn of(&mut self, state: PageState) -> Option<&mut u32> {
        match state {
            PageState::Untracked | PageState::Private => None,
            PageState::Volatile { .. } | PageState::Dirty => Some(&mut self.volatile_pages),
            PageState::Unshared { .. } => Some(&mut self.unshared_pages),
            PageState::LeftOut { .. } => Some(&mut self.left_out_pages),
            PageState::Zero => Some(&mut self.zero_pages),
            PageState::Stable(_) => Some(&mut self.stable_pages),
        }
    }
}

/// The items of one block of 512 pages.
#[derive(Debug)]
struct Block {
    items: [Item; HUGE_PAGE_PAGES as usize],
    /// The block of places that the whole of it was mapped to last.
    base: Option<PoolPage>,
}

/// The items of one region. Only the holder of the worker mutex touches them. A block that nothing is
/// known of takes a pointer.
#[derive(Debug)]
pub(crate) struct Items {
    blocks: Vec<Option<Box<Block>>>,
    pages: u32,
    known_blocks: u32,
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
        let blocks = pages.div_ceil(HUGE_PAGE_PAGES) as usize;
        Items {
            blocks: std::iter::repeat_with(|| None).take(blocks).collect(),
            pages,
            known_blocks: 0,
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
        self.pages
    }

    pub(crate) fn metadata_bytes(&self) -> u64 {
        let known_bytes = self.known_blocks as usize * size_of::<Block>();
        (known_bytes + self.blocks.len() * size_of::<Option<Box<Block>>>()) as u64
    }

    fn block(&self, page: u32) -> Option<&Block> {
        self.blocks[(page / HUGE_PAGE_PAGES) as usize].as_deref()
    }

    /// Whether anything is known of the block that a page lies in.
    pub(crate) fn knows_block(&self, page: u32) -> bool {
        page < self.pages && self.block(page).is_some()
    }

    fn item(&self, page: u32) -> Item {
        assert!(page < self.pages, "page {page} of {}", self.pages);
        match self.block(page) {
            Some(block) => block.items[(page % HUGE_PAGE_PAGES) as usize],
            None => Item::default().with_vma_start(page == 0),
        }
    }

    fn item_mut(&mut self, page: u32) -> &mut Item {
        assert!(page < self.pages, "page {page} of {}", self.pages);
        let known_blocks = &mut self.known_blocks;
        let block = self.blocks[(page / HUGE_PAGE_PAGES) as usize].get_or_insert_with(|| {
            *known_blocks += 1;
            let mut items = [Item::default(); HUGE_PAGE_PAGES as usize];
            items[0] = items[0].with_vma_start(page < HUGE_PAGE_PAGES);
            Box::new(Block { items, base: None })
        });
        &mut block.items[(page % HUGE_PAGE_PAGES) as usize]
    }

    fn items_in(&self, range: &PageRange) -> impl Iterator<Item = Item> {
        range.clone().map(|page| self.item(page))
    }

    pub(crate) fn state(&self, page: u32) -> PageState {
        self.item(page).state()
    }

    /// The block of places that a page's block was based on last. It may be gone since, or another's.
    pub(crate) fn base(&self, page: u32) -> Option<PoolPage> {
        self.block(page)?.base
    }

    /// Records that a page's block is mapped to a block of places as a whole, or to none.
    pub(crate) fn set_base(&mut self, page: u32, base: Option<PoolPage>) {
        self.item_mut(page);
        if let Some(block) = &mut self.blocks[(page / HUGE_PAGE_PAGES) as usize] {
            block.base = base;
        }
    }

    pub(crate) fn in_pool_vma(&self, page: u32) -> bool {
        self.pool_page_under(page).is_some()
    }

    /// The page of the pool that a page is mapped to, written over or not.
    pub(crate) fn pool_page_under(&self, page: u32) -> Option<PoolPage> {
        self.item(page).pool_page_under()
    }

    /// Whether a page lies over a place and may show the kernel's zero page there, which goes when the
    /// place is punched.
    pub(crate) fn may_show_zeros(&self, page: u32) -> bool {
        self.in_pool_vma(page) && !self.state(page).is_private()
    }

    pub(crate) fn set_state(&mut self, page: u32, state: PageState) {
        let before = self.item(page).state();
        if (before, state) == (PageState::Untracked, PageState::Untracked) {
            return;
        }
        if let Some(count) = self.counts.of(before) {
            *count -= 1;
        }
        if let Some(count) = self.counts.of(state) {
            *count += 1;
        }
        let (now, worth) = (self.now, self.worth);
        let item = self.item_mut(page);
        *item = item.with_state_at(state, now, worth);
    }

    pub(crate) fn backoff(&self, page: u32) -> Backoff {
        self.item(page).backoff()
    }

    pub(crate) fn set_backoff(&mut self, page: u32, backoff: Backoff) {
        let item = self.item_mut(page);
        *item = item.with_backoff(backoff);
    }

    /// VMAs that begin in a range.
    pub(crate) fn vmas_in(&self, range: &PageRange) -> u32 {
        count(self.items_in(range), |item| item.starts_vma())
    }

    /// Pages of a range that are mapped to a stable page.
    pub(crate) fn stable_in(&self, range: &PageRange) -> u32 {
        count(self.items_in(range), |item| {
            matches!(item.state(), PageState::Stable(_))
        })
    }

    /// VMAs that the region would take more if `range` were mapped anew as one (may be negative).
    pub(crate) fn vmas_added_by_remap(&self, range: &PageRange) -> i64 {
        let after = range.end < self.pages && !self.item(range.end).starts_vma();
        1 + i64::from(after) - i64::from(self.vmas_in(range))
    }

    /// Records that `range` is now one mapping of its own, of the pool from `first` on, or of none.
    pub(crate) fn remap(&mut self, range: &PageRange, first: Option<PoolPage>) {
        let added = self.vmas_added_by_remap(range);
        for page in range.clone() {
            let under = first.map(|first| first.plus(page - range.start));
            let item = self.item_mut(page);
            *item = item
                .with_pool_page(under)
                .with_vma_start(page == range.start);
        }
        if range.end < self.pages {
            let next = self.item_mut(range.end);
            *next = next.with_vma_start(true);
        }
        self.vmas = u32::try_from(i64::from(self.vmas) + added).unwrap_or(0);
    }

    fn known_pages(&self) -> impl Iterator<Item = (u32, Item)> {
        let blocks = (0u32..).step_by(HUGE_PAGE_PAGES as usize).zip(&self.blocks);
        let known = blocks.filter_map(|(first, block)| Some((first, block.as_deref()?)));
        known.flat_map(|(first, block)| (first..self.pages).zip(block.items))
    }

    /// Pages that are mapped to a stable page, with that page.
    pub(crate) fn stable(&self) -> impl Iterator<Item = (u32, PoolPage)> {
        self.known_pages()
            .filter_map(|(page, item)| match item.state() {
                PageState::Stable(pool_page) => Some((page, pool_page)),
                _ => None,
            })
    }

    /// Pages that were left out for want of VMAs.
    pub(crate) fn left_out(&self) -> impl Iterator<Item = u32> {
        let is_left_out = |item: Item| matches!(item.state(), PageState::LeftOut { .. });
        self.known_pages()
            .filter_map(move |(page, item)| is_left_out(item).then_some(page))
    }

    /// Pages of the pool that pages are mapped to, written over or not.
    pub(crate) fn all_under(&self) -> impl Iterator<Item = PoolPage> {
        self.known_pages()
            .filter_map(|(_, item)| item.pool_page_under())
    }

    /// Whether the page was merged by the engine: shared, or dropped as zero.
    pub(crate) fn is_merged(&self, page: u32) -> bool {
        matches!(self.state(page), PageState::Stable(_) | PageState::Zero)
    }
}

fn count(items: impl Iterator<Item = Item>, is_it: impl Fn(Item) -> bool) -> u32 {
    u32::try_from(items.filter(|&item| is_it(item)).count()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Two blocks, the second of them not whole.
    const PAGES: u32 = HUGE_PAGE_PAGES + 64;

    proptest! {
        #[test]
        fn counts_and_vmas_equal_a_recount(
            steps in proptest::collection::vec((HUGE_PAGE_PAGES - 40..PAGES, 1..8u32, 0..6u8, any::<bool>()), 1..200)
        ) {
            let mut items = Items::new(PAGES);
            for (page, len, kind, pool) in steps {
                let state = match kind {
                    0 => PageState::Untracked,
                    1 => PageState::Volatile { checksum: page },
                    2 => PageState::Unshared { checksum: page },
                    3 => PageState::Zero,
                    4 => PageState::LeftOut { checksum: page },
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
            prop_assert_eq!(counts.left_out_pages, count(|s| matches!(s, PageState::LeftOut { .. })));
            prop_assert_eq!(items.vmas(), items.vmas_in(&(0..PAGES)));
            let under = (0..PAGES).filter(|&page| items.in_pool_vma(page)).count();
            prop_assert_eq!(items.all_under().count(), under);
            prop_assert_eq!(items.stable().count(), counts.stable_pages as usize);
        }
    }

    #[test]
    fn pages_that_nothing_is_known_of_take_next_to_no_memory() {
        let mut items = Items::new(1 << 28);
        assert!(items.metadata_bytes() <= 4 << 20, "1 TiB");
        items.set_state(77, PageState::Untracked);
        assert!(!items.knows_block(77));
        items.set_state(1000, PageState::Zero);
        assert!(items.knows_block(513) && !items.knows_block(511) && !items.knows_block(1024));
    }
}
