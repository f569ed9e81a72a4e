//! What changed since the last look: sets of pages, and who can tell.

use std::fmt::Debug;
use std::io;

use crate::base::page::PageRange;
use crate::pages::item::PageState;
use crate::pages::region_items::Items;

const WORD_BITS: u32 = u64::BITS;

/// A set of pages of one region: one bit for each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
    pages: u32,
}

impl PageSet {
    /// An empty set for a region of `pages` pages.
    pub fn new(pages: u32) -> PageSet {
        PageSet {
            words: vec![0; pages.div_ceil(WORD_BITS) as usize],
            pages,
        }
    }

    /// Number of pages of the region.
    pub fn pages(&self) -> u32 {
        self.pages
    }

    /// Adds a page; one past the region's end is left out.
    pub fn insert(&mut self, page: u32) {
        if page < self.pages {
            self.words[(page / WORD_BITS) as usize] |= 1 << (page % WORD_BITS);
        }
    }

    /// Adds every page whose bit is set in `words`, the first of which stands for page `first`,
    /// a multiple of 64. Bits past the region's end are left out.
    ///
    /// # Panics
    /// If `first` is not a multiple of 64.
    pub fn insert_words(&mut self, first: u32, words: &[u64]) {
        assert!(
            first.is_multiple_of(WORD_BITS),
            "page {first} does not begin a word"
        );
        let from = (first / WORD_BITS) as usize;
        for (mine, theirs) in self.words.iter_mut().skip(from).zip(words) {
            *mine |= theirs;
        }
        self.clear_tail();
    }

    /// Adds every page of the region.
    pub fn insert_all(&mut self) {
        self.words.fill(u64::MAX);
        self.clear_tail();
    }

    /// Takes a page out.
    pub fn remove(&mut self, page: u32) {
        if page < self.pages {
            self.words[(page / WORD_BITS) as usize] &= !(1 << (page % WORD_BITS));
        }
    }

    /// Takes out every page of another set of the same region.
    pub fn remove_all(&mut self, others: &PageSet) {
        for (mine, theirs) in self.words.iter_mut().zip(&others.words) {
            *mine &= !theirs;
        }
    }

    /// 64 pages of the set from page `first` on, a bit for each. Past the region's end there are
    /// none.
    ///
    /// # Panics
    /// If `first` is not a multiple of 64.
    pub fn word_from(&self, first: u32) -> u64 {
        assert!(
            first.is_multiple_of(WORD_BITS),
            "page {first} does not begin a word"
        );
        let word = self.words.get((first / WORD_BITS) as usize);
        word.copied().unwrap_or(0)
    }

    /// Whether the page is in the set.
    pub fn contains(&self, page: u32) -> bool {
        page < self.pages && self.words[(page / WORD_BITS) as usize] >> (page % WORD_BITS) & 1 == 1
    }

    /// The first page of the set from `page` on.
    pub fn next_from(&self, page: u32) -> Option<u32> {
        if page >= self.pages {
            return None;
        }
        let mut index = page / WORD_BITS;
        let mut word = self.words[index as usize] & u64::MAX << (page % WORD_BITS);
        while word == 0 {
            index += 1;
            word = *self.words.get(index as usize)?;
        }
        Some(index * WORD_BITS + word.trailing_zeros())
    }

    /// The pages of the set inside `range`, ascending.
    pub(crate) fn iter_in(&self, range: PageRange) -> impl Iterator<Item = u32> {
        let mut next = range.start;
        std::iter::from_fn(move || {
            let page = self.next_from(next).filter(|&page| page < range.end)?;
            next = page + 1;
            Some(page)
        })
    }

    fn len_words(&self) -> u32 {
        self.pages.div_ceil(WORD_BITS)
    }

    /// Bytes that the set takes.
    fn metadata_bytes(&self) -> u64 {
        (self.words.len() * size_of::<u64>()) as u64
    }

    fn clear_tail(&mut self) {
        let used = self.pages % WORD_BITS;
        if let Some(last) = self.words.last_mut().filter(|_| used != 0) {
            *last &= (1 << used) - 1;
        }
    }
}

/// Tells which pages of a region were written to: a hypervisor's dirty log, for one.
///
/// With a source the engine reads a page only after it was left alone for an interval, and reads
/// it once. Without one it reads every page in every pass and compares checksums, as KSM does.
pub trait DirtySource: Debug + Send + Sync + 'static {
    /// Adds every page written to since the call before, by anybody, to `dirty`. The first call
    /// may leave out what was written before it.
    ///
    /// Of `ignored` pages the engine does not want to hear for now, because they were busy lately.
    /// If a guest pays for it that its write is noticed, as under KVM, let it write to these for
    /// free. They may be told or not; once they are not ignored any more, the first call may tell
    /// of them whatever was written, and the next one must be right.
    ///
    /// # Errors
    /// When the source cannot tell; the engine then takes every page to be dirty.
    fn collect(&self, dirty: &mut PageSet, ignored: &PageSet) -> io::Result<()>;
}

