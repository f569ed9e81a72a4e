//! The zero page: `struct boot_params` of Linux (`Documentation/arch/x86/zero-page.rst`).

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::GuestAddress;

use crate::memory::GuestMemory;
use crate::memory::layout::{
    CMDLINE_ADDRESS, EBDA_ADDRESS, HIMEM_ADDRESS, RamRange, ZERO_PAGE_ADDRESS, ram_ranges,
};

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

const BOOT_FLAG: u16 = 0xaa55;
/// "HdrS".
const HEADER_MAGIC: u32 = 0x5372_6448;
/// "Undefined": no boot loader number is assigned to Samepage.
const LOADER_UNDEFINED: u8 = 0xff;
const KERNEL_ALIGNMENT_BYTES: u32 = 0x0100_0000;

/// Where the initrd was put.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Initrd {
    /// Guest physical address, below 4 GiB.
    pub(crate) address: u32,
    /// Length.
    pub(crate) size_bytes: u32,
}

/// The zero page for a guest.
///
/// `header` is a bzImage's own setup header; an ELF kernel has none and gets the least that the
/// 64-bit protocol asks for.
pub(crate) fn build(
    mem_size_bytes: u64,
    header: Option<setup_header>,
    cmdline_len: u32,
    initrd: Option<Initrd>,
) -> boot_params {
    let least = setup_header {
        kernel_alignment: KERNEL_ALIGNMENT_BYTES,
        ..setup_header::default()
    };
    let mut params = boot_params {
        hdr: header.unwrap_or(least),
        ..boot_params::default()
    };
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER_MAGIC;
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    // The address is a constant below 1 MiB.
    params.hdr.cmd_line_ptr = u32::try_from(CMDLINE_ADDRESS).unwrap_or_default();
    params.hdr.cmdline_size = cmdline_len;
    if let Some(initrd) = initrd {
        params.hdr.ramdisk_image = initrd.address;
        params.hdr.ramdisk_size = initrd.size_bytes;
    }
    let map = e820(mem_size_bytes);
    // Four entries at most, of 128.
    params.e820_entries = u8::try_from(map.len()).unwrap_or_default();
    params.e820_table[..map.len()].copy_from_slice(&map);
    params
}

fn e820(mem_size_bytes: u64) -> Vec<boot_e820_entry> {
    let entry = |start, end, r#type| boot_e820_entry {
        addr: start,
        size: end - start,
        r#type,
    };
    let mut map = vec![
        entry(0, EBDA_ADDRESS, E820_RAM),
        // EBDA, video memory, ROMs: RAM behind it, but not for the guest's use.
        entry(EBDA_ADDRESS, HIMEM_ADDRESS, E820_RESERVED),
    ];
    for range in ram_ranges(mem_size_bytes) {
        let start = range.start.max(HIMEM_ADDRESS);
        if start < RamRange::end(&range) {
            map.push(entry(start, range.end(), E820_RAM));
        }
    }
    map
}

/// Writes the zero page to its place.
pub(crate) fn write(
    memory: &GuestMemory,
    params: &boot_params,
) -> Result<(), linux_loader::configurator::Error> {
    let params = BootParams::new(params, GuestAddress(ZERO_PAGE_ADDRESS));
    LinuxBootConfigurator::write_bootparams(&params, memory)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ram_bytes(mem_size_bytes: u64) -> u64 {
        let ram = e820(mem_size_bytes)
            .into_iter()
            .filter(|entry| entry.r#type == E820_RAM);
        ram.map(|entry| entry.size).sum()
    }

    #[test]
    fn all_memory_but_the_legacy_area_is_told_as_ram() {
        for mib in [1_u64, 128, 3 * 1024, 5 * 1024] {
            let legacy = HIMEM_ADDRESS - EBDA_ADDRESS;
            assert_eq!(ram_bytes(mib << 20), (mib << 20) - legacy, "{mib} MiB");
        }
    }

    #[test]
    fn entries_do_not_overlap_and_are_sorted() {
        let map = e820(5 << 30);
        for pair in map.windows(2) {
            assert!({ pair[0].addr } + { pair[0].size } <= { pair[1].addr });
        }
    }

    #[test]
    fn the_zero_page_names_command_line_and_initrd() {
        let initrd = Initrd {
            address: 0x700_0000,
            size_bytes: 1234,
        };
        let params = build(128 << 20, None, 17, Some(initrd));
        let header = params.hdr;
        assert_eq!({ header.cmd_line_ptr }, 0x2_0000);
        assert_eq!({ header.cmdline_size }, 17);
        assert_eq!({ header.ramdisk_image }, 0x700_0000);
        assert_eq!({ header.ramdisk_size }, 1234);
        assert_eq!(params.e820_entries, 3);
    }

    #[test]
    fn a_bzimages_own_header_is_kept() {
        let own = setup_header {
            version: 0x020f,
            loadflags: 1,
            ..setup_header::default()
        };
        let header = build(128 << 20, Some(own), 0, None).hdr;
        assert_eq!(({ header.version }, header.loadflags), (0x020f, 1));
        assert_eq!(header.type_of_loader, LOADER_UNDEFINED);
    }
}
