//! Layouts: which places of the pool stand for which pages of guests. Pure bookkeeping.
//!
//! A layout has one *place* in the pool for each guest page number. It is kept in *blocks* of 512
//! places, which begin where a huge page can. VMs of one image hold the same content at the same
//! page number, so a region whose block is mapped to a layout's block as a whole shares a page by
//! dropping its own copy of it. That takes no mapping and no VMA.
//!
//! A domain has as many layouts as its images need. They are not told apart as wholes: each guest
//! block number has a list of blocks, and a region uses whichever suits its block. Two images with
//! one kernel then share the blocks of the kernel.

use std::collections::{BTreeSet, HashMap};

use crate::base::page::{HUGE_PAGE_PAGES, PageRange, PoolPage};
use crate::pages::item::POOL_PAGES_MAX;

/// Blocks that the pool has room for.
const BLOCKS_MAX: u32 = POOL_PAGES_MAX / HUGE_PAGE_PAGES;

/// One block of places.
#[derive(Clone, Copy, Debug)]
struct Block {
    /// The guest block that it stands for.
    number: u32,
    /// Places that hold something, or are about to.
    taken_pages: u32,
    /// Guest pages that are mapped to its places, written over or not.
    mapped_pages: u64,
}

/// The blocks of places of one domain.
#[derive(Debug, Default)]
pub(crate) struct Layouts {
    /// By place in the pool.
    blocks: Vec<Option<Block>>,
    free: BTreeSet<u32>,
    by_number: HashMap<u32, Vec<PoolPage>>,
}

/// The block of a region that a page lies in, whole or not.
pub(crate) fn block_number(page: u32) -> u32 {
    page / HUGE_PAGE_PAGES
}

/// The place of a guest page in a block that begins at `first`.
pub(crate) fn place_in(first: PoolPage, page: u32) -> PoolPage {
    first.plus(page % HUGE_PAGE_PAGES)
}

/// The pages of a region of `pages` pages that lie in one block with `page`.
pub(crate) fn block_of(page: u32, pages: u32) -> PageRange {
    let start = page / HUGE_PAGE_PAGES * HUGE_PAGE_PAGES;
    start..pages.min(start.saturating_add(HUGE_PAGE_PAGES))
}

fn index_of(place: PoolPage) -> usize {
    (place.0 / HUGE_PAGE_PAGES) as usize
}

impl Layouts {
    /// The first places of the blocks that stand for a guest block, the oldest first.
    pub(crate) fn blocks_of(&self, number: u32) -> &[PoolPage] {
        self.by_number.get(&number).map_or(&[], Vec::as_slice)
    }

    /// Where the places end that were ever handed out.
    pub(crate) fn end(&self) -> PoolPage {
        let blocks = u32::try_from(self.blocks.len()).unwrap_or(BLOCKS_MAX);
        PoolPage(blocks * HUGE_PAGE_PAGES)
    }

    /// Whether a place belongs to a layout.
    pub(crate) fn has(&self, place: PoolPage) -> bool {
        matches!(self.blocks.get(index_of(place)), Some(Some(_)))
    }

    /// The guest page that a place stands for, if it belongs to a layout.
    pub(crate) fn guest_page(&self, place: PoolPage) -> Option<u32> {
        let block = (*self.blocks.get(index_of(place))?)?;
        Some(block.number * HUGE_PAGE_PAGES + place.0 % HUGE_PAGE_PAGES)
    }

    /// Whether the block that begins at `first` is there and has a place for a guest page.
    pub(crate) fn stands_for(&self, first: PoolPage, page: u32) -> bool {
        self.guest_page(place_in(first, page)) == Some(page)
    }

    /// Adds a block for a guest block; `None` when the pool is full. It goes again as soon as
    /// nothing of it is taken or mapped.
    pub(crate) fn add(&mut self, number: u32) -> Option<PoolPage> {
        let index = match self.free.pop_first() {
            Some(index) => index,
            None => {
                let index = u32::try_from(self.blocks.len()).ok();
                let index = index.filter(|&index| index < BLOCKS_MAX)?;
                self.blocks.push(None);
                index
            }
        };
        let block = Block {
            number,
            taken_pages: 0,
            mapped_pages: 0,
        };
        self.blocks[index as usize] = Some(block);
        let first = PoolPage(index * HUGE_PAGE_PAGES);
        self.by_number.entry(number).or_default().push(first);
        Some(first)
    }