/// A watched region's pages that are to be looked at, now or later.
#[derive(Debug)]
pub(crate) struct Watch {
    /// Written to since the last look.
    pub(crate) dirty: PageSet,
    /// Not merged and not known to be alone: to be tried once they are calm.
    pub(crate) pending: PageSet,
    /// Blocks of [`BLOCK_PAGES`] in which a page is put off, by its item's back-off.
    waiting: PageSet,
    /// Pages that the last look did not ask for.
    ignored: PageSet,
    /// Pages that equal one at another place, and are to be mapped there once they were calm for long.
    pub(crate) to_map: PageSet,
}

/// Pages of a block of [`Watch`]: a bit for each page would be more than the blocks' search costs.
const BLOCK_PAGES: u32 = 64;

impl Watch {
    /// Everything is to be looked at.
    pub(crate) fn new(pages: u32) -> Watch {
        let mut pending = PageSet::new(pages);
        pending.insert_all();
        Watch {
            dirty: PageSet::new(pages),
            pending,
            waiting: PageSet::new(pages.div_ceil(BLOCK_PAGES)),
            ignored: PageSet::new(pages),
            to_map: PageSet::new(pages),
        }
    }

    /// Bytes that the sets take.
    pub(crate) fn metadata_bytes(&self) -> u64 {
        let by_page = [&self.dirty, &self.pending, &self.ignored, &self.to_map];
        by_page.map(PageSet::metadata_bytes).iter().sum::<u64>() + self.waiting.metadata_bytes()
    }

    /// Pages to be looked at: dirty ones, and the others.
    pub(crate) fn count(&self) -> (u32, u32) {
        let words = self.dirty.words.iter().zip(&self.pending.words);
        words.fold((0, 0), |(dirty, others), (now, later)| {
            (
                dirty + now.count_ones(),
                others + (later & !now).count_ones(),
            )
        })
    }

    /// Has a volatile page looked at when it is due, and not before.
    pub(crate) fn put_off(&mut self, page: u32) {
        self.pending.remove(page);
        self.waiting.insert(page / BLOCK_PAGES);
    }

    /// Learns what was written to since the last look; `source` is asked, and told what to ignore.
    ///
    /// A page that is put off is ignored for the first half of its wait: its guest writes to it as
    /// if nobody looked. For the second half it is watched, and must rest.
    pub(crate) fn look(
        &mut self,
        items: &Items,
        hurried: bool,
        source: impl FnOnce(&mut PageSet, &PageSet),
    ) {
        let ignored = self.release_due(items, hurried);
        source(&mut self.dirty, &ignored);
        self.dirty.remove_all(&ignored);
        // Of these it may tell what was written while nobody asked.
        let mut asked_again = std::mem::replace(&mut self.ignored, ignored);
        asked_again.remove_all(&self.ignored);
        self.dirty.remove_all(&asked_again);
        // One that is not put off any more was given up meanwhile. Only a visit tells whether it was
        // written to since.
        let pages = asked_again.iter_in(0..asked_again.pages());
        pages
            .filter(|&page| !items.state(page).is_volatile())
            .for_each(|page| self.pending.insert(page));
    }

    /// Has pages looked at that were put off until now; all of them if `hurried`. Returns those
    /// that are to be ignored.
    fn release_due(&mut self, items: &Items, hurried: bool) -> PageSet {
        let mut ignored = PageSet::new(self.pending.pages());
        let blocks: Vec<u32> = self.waiting.iter_in(0..self.waiting.pages()).collect();
        for block in blocks {
            let first = block * BLOCK_PAGES;
            let mut is_waiting = false;
            for page in first..self.pending.pages().min(first + BLOCK_PAGES) {
                if !items.state(page).is_volatile() || self.pending.contains(page) {
                    continue;
                }
                let backoff = items.backoff(page);
                if hurried || backoff.is_due(items.now) {
                    self.pending.insert(page);
                    continue;
                }
                is_waiting = true;
                if backoff.is_ignored(items.now) {
                    ignored.insert(page);
                }
            }
            if !is_waiting {
                self.waiting.remove(block);
            }
        }
        ignored
    }

