//! What an ideal engine would find in the guests' memory, hashed from outside.
//!
//! | module | holds |
//! |---|---|
//! | [`count`] | what can be shared in a fleet: pure |
//! | [`memory`] | guest memory of a server, read and hashed from outside |
//! | [`find`] | where guest memory is in a server's address space: pure |

pub mod count;
pub mod find;
pub mod memory;

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use rapidhash::v3::rapidhash_v3;

/// What a guest page holds: [`NEVER_TOUCHED`], [`ZERO`], or a hash of its content.
pub type Fingerprint = u64;

/// A page without memory. An engine that gives zero pages back, as Samepage does, leaves such pages
/// too: from outside, the two cannot be told apart.
pub const NEVER_TOUCHED: Fingerprint = 0;

/// A page of zeros that takes memory, or the kernel's zero page.
pub const ZERO: Fingerprint = 1;

/// Fingerprint of a page with memory.
pub fn fingerprint(page: &[u8]) -> Fingerprint {
    if is_zero(page) {
        return ZERO;
    }
    rapidhash_v3(page).max(ZERO + 1)
}

/// Whether a page has only zeros.
pub(crate) fn is_zero(page: &[u8]) -> bool {
    page.chunks(8).all(|word| word == [0; 8])
}

/// Writes fingerprints as little-endian words, guests one after the other.
///
/// # Errors
/// If the file cannot be written.
pub fn write_fingerprints(path: &Path, fleet: &[Vec<Fingerprint>]) -> io::Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    for fingerprint in fleet.iter().flatten() {
        file.write_all(&fingerprint.to_le_bytes())?;
    }
    file.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_of_zeros_is_told_from_one_with_a_last_bit() {
        let mut page = vec![0; 4096];
        assert_eq!(fingerprint(&page), ZERO);
        page[4095] = 1;
        assert!(fingerprint(&page) > ZERO);
    }

    #[test]
    fn a_file_has_eight_bytes_a_page() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("fleet.u64");
        write_fingerprints(&path, &[vec![0, 1], vec![2, u64::MAX]]).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let words: Vec<u64> = bytes
            .chunks(8)
            .map(|word| u64::from_le_bytes(word.try_into().unwrap()))
            .collect();
        assert_eq!(words, [0, 1, 2, u64::MAX]);
    }
}
