//! Looks at memory that others may be writing to.
//!
//! Every load is volatile and whole, so that a torn *page* is possible and an invented *word* is
//! not. `memcpy` and `memcmp` were rejected: to the compiler they are plain reads, which it may
//! repeat or leave out. Loads are as wide as the machine has them, chosen at run time: with SSE2
//! alone comparing takes twice as long as memory does.

use crate::base::page::{PAGE_SIZE_BYTES, PageBuf};

/// Bytes compared between two looks at the outcome.
const BLOCK_BYTES: usize = 256;

/// Bytes at the start of a page that [`pages_may_be_equal`] looks at: a cache line.
const HEAD_BYTES: usize = 64;

macro_rules! racing_loads {
    ($name:ident, $chunk:ty, $feature:literal) => {
        mod $name {
            use super::{BLOCK_BYTES, PAGE_SIZE_BYTES, PageBuf};

            type Chunk = $chunk;
            type Words = [u64; size_of::<Chunk>() / size_of::<u64>()];

            /// # Safety
            /// `from` is aligned to a page and valid for reads of a whole page.
            #[target_feature(enable = $feature)]
            pub(super) unsafe fn copy_page(from: *const u8, into: &mut PageBuf) {
                let from = from.cast::<Chunk>();
                let into = into.as_mut_ptr().cast::<Chunk>();
                for index in 0..PAGE_SIZE_BYTES / size_of::<Chunk>() {
                    // SAFETY: `index` is inside the page that the caller vouches for, which is aligned.
                    let chunk = unsafe { from.wrapping_add(index).read_volatile() };
                    // SAFETY: `index` is inside `into`, which has the size of a page; no alignment is assumed.
                    unsafe { into.wrapping_add(index).write_unaligned(chunk) };
                }
            }

            /// # Safety
            /// Both are aligned to a page and valid for reads of `len_bytes`, at most a page.
            #[target_feature(enable = $feature)]
            pub(super) unsafe fn are_equal(
                one: *const u8,
                other: *const u8,
                len_bytes: usize,
            ) -> bool {
                let one = one.cast::<Chunk>();
                let other = other.cast::<Chunk>();
                let chunks = len_bytes / size_of::<Chunk>();
                let block = BLOCK_BYTES / size_of::<Chunk>();
                for start in (0..chunks).step_by(block) {
                    let mut differing: Words = Words::default();
                    for index in start..chunks.min(start + block) {
                        // SAFETY: `index` is inside what the caller vouches for, which is aligned.
                        let mine = unsafe { one.wrapping_add(index).read_volatile() };
                        // SAFETY: as for `one`.
                        let theirs = unsafe { other.wrapping_add(index).read_volatile() };
                        let mine: Words = bytemuck::cast(mine);
                        let theirs: Words = bytemuck::cast(theirs);
                        for (seen, (mine, theirs)) in
                            differing.iter_mut().zip(mine.iter().zip(theirs))
                        {
                            *seen |= mine ^ theirs;
                        }
                    }
                    if differing.iter().any(|&word| word != 0) {
                        return false;
                    }
                }
                true
            }

            /// # Safety
            /// `page` is aligned to a page and valid for reads of a whole page.
            #[target_feature(enable = $feature)]
            pub(super) unsafe fn is_zero(page: *const u8) -> bool {
                let page = page.cast::<Chunk>();
                let block = BLOCK_BYTES / size_of::<Chunk>();
                for start in (0..PAGE_SIZE_BYTES / size_of::<Chunk>()).step_by(block) {
                    let mut seen: Words = Words::default();
                    for index in start..start + block {
                        // SAFETY: `index` is inside the page that the caller vouches for, which is aligned.
                        let chunk = unsafe { page.wrapping_add(index).read_volatile() };
                        let chunk: Words = bytemuck::cast(chunk);
                        for (seen, word) in seen.iter_mut().zip(chunk) {
                            *seen |= word;
                        }
                    }
                    if seen.iter().any(|&word| word != 0) {
                        return false;
                    }
                }
                true
            }
        }
    };
}

racing_loads!(wide, std::arch::x86_64::__m256i, "avx2");
racing_loads!(narrow, std::arch::x86_64::__m128i, "sse2");