    /// Has pages that are to be mapped elsewhere looked at if they were calm for so many intervals.
    pub(crate) fn release_to_map(&mut self, items: &Items, intervals: u16) {
        let pages: Vec<u32> = self.to_map.iter_in(0..self.to_map.pages()).collect();
        for page in pages {
            let is_open = matches!(items.state(page), PageState::Unshared { .. });
            if is_open && items.backoff(page).elapsed(items.now) < intervals {
                continue;
            }
            self.to_map.remove(page);
            if is_open {
                self.pending.insert(page);
            }
        }
    }

    /// The first page to be looked at from `page` on.
    pub(crate) fn next_from(&self, page: u32) -> Option<u32> {
        (page / WORD_BITS..self.dirty.len_words())
            .map(|index| (index, self.word(index, page..self.dirty.pages())))
            .find(|&(_, word)| word != 0)
            .map(|(index, word)| index * WORD_BITS + word.trailing_zeros())
    }

    /// Pages of `window` to be looked at, and whether each is dirty. They are not dirty any more.
    pub(crate) fn take(&mut self, window: PageRange) -> Vec<(u32, bool)> {
        let mut pages = Vec::new();
        for index in window.start / WORD_BITS..window.end.div_ceil(WORD_BITS) {
            let mut rest = self.word(index, window.clone());
            while rest != 0 {
                let page = index * WORD_BITS + rest.trailing_zeros();
                pages.push((page, self.dirty.contains(page)));
                rest &= rest - 1;
            }
            self.dirty.words[index as usize] &= !mask(index, &window);
        }
        pages
    }

    /// The pages of both sets in one word of them, as far as `range` goes. Both at once: to look
    /// for the next of each would pass the whole of an empty set for each page of the other.
    fn word(&self, index: u32, range: PageRange) -> u64 {
        let (dirty, pending) = (&self.dirty.words, &self.pending.words);
        (dirty[index as usize] | pending[index as usize]) & mask(index, &range)
    }
}

/// The bits of a word that stand for pages of `range`.
fn mask(index: u32, range: &PageRange) -> u64 {
    let first = index * WORD_BITS;
    let below = |page: u32| match page.saturating_sub(first) {
        bits @ 0..WORD_BITS => (1 << bits) - 1,
        _ => u64::MAX,
    };
    below(range.end) & !below(range.start)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn a_page_set_is_a_set(
            steps in proptest::collection::vec((0..5u8, 0..200u32, any::<u64>()), 1..60),
            pages in 1..200u32,
            from in 0..220u32,
        ) {
            let mut set = PageSet::new(pages);
            let mut model = BTreeSet::new();
            for (kind, page, bits) in steps {
                match kind {
                    0 => { set.insert(page); model.extend((page < pages).then_some(page)); }
                    1 => { set.remove(page); model.remove(&page); }
                    2 => { set.insert_all(); model.extend(0..pages); }
                    _ => {
                        let first = page / 64 * 64;
                        set.insert_words(first, &[bits]);
                        let added = (0..64).filter(|bit| bits >> bit & 1 == 1).map(|bit| first + bit);
                        model.extend(added.filter(|&page| page < pages));
                    }
                }
            }
            prop_assert_eq!(set.iter_in(0..pages).collect::<BTreeSet<_>>(), model.clone());
            prop_assert_eq!(set.next_from(from), model.range(from..).next().copied());
            prop_assert!((0..pages).all(|page| set.contains(page) == model.contains(&page)));
        }
    }
    proptest! {
        #[test]
        fn a_window_is_taken_with_dirty_pages_told_from_pending_ones(
            dirty in proptest::collection::btree_set(0..300u32, 0..40),
            pending in proptest::collection::btree_set(0..300u32, 0..40),
            pages in 1..300u32,
            (start, len) in (0..300u32, 0..200u32),
        ) {
            let mut watch = Watch::new(pages);
            watch.pending = PageSet::new(pages);
            dirty.iter().for_each(|&page| watch.dirty.insert(page));
            pending.iter().for_each(|&page| watch.pending.insert(page));
            let window = start.min(pages)..(start + len).min(pages);
            let due: BTreeSet<u32> = dirty.union(&pending).copied().filter(|&page| page < pages).collect();
            prop_assert_eq!(watch.next_from(start), due.range(start..).next().copied());
            let expected: Vec<_> =
                due.iter().filter(|page| window.contains(page)).map(|&page| (page, dirty.contains(&page))).collect();
            prop_assert_eq!(watch.take(window.clone()), expected);
            let left = due.iter().filter(|&&page| dirty.contains(&page) && !window.contains(&page));
            prop_assert_eq!(watch.dirty.iter_in(0..pages).collect::<Vec<_>>(), left.copied().collect::<Vec<_>>());
        }
    }
}
