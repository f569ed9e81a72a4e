//! Disk I/O into pages that the merge engine shares while it happens.

use std::time::{Duration, Instant};

use dedup::{Engine, Pace, Run, Settings};
use vm_memory::{Bytes, GuestAddress};

use super::super::disk::Disk;
use super::super::transfer::{DiskIo, Moved, Position};
use crate::memory::ram::{Merger, Ram};
use crate::virtio::segments::Segments;
use crate::virtio::{Unbounded, fuzzing};

const PAGES: usize = 256;
const PAGE: usize = 4096;
const SECTORS_PER_PAGE: u64 = 8;

/// Contents of page `page` of version `version`; never all the same byte.
fn contents(version: u8, page: usize) -> Vec<u8> {
    let seed = [version, u8::try_from(page % 251).unwrap(), 0x5a];
    seed.iter().copied().cycle().take(PAGE).collect()
}

/// A disk that holds version 0, then version 1.
fn disk() -> (tempfile::NamedTempFile, DiskIo) {
    let file = tempfile::NamedTempFile::new().unwrap();
    let versions = (0..2).flat_map(|version| (0..PAGES).map(move |page| contents(version, page)));
    std::fs::write(file.path(), versions.flatten().collect::<Vec<u8>>()).unwrap();
    let disk = Disk::open(&fuzzing::drive("disk", file.path(), false)).unwrap();
    (file, DiskIo::new(disk))
}

fn buffer(page: usize) -> Segments {
    let mut buffer = Segments::default();
    buffer
        .push(GuestAddress((page * PAGE) as u64), 4096)
        .unwrap();
    buffer
}

/// Each guest sees what its own disk gave it, though both guests' pages were one page before it, or
/// become one meanwhile: the kernel's copy into a shared or protected page breaks the sharing first.
#[test]
fn pages_read_from_disk_are_the_guests_own_while_the_engine_merges_them() {
    let settings = Settings {
        run: Run::Merge,
        pace: Pace {
            pages_to_scan: 512,
            sleep_millisecs: 0,
            ..Pace::default()
        },
        ..Settings::default()
    };
    let engine = Engine::new(&settings).unwrap();
    let rams = [0, 1].map(|_| Ram::new((PAGES * PAGE) as u64, Merger::Engine(&engine)).unwrap());
    let (_file, mut disk) = disk();
    let closing = disk.closing();
    let mut versions = [[0_u8; PAGES]; 2];
    for round in 0..400 {
        for page in (0..PAGES).filter(|page| round == 0 || (page + round) % 7 == 0) {
            // Mostly equal; now and then one guest is a version ahead.
            let version = u8::from((page + round / 7) % 3 == 0);
            for (ram, seen) in rams.iter().zip(&mut versions) {
                let sector = (u64::from(version) * PAGES as u64 + page as u64) * SECTORS_PER_PAGE;
                let from = Position {
                    sector,
                    done_bytes: 0,
                };
                let mut read = || disk.read(from, &buffer(page), ram.memory(), &Unbounded);
                let mut moved = read().unwrap();
                while let Moved::Waiting(_) = moved {
                    closing.settle();
                    moved = read().unwrap();
                }
                assert_eq!(moved, Moved::All);
                seen[page] = version;
                if round % 5 == 4 {
                    break;
                }
            }
        }
        for (ram, seen) in rams.iter().zip(&versions) {
            for (page, version) in seen.iter().enumerate() {
                let mut bytes = vec![0; PAGE];
                let address = GuestAddress((page * PAGE) as u64);
                ram.memory().read_slice(&mut bytes, address).unwrap();
                assert_eq!(
                    bytes,
                    contents(*version, page),
                    "round {round}, page {page}"
                );
            }
        }
        // What is written to all the time is left alone: the guests rest once, and go on in merged pages.
        let deadline = Instant::now() + Duration::from_secs(120);
        while round == 0 && engine.stats().pages_sharing < PAGES as u64 / 2 {
            let stats = engine.stats();
            assert!(engine.wait_full_scans(1, deadline), "{stats:?}");
        }
    }
    for ram in rams {
        ram.release().unwrap();
    }
}