/// Copies a page out.
///
/// # Safety
/// `from` is aligned to a page and valid for reads of a whole page.
pub(crate) unsafe fn copy_page_out(from: *const u8, into: &mut PageBuf) {
    if std::is_x86_feature_detected!("avx2") {
        // SAFETY: the feature is there; the rest is the caller's promise.
        unsafe { wide::copy_page(from, into) }
    } else {
        // SAFETY: every x86-64 has the feature; the rest is the caller's promise.
        unsafe { narrow::copy_page(from, into) }
    }
}

/// Whether a page holds only zeros.
///
/// # Safety
/// `page` is aligned to a page and valid for reads of a whole page.
pub(crate) unsafe fn page_is_zero(page: *const u8) -> bool {
    if std::is_x86_feature_detected!("avx2") {
        // SAFETY: the feature is there; the rest is the caller's promise.
        unsafe { wide::is_zero(page) }
    } else {
        // SAFETY: every x86-64 has the feature; the rest is the caller's promise.
        unsafe { narrow::is_zero(page) }
    }
}

/// Whether two pages show the same bytes.
///
/// # Safety
/// Both are aligned to a page and valid for reads of a whole page.
pub(crate) unsafe fn pages_are_equal(one: *const u8, other: *const u8) -> bool {
    // SAFETY: the caller's promise.
    unsafe { are_equal(one, other, PAGE_SIZE_BYTES) }
}

/// Whether two pages begin alike: a cheap no to a guess, never a yes.
///
/// # Safety
/// Both are aligned to a page and valid for reads of a whole page.
pub(crate) unsafe fn pages_may_be_equal(one: *const u8, other: *const u8) -> bool {
    // SAFETY: the caller's promise.
    unsafe { are_equal(one, other, HEAD_BYTES) }
}

unsafe fn are_equal(one: *const u8, other: *const u8, len_bytes: usize) -> bool {
    if std::is_x86_feature_detected!("avx2") {
        // SAFETY: the feature is there; the rest is the caller's promise.
        unsafe { wide::are_equal(one, other, len_bytes) }
    } else {
        // SAFETY: every x86-64 has the feature; the rest is the caller's promise.
        unsafe { narrow::are_equal(one, other, len_bytes) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::page::PAGE_WORDS;

    #[repr(align(4096))]
    struct Aligned(PageBuf);

    #[test]
    fn a_difference_anywhere_is_seen_by_both_widths() {
        let one = Aligned([7; PAGE_WORDS]);
        for word in 0..PAGE_WORDS {
            let mut other = Aligned([7; PAGE_WORDS]);
            let at = |page: &Aligned| page.0.as_ptr().cast::<u8>();
            // SAFETY: both are whole, aligned pages; every x86-64 has SSE2.
            assert!(unsafe { narrow::are_equal(at(&one), at(&other), PAGE_SIZE_BYTES) });
            // SAFETY: both are whole, aligned pages.
            assert!(unsafe { pages_are_equal(at(&one), at(&other)) });
            other.0[word] ^= 1 << (word % 64);
            // SAFETY: both are whole, aligned pages; every x86-64 has SSE2.
            assert!(!unsafe { narrow::are_equal(at(&one), at(&other), PAGE_SIZE_BYTES) });
            // SAFETY: both are whole, aligned pages.
            assert!(!unsafe { pages_are_equal(at(&one), at(&other)) });
            // SAFETY: both are whole, aligned pages.
            let may_be = unsafe { pages_may_be_equal(at(&one), at(&other)) };
            assert_eq!(may_be, word >= HEAD_BYTES / size_of::<u64>());
        }
    }

    #[test]
    fn only_a_page_of_zeros_is_zero() {
        for is_zero in [page_is_zero, narrow::is_zero] {
            let mut page = Aligned([0; PAGE_WORDS]);
            // SAFETY: `page` is a whole, aligned page; every x86-64 has SSE2.
            assert!(unsafe { is_zero(page.0.as_ptr().cast()) });
            for word in 0..PAGE_WORDS {
                page.0[word] = 1 << (word % 64);
                // SAFETY: as above.
                assert!(!unsafe { is_zero(page.0.as_ptr().cast()) });
                page.0[word] = 0;
            }
        }
    }

    #[test]
    fn a_copy_is_the_page_with_both_widths() {
        let page = Aligned(std::array::from_fn(|word| word as u64 * 3));
        for copy in [copy_page_out, narrow::copy_page] {
            let mut into = [0; PAGE_WORDS];
            // SAFETY: `page` is a whole, aligned page; every x86-64 has SSE2.
            unsafe { copy(page.0.as_ptr().cast(), &mut into) };
            assert_eq!(into, page.0);
        }
    }
}
