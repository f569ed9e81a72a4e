//! Pages, page ranges, and every conversion between pages and bytes.

use std::ops::Range;

/// Size of a page in bytes. Samepage shares base pages only, as KSM does.
pub const PAGE_SIZE_BYTES: usize = 4096;

/// Pages in a huge page: those of one page table, on x86-64.
pub(crate) const HUGE_PAGE_PAGES: u32 = 512;

/// Size of a huge page in bytes.
pub(crate) const HUGE_PAGE_BYTES: usize = pages_to_bytes(HUGE_PAGE_PAGES);

/// 64-bit words in a page.
pub const PAGE_WORDS: usize = PAGE_SIZE_BYTES / size_of::<u64>();

/// The content of one page, copied out of memory that others may be writing to.
pub type PageBuf = [u64; PAGE_WORDS];

/// Consecutive pages of one region, by index from the region's start.
pub(crate) type PageRange = Range<u32>;

/// Index of a page in the pool; also the name of the stable page that lives there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct PoolPage(pub(crate) u32);

impl PoolPage {
    /// The pool page `pages` further on.
    pub(crate) fn plus(self, pages: u32) -> PoolPage {
        PoolPage(self.0 + pages)
    }
}

/// Bytes in `pages` pages.
pub(crate) const fn pages_to_bytes(pages: u32) -> usize {
    // On the 64-bit targets that Samepage supports a `u32` always fits in a `usize`.
    pages as usize * PAGE_SIZE_BYTES
}

/// Whole pages in `bytes`, or `None` when they are more than a region may have.
pub(crate) fn bytes_to_pages(bytes: usize) -> Option<u32> {
    u32::try_from(bytes / PAGE_SIZE_BYTES).ok()
}

/// Number of pages in `range`.
pub(crate) fn range_pages(range: &PageRange) -> u32 {
    range.end - range.start
}

/// Groups ascending items into runs: `continues(previous, next)` tells whether `next` extends the
/// run that ends with `previous`; no run is longer than `run_pages_max`.
pub(crate) fn runs<T>(
    items: &[T],
    run_pages_max: usize,
    continues: impl Fn(&T, &T) -> bool,
) -> impl Iterator<Item = &[T]> {
    let mut rest = items;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let mut len = 1;
        while len < rest.len() && len < run_pages_max && continues(&rest[len - 1], &rest[len]) {
            len += 1;
        }
        let (run, tail) = rest.split_at(len);
        rest = tail;
        Some(run)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_break_at_gaps_and_at_the_longest_length() {
        let pages = [1u32, 2, 3, 4, 5, 9, 10, 12];
        let found: Vec<&[u32]> = runs(&pages, 3, |a, b| a + 1 == *b).collect();
        assert_eq!(found, [&[1u32, 2, 3][..], &[4, 5], &[9, 10], &[12]]);
    }

    #[test]
    fn runs_of_nothing_are_none() {
        assert_eq!(runs(&[0u32; 0], 4, |_, _| true).count(), 0);
    }
}
