//! Fingerprints: fast, non-cryptographic hashes to *find* pages that may be equal.
//!
//! A fingerprint never decides a merge; bytes do, compared under write protection. KSM walks a
//! tree by `memcmp` instead (`mm/ksm.c`, `stable_tree_search`): one cache-cold page per level.
//!
//! rapidhash, because it needs no vector unit to be faster than memory: 0.09 us a page, where xxh3
//! built for plain x86-64 took 0.13 us.

use std::hash::{BuildHasher, RandomState};
use std::sync::LazyLock;

use rapidhash::v3::{RapidSecrets, rapidhash_v3_seeded};

use crate::base::page::{PAGE_WORDS, PageBuf};

/// Drawn anew for each process, so that no guest can prepare pages that collide. Tests have always the
/// same ones: of a few hundred contents two have one checksum in every tenth process.
static SECRETS: LazyLock<RapidSecrets> = LazyLock::new(|| {
    RapidSecrets::seed(match cfg!(test) {
        true => 1,
        false => RandomState::new().hash_one(std::process::id()),
    })
});

/// A page's 64-bit hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Fingerprint(pub(crate) u64);

impl Fingerprint {
    /// The fingerprint of a page's content.
    pub(crate) fn of(page: &PageBuf) -> Fingerprint {
        Fingerprint(rapidhash_v3_seeded(bytemuck::bytes_of(page), &SECRETS))
    }

    /// The fingerprint of a page of zeros.
    pub(crate) fn of_zeros() -> Fingerprint {
        static OF_ZEROS: LazyLock<Fingerprint> =
            LazyLock::new(|| Fingerprint::of(&[0; PAGE_WORDS]));
        *OF_ZEROS
    }

    /// The part that a page's item keeps to see whether the page changed between two visits. 16
    /// bits: a change that goes unseen costs a merge that comes too early, and nothing else.
    pub(crate) fn checksum(self) -> u32 {
        (self.0 >> 48) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_changed_bit_anywhere_changes_the_fingerprint() {
        let base = [7u64; PAGE_WORDS];
        for word in [0, 1, 100, PAGE_WORDS - 1] {
            let mut changed = base;
            changed[word] ^= 1 << 63;
            assert_ne!(Fingerprint::of(&base), Fingerprint::of(&changed));
        }
    }
}
