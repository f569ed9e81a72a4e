//! What a CPU needs to run 64-bit code at once: page tables and a GDT.
//!
//! The 64-bit boot protocol of Linux (`Documentation/arch/x86/boot.rst`, "64-bit Boot Protocol")
//! asks for paging with the kernel, zero page and command line mapped at their own addresses, and
//! for a GDT with `__BOOT_CS` (0x10) and `__BOOT_DS` (0x18).

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::memory::GuestMemory;
use crate::memory::layout::{GDT_ADDRESS, IDT_ADDRESS, PAGE_TABLES_ADDRESS};

const PAGE: u64 = 0x1000;
const PRESENT_WRITABLE: u64 = 0x3;
const LARGE_PAGE: u64 = 0x80;
/// One page directory maps 1 GiB.
const DIRECTORIES: u64 = 4;

/// Limit (bytes minus 1) of the GDT written by [`write_gdt`].
pub(crate) const GDT_LIMIT: u16 = 4 * 8 - 1;
/// Selector of the code segment.
pub(crate) const CODE_SELECTOR: u16 = 0x10;
/// Selector of the data segments.
pub(crate) const DATA_SELECTOR: u16 = 0x18;

/// Maps the first 4 GiB at their own addresses with 2 MiB pages.
///
/// Linux needs no more than its kernel; a bare-metal guest then reaches all low memory without
/// tables of its own.
pub(crate) fn write_page_tables(memory: &GuestMemory) -> Result<(), GuestMemoryError> {
    let pointers = PAGE_TABLES_ADDRESS + PAGE;
    let directories = pointers + PAGE;
    memory.write_obj(
        pointers | PRESENT_WRITABLE,
        GuestAddress(PAGE_TABLES_ADDRESS),
    )?;
    for gib in 0..DIRECTORIES {
        let directory = directories + gib * PAGE;
        memory.write_obj(
            directory | PRESENT_WRITABLE,
            GuestAddress(pointers + gib * 8),
        )?;
        for entry in 0..512 {
            let page = (gib << 30) + (entry << 21);
            let value = page | LARGE_PAGE | PRESENT_WRITABLE;
            memory.write_obj(value, GuestAddress(directory + entry * 8))?;
        }
    }
    Ok(())
}

/// Writes null, null, 64-bit code and data, and an empty IDT.
pub(crate) fn write_gdt(memory: &GuestMemory) -> Result<(), GuestMemoryError> {
    // Intel SDM volume 3, 3.4.5: base 0, limit 4 GiB, present; code: L, execute/read; data:
    // read/write. Both accessed, so that the CPU need not write here.
    let table: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
    for (index, entry) in (0..).zip(table) {
        memory.write_obj(entry, GuestAddress(GDT_ADDRESS + index * 8))?;
    }
    memory.write_obj(0_u64, GuestAddress(IDT_ADDRESS))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::ram::{Merger, Ram};

    /// Walks the tables as a CPU would.
    fn translate(memory: &GuestMemory, address: u64) -> u64 {
        let entry = |table: u64, index: u64| -> u64 {
            memory
                .read_obj(GuestAddress((table & !0xfff) + (index & 0x1ff) * 8))
                .unwrap()
        };
        let pointers = entry(PAGE_TABLES_ADDRESS, address >> 39);
        let directory = entry(pointers, address >> 30);
        let page = entry(directory, address >> 21);
        assert_eq!(
            page & (LARGE_PAGE | PRESENT_WRITABLE),
            LARGE_PAGE | PRESENT_WRITABLE
        );
        (page & !0x1f_ffff) | (address & 0x1f_ffff)
    }

    #[test]
    fn the_first_four_gib_are_mapped_to_themselves() {
        let ram = Ram::new(1 << 20, Merger::Nobody).unwrap();
        write_page_tables(ram.memory()).unwrap();
        for address in [0, 0x12_3456, 0x4000_0000, 0xffff_ffff] {
            assert_eq!(translate(ram.memory(), address), address);
        }
        ram.release().unwrap();
    }
}
