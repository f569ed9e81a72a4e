//! Hash maps whose keys need no hashing: fingerprints, which are hashes already, and the numbers
//! of regions, which count up. The standard hasher took a twentieth of the worker's time.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};

use crate::index::fingerprint::Fingerprint;
use crate::pages::region::RegionId;

/// A map from fingerprints that does not hash them again. Not the standard one, which does not tell
/// what it allocated.
pub(crate) type FingerprintMap<V> =
    hashbrown::HashMap<Fingerprint, V, BuildHasherDefault<Unhashed>>;

/// A set of fingerprints.
pub(crate) type FingerprintSet = HashSet<Fingerprint, BuildHasherDefault<Unhashed>>;

/// A map from regions.
pub(crate) type RegionMap<V> = HashMap<RegionId, V, BuildHasherDefault<Unhashed>>;

/// Takes the one word that a key consists of as its hash, spread over all bits. A guest that makes
/// pages with colliding fingerprints must know the process's seed first.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Unhashed(u64);

impl Hasher for Unhashed {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(byte);
        }
    }

    fn write_u64(&mut self, word: u64) {
        // The map takes its bucket from the low bits and its tag from the high ones; a small number
        // would leave all tags the same.
        self.0 = word ^ word.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}