    /// A place is taken.
    pub(crate) fn take(&mut self, place: PoolPage) {
        self.change(place, |block| block.taken_pages += 1);
    }

    /// A place holds nothing any more.
    pub(crate) fn give_back(&mut self, place: PoolPage) {
        self.change(place, |block| block.taken_pages -= 1);
    }

    /// A guest page is mapped to a place.
    pub(crate) fn map(&mut self, place: PoolPage) {
        self.change(place, |block| block.mapped_pages += 1);
    }

    /// A guest page is not mapped to a place any more.
    pub(crate) fn unmap(&mut self, place: PoolPage) {
        self.change(place, |block| block.mapped_pages -= 1);
    }

    /// Frees a block that was added, if it turned out not to be needed.
    pub(crate) fn drop_if_unused(&mut self, first: PoolPage) {
        if self.has(first) {
            self.change(first, |_| {});
        }
    }

    fn change(&mut self, place: PoolPage, change: impl FnOnce(&mut Block)) {
        let index = index_of(place);
        let Some(Some(block)) = self.blocks.get_mut(index) else {
            debug_assert!(false, "place {} is in no block", place.0);
            return;
        };
        change(block);
        if block.taken_pages > 0 || block.mapped_pages > 0 {
            return;
        }
        let number = block.number;
        self.blocks[index] = None;
        let first = PoolPage(place.0 / HUGE_PAGE_PAGES * HUGE_PAGE_PAGES);
        if let Some(blocks) = self.by_number.get_mut(&number) {
            blocks.retain(|&block| block != first);
            if blocks.is_empty() {
                self.by_number.remove(&number);
            }
        }
        self.free.insert(first.0 / HUGE_PAGE_PAGES);
        while let Some(&last) = self.free.last()
            && last as usize + 1 == self.blocks.len()
        {
            self.free.pop_last();
            self.blocks.pop();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_block_goes_with_its_last_content_and_its_last_mapping() {
        let mut layouts = Layouts::default();
        let first = layouts.add(7).expect("the pool is empty");
        let other = layouts.add(7).expect("there is room");
        assert_eq!(layouts.blocks_of(7), [first, other]);
        assert_eq!(first.0 % HUGE_PAGE_PAGES, 0);
        layouts.take(first.plus(3));
        layouts.map(first.plus(3));
        layouts.give_back(first.plus(3));
        assert!(layouts.has(first.plus(500)));
        layouts.unmap(first.plus(3));
        assert!(!layouts.has(first));
        assert_eq!(layouts.blocks_of(7), [other]);
        layouts.drop_if_unused(other);
        assert_eq!(layouts.blocks_of(7), []);
        assert_eq!(layouts.end(), PoolPage(0), "all of the pool is free");
    }

    proptest! {
        #[test]
        fn no_two_blocks_have_a_place_in_common(
            steps in proptest::collection::vec((any::<bool>(), 0..4u32, any::<usize>()), 1..120)
        ) {
            let mut layouts = Layouts::default();
            let mut held: Vec<(u32, PoolPage)> = Vec::new();
            for (adds, number, pick) in steps {
                if adds || held.is_empty() {
                    let first = layouts.add(number).expect("the pool is large");
                    prop_assert!(held.iter().all(|&(_, other)| other != first));
                    layouts.map(first.plus(5));
                    held.push((number, first));
                } else {
                    let (_, first) = held.swap_remove(pick % held.len());
                    layouts.unmap(first.plus(5));
                }
                for number in 0..4 {
                    let wanted = held.iter().filter(|&&(of, _)| of == number).count();
                    prop_assert_eq!(layouts.blocks_of(number).len(), wanted);
                }
            }
            for (_, first) in held {
                layouts.unmap(first.plus(5));
            }
            prop_assert_eq!(layouts.end(), PoolPage(0));
        }
    }
}
