//! The workload's pages, by index, and their mapping beyond the first GiB.

use core::ptr;
use core::sync::atomic::AtomicU64;

use pageload_workload::layout::{self, PAGE_BYTES, RAM_END_MAX};
use pageload_workload::{Content, Mismatch};

use crate::boot_params::BootParams;
use crate::clock::exchange_timed;

const RANGES_MAX: usize = 8;
const GIB: u64 = 1 << 30;
const LARGE_PAGE_BYTES: u64 = 2 << 20;
const DIRECTORIES: usize = (RAM_END_MAX / GIB) as usize;
const TABLE_FLAGS: u64 = 0x07;
const LARGE_PAGE_FLAGS: u64 = 0x87;

#[repr(C, align(4096))]
struct Table([u64; 512]);

unsafe extern "C" {
    /// The third level, in boot.s: an entry is a GiB, the first is there already.
    static mut page_directories: Table;
}

/// Second-level tables for the GiB beyond the first; untouched, so unallocated, where not needed.
static mut DIRECTORY: [Table; DIRECTORIES] = [const { Table([0; 512]) }; DIRECTORIES];

/// All pages that the workload owns. There is one.
pub(crate) struct Memory {
    /// First address and pages of each range.
    ranges: [(u64, u64); RANGES_MAX],
}

impl Memory {
    /// Maps the RAM beyond the image.
    ///
    /// # Safety
    /// Called once; nothing but the result uses RAM beyond the image from then on.
    pub(crate) unsafe fn new(boot_params: &BootParams) -> Memory {
        let mut ranges = [(0, 0); RANGES_MAX];
        let usable = boot_params
            .ram()
            .map(|(start, bytes)| layout::usable(start, bytes));
        for (slot, range) in ranges.iter_mut().zip(usable.filter(|range| range.1 > 0)) {
            *slot = range;
            let end = range.0 + range.1 * PAGE_BYTES;
            for gib in (range.0 / GIB).max(1)..end.div_ceil(GIB) {
                map_gib(gib);
            }
        }
        Memory { ranges }
    }

    /// Number of pages.
    pub(crate) fn pages(&self) -> u64 {
        self.ranges.iter().map(|range| range.1).sum()
    }

    /// Writes a page.
    pub(crate) fn write(&mut self, page: u64, content: Content) {
        let words = self.words(page);
        // SAFETY:
        // 1. `words` has the address of a page of RAM that is mapped; indices are below 512.
        // 2. Owned by `self`, borrowed mutably: no reference into it exists.
        content.write(|index, word| unsafe { words.wrapping_add(index).write_volatile(word) });
    }

    /// Reads a page and compares.
    pub(crate) fn verify(&self, page: u64, content: Content) -> Result<(), Mismatch> {
        let words = self.words(page);
        // SAFETY: as in `write`. Volatile: what was written must come back from memory itself.
        content.verify(|index| unsafe { words.wrapping_add(index).read_volatile() })
    }

    /// Writes a page, of which the first word is the first access to it, and compares what was there
    /// with `before`. Returns the ticks that the first word took.
    pub(crate) fn write_timed(
        &mut self,
        page: u64,
        before: Content,
        after: Content,
    ) -> (u64, Result<(), Mismatch>) {
        let words = self.words(page);
        // SAFETY: the address of a page of RAM that is mapped and owned by `self`, as in `write`.
        let first = unsafe { AtomicU64::from_ptr(words) };
        let (found, ticks) = exchange_timed(first, after.word(0));
        let verified = before.verify(|index| match index {
            0 => found,
            // SAFETY: as in `write`.
            _ => unsafe { words.wrapping_add(index).read_volatile() },
        });
        self.write(page, after);
        (ticks, verified)
    }

    fn words(&self, page: u64) -> *mut u64 {
        let mut offset = page;
        for (start, pages) in self.ranges {
            if offset < pages {
                let address = start + offset * PAGE_BYTES;
                return ptr::with_exposed_provenance_mut(to_usize(address));
            }
            offset -= pages;
        }
        panic!("page: {page} is beyond the last, {}", self.pages());
    }
}

/// Maps one GiB beyond the first, in large pages. A second time changes nothing.
fn map_gib(gib: u64) {
    let index = to_usize(gib);
    let directory = (&raw mut DIRECTORY).cast::<Table>().wrapping_add(index);
    for large_page in 0..512_u64 {
        let address = gib * GIB + large_page * LARGE_PAGE_BYTES;
        let entry = directory.cast::<u64>().wrapping_add(to_usize(large_page));
        // SAFETY: `layout::usable` ends at RAM_END_MAX, so the table exists; it is used here only.
        unsafe { entry.write_volatile(address | LARGE_PAGE_FLAGS) };
    }
    let entry = (&raw mut page_directories)
        .cast::<u64>()
        .wrapping_add(index);
    // SAFETY: 1. `index` is below 64. 2. The table is whole, and identity mapped. 3. Entries that
    // were not present are not cached by the CPU, so no flush is needed.
    unsafe { entry.write_volatile(directory.expose_provenance() as u64 | TABLE_FLAGS) };
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "a program for 64-bit machines only"
)]
const fn to_usize(value: u64) -> usize {
    value as usize
}
