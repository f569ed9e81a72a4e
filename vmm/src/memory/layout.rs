//! The guest physical address space: where RAM lies, and where the monitor puts what a kernel
//! finds at its start. Pure.
//!
//! ```text
//! 0x0000_0500  GDT, IDT                       0xc000_0000  end of low RAM, MMIO hole
//! 0x0000_7000  zero page                      0xd000_0000  virtio-mmio windows
//! 0x0000_9000  page tables (6 pages)          0xfec0_0000  IOAPIC, LAPIC, KVM's TSS
//! 0x0002_0000  command line                 0x1_0000_0000  high RAM
//! 0x0009_fc00  EBDA: MP table
//! 0x0010_0000  kernel
//!   ...        initrd at the end of low RAM
//! ```

/// Global descriptor table.
pub const GDT_ADDRESS: u64 = 0x500;
/// Interrupt descriptor table: empty, its place is all that matters.
pub const IDT_ADDRESS: u64 = 0x520;
/// Linux boot parameters ("zero page").
pub const ZERO_PAGE_ADDRESS: u64 = 0x7000;
/// Initial stack pointer; Linux sets up its own at once.
pub const BOOT_STACK_POINTER: u64 = 0x8ff0;
/// Top level page table; the others follow.
pub const PAGE_TABLES_ADDRESS: u64 = 0x9000;
/// Kernel command line.
pub const CMDLINE_ADDRESS: u64 = 0x2_0000;
/// Extended BIOS data area: the MP table. RAM ends here for the guest until [`HIMEM_ADDRESS`].
pub const EBDA_ADDRESS: u64 = 0x9_fc00;
/// Start of the legacy video area; the EBDA ends here.
pub const EBDA_END: u64 = 0xa_0000;
/// Where kernels are loaded from.
pub const HIMEM_ADDRESS: u64 = 0x10_0000;
/// End of low RAM at most: devices live from here to 4 GiB.
pub const MMIO_HOLE_START: u64 = 3 << 30;
/// Start of high RAM.
pub const MMIO_HOLE_END: u64 = 4 << 30;

/// One stretch of guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamRange {
    /// Guest physical address.
    pub start: u64,
    /// Length.
    pub size_bytes: u64,
    /// Where it begins in the VM's one host mapping.
    pub mapping_offset: u64,
}

impl RamRange {
    /// First address after it.
    pub fn end(&self) -> u64 {
        self.start + self.size_bytes
    }
}

/// The RAM of a guest with `mem_size_bytes`: one range, or two around the MMIO hole.
pub fn ram_ranges(mem_size_bytes: u64) -> Vec<RamRange> {
    let low = mem_size_bytes.min(MMIO_HOLE_START);
    let mut ranges = vec![RamRange {
        start: 0,
        size_bytes: low,
        mapping_offset: 0,
    }];
    if mem_size_bytes > low {
        let size_bytes = mem_size_bytes - low;
        ranges.push(RamRange {
            start: MMIO_HOLE_END,
            size_bytes,
            mapping_offset: low,
        });
    }
    ranges
}

/// End of the RAM below the MMIO hole.
pub fn low_ram_end(mem_size_bytes: u64) -> u64 {
    mem_size_bytes.min(MMIO_HOLE_START)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn memory_below_the_hole_is_one_range() {
        for size_bytes in [1 << 20, MMIO_HOLE_START] {
            let whole = RamRange {
                start: 0,
                size_bytes,
                mapping_offset: 0,
            };
            assert_eq!(ram_ranges(size_bytes), [whole]);
        }
    }

    proptest! {
        #[test]
        fn ranges_cover_the_mapping_once_and_keep_out_of_the_hole(mib in 1_u64..=1 << 20) {
            let ranges = ram_ranges(mib << 20);
            let mut offset = 0;
            for range in &ranges {
                prop_assert_eq!(range.mapping_offset, offset);
                prop_assert!(range.end() <= MMIO_HOLE_START || range.start >= MMIO_HOLE_END);
                offset += range.size_bytes;
            }
            prop_assert_eq!(offset, mib << 20);
        }
    }
}
