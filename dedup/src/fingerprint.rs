//! Fingerprints: fast, non-cryptographic hashes to *find* pages that may be equal.
//!
//! A fingerprint never decides a merge; bytes do, compared under write protection. KSM walks a
//! tree by `memcmp` instead (`mm/ksm.c`, `stable_tree_search`): one cache-cold page per level.

use xxhash_rust::xxh3::xxh3_64;

use crate::page::PageBuf;

/// A page's 64-bit hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Fingerprint(pub(crate) u64);

impl Fingerprint {
    /// The fingerprint of a page's content.
    pub(crate) fn of(page: &PageBuf) -> Fingerprint {
        Fingerprint(xxh3_64(bytemuck::bytes_of(page)))
    }

    /// The part that a page's item keeps to see whether the page changed between two visits. 16
    /// bits: a change that goes unseen costs a merge that comes too early, and nothing else.
    pub(crate) fn checksum(self) -> u32 {
        (self.0 >> 48) as u32
    }
}

/// Whether every byte of the page is zero.
pub(crate) fn is_zero(page: &PageBuf) -> bool {
    page.iter().fold(0, |seen, word| seen | word) == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::PAGE_WORDS;

    #[test]
    fn one_changed_bit_anywhere_changes_the_fingerprint() {
        let base = [7u64; PAGE_WORDS];
        for word in [0, 1, 100, PAGE_WORDS - 1] {
            let mut changed = base;
            changed[word] ^= 1 << 63;
            assert_ne!(Fingerprint::of(&base), Fingerprint::of(&changed));
        }
    }

    #[test]
    fn only_a_page_of_zeros_is_zero() {
        let mut page = [0u64; PAGE_WORDS];
        assert!(is_zero(&page));
        page[PAGE_WORDS - 1] = 1 << 63;
        assert!(!is_zero(&page));
    }
}
