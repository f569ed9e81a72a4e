//! A block device, as its driver sees it.

mod allowance;
mod chains;
mod merging;
mod opening;
mod requests;
mod storage;

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP};
use vm_memory::{Bytes, GuestAddress};

use super::{Block, Disk};
use crate::config::{CacheType, Drive};
use crate::virtio::fuzzing::{self, AVAIL, DESCRIPTORS, Guest, USED};
use crate::virtio::{Allowance, Unbounded};

const HEADER: u64 = 0x4000;
const DATA: u64 = 0x5000;
const STATUS: u64 = 0x7000;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const UNTOUCHED: u8 = 0xee;
const SECTORS: u64 = 8;
const OK: u8 = VIRTIO_BLK_S_OK.to_le_bytes()[0];
const IOERR: u8 = VIRTIO_BLK_S_IOERR.to_le_bytes()[0];
const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP.to_le_bytes()[0];

fn drive(path: &Path) -> Drive {
    Drive {
        cache_type: CacheType::Writeback,
        ..fuzzing::drive("rootfs", path, false)
    }
}

/// A file of eight sectors; each byte of sector n is n + 1.
fn file() -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    for sector in 0..SECTORS {
        file.write_all(&[u8::try_from(sector).unwrap() + 1; 512])
            .unwrap();
    }
    file
}

struct Bench {
    guest: Guest<Block>,
    file: tempfile::NamedTempFile,
    next_avail: u16,
}

fn bench_with(change: impl FnOnce(&mut Drive)) -> Bench {
    allowed(change, Arc::new(Unbounded))
}

fn allowed(change: impl FnOnce(&mut Drive), allowance: Arc<dyn Allowance>) -> Bench {
    let file = file();
    let mut drive = drive(file.path());
    change(&mut drive);
    let mut guest = Guest::allowed(Disk::open(&drive).unwrap(), allowance);
    guest.set_up(0);
    Bench {
        guest,
        file,
        next_avail: 0,
    }
}

fn bench() -> Bench {
    bench_with(|_| ())
}

impl Bench {
    fn header(&mut self, kind: u32, sector: u64) {
        self.guest.poke(HEADER, &kind.to_le_bytes());
        self.guest.poke(HEADER + 8, &sector.to_le_bytes());
        self.guest.poke(STATUS, &[UNTOUCHED]);
    }

    /// Puts a chain of (address, length, flags) into the table and rings.
    fn submit(&mut self, chain: &[(u64, u32, u16)]) {
        self.link(chain);
        self.ring();
    }

    fn link(&mut self, chain: &[(u64, u32, u16)]) {
        for (index, &(address, length, flags)) in (0_u16..).zip(chain) {
            let last = usize::from(index) + 1 == chain.len();
            let flags = if last { flags } else { flags | NEXT };
            let at = DESCRIPTORS + 16 * u64::from(index);
            self.guest.poke(at, &address.to_le_bytes());
            self.guest.poke(at + 8, &length.to_le_bytes());
            self.guest.poke(at + 12, &flags.to_le_bytes());
            self.guest.poke(at + 14, &(index + 1).to_le_bytes());
        }
    }

    fn ring(&mut self) {
        self.make_available();
        self.guest.serve();
    }

    /// Sets the rings up anew.
    fn reset(&mut self) {
        self.guest.set_up(0);
        self.next_avail = 0;
        for index in [AVAIL + 2, USED + 2] {
            self.guest.poke(index, &[0, 0]);
        }
    }

    fn make_available(&mut self) {
        self.guest
            .poke(AVAIL + 4 + 2 * u64::from(self.next_avail % 16), &[0, 0]);
        self.next_avail += 1;
        self.guest.poke(AVAIL + 2, &self.next_avail.to_le_bytes());
    }

    /// Header, data and status in a descriptor each; returns the status byte.
    fn request(&mut self, kind: u32, sector: u64, length: u32, data_flags: u16) -> u8 {
        self.header(kind, sector);
        let data = (DATA, length, data_flags);
        self.submit(&[(HEADER, 16, 0), data, (STATUS, 1, WRITE)]);
        self.peek(STATUS, 1)[0]
    }

    fn peek(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.guest
            .memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }

    /// Entries in the used ring, and the length of the last.
    fn used(&self) -> (u16, u32) {
        let index: u16 = self.guest.memory.read_obj(GuestAddress(USED + 2)).unwrap();
        let last = USED + 4 + 8 * u64::from(index.wrapping_sub(1) % 16);
        (
            index,
            self.guest.memory.read_obj(GuestAddress(last + 4)).unwrap(),
        )
    }

    fn contents(&self) -> Vec<u8> {
        std::fs::read(self.file.path()).unwrap()
    }
}
