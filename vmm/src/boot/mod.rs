//! What a guest finds in its memory when it starts, by the 64-bit boot protocol of Linux.

pub mod cmdline;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub(crate) mod kernel;
pub(crate) mod mptable;
pub(crate) mod params;
pub(crate) mod tables;

use std::io::{Read, Seek};

use linux_loader::cmdline::Cmdline;
use linux_loader::loader::load_cmdline;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, ReadVolatile};

use crate::memory::GuestMemory;
use crate::memory::layout::{CMDLINE_ADDRESS, EBDA_ADDRESS, HIMEM_ADDRESS, low_ram_end};
pub use kernel::KernelError;
use params::Initrd;

const PAGE: u64 = 0x1000;

/// Errors of loading a guest.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BootError {
    /// The kernel. The caller names the file.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The initrd could not be read. The caller names the file.
    #[error("cannot read it: {0}")]
    Initrd(#[source] std::io::Error),
    /// The initrd is empty: the kernel would panic for want of a root file system.
    #[error("is empty")]
    InitrdEmpty,
    /// The initrd does not fit above the kernel.
    #[error(
        "of {size_bytes} bytes does not fit between the kernel's end at {kernel_end:#x} and the \
         end of memory at {ram_end:#x} given by mem_size_mib"
    )]
    InitrdTooLarge {
        /// Length of the initrd.
        size_bytes: u64,
        /// End of the kernel.
        kernel_end: u64,
        /// End of low RAM.
        ram_end: u64,
    },
    /// The command line.
    #[error("cannot write the command line: {0}")]
    Cmdline(String),
    /// A table could not be written to guest memory.
    #[error("cannot write boot tables: {0}")]
    Memory(#[from] GuestMemoryError),
    /// The zero page could not be written to guest memory.
    #[error("cannot write boot parameters: {0}")]
    Params(#[from] linux_loader::configurator::Error),
}

/// Puts the initrd at the end of low RAM, page-aligned, away from where kernels unpack and grow.
pub(crate) fn load_initrd<F>(
    memory: &GuestMemory,
    mem_size_bytes: u64,
    kernel: &kernel::Kernel,
    image: &mut F,
) -> Result<Initrd, BootError>
where
    F: Read + ReadVolatile + Seek,
{
    let size_bytes = image
        .seek(std::io::SeekFrom::End(0))
        .map_err(BootError::Initrd)?;
    if size_bytes == 0 {
        return Err(BootError::InitrdEmpty);
    }
    image.rewind().map_err(BootError::Initrd)?;
    // A bzImage says how high its initrd may reach (inclusive).
    let limit = kernel
        .header
        .map_or(u64::MAX, |header| u64::from(header.initrd_addr_max) + 1);
    let ram_end = low_ram_end(mem_size_bytes).min(limit);
    let too_large = BootError::InitrdTooLarge {
        size_bytes,
        kernel_end: kernel.end,
        ram_end,
    };
    let address = ram_end
        .checked_sub(size_bytes)
        .map(|address| address & !(PAGE - 1));
    let address = match address {
        Some(address) if address >= kernel.end.max(HIMEM_ADDRESS) => address,
        _ => return Err(too_large),
    };
    let (Ok(guest_address), Ok(size), Ok(length)) = (
        u32::try_from(address),
        u32::try_from(size_bytes),
        usize::try_from(size_bytes),
    ) else {
        return Err(too_large);
    };
    memory
        .read_exact_volatile_from(GuestAddress(address), image, length)
        .map_err(|error| BootError::Initrd(std::io::Error::other(error)))?;
    Ok(Initrd {
        address: guest_address,
        size_bytes: size,
    })
}

/// Writes command line, zero page, page tables, GDT and MP table.
pub(crate) fn write_tables(
    memory: &GuestMemory,
    mem_size_bytes: u64,
    vcpu_count: u8,
    guest: (&kernel::Kernel, Option<Initrd>, &Cmdline),
) -> Result<(), BootError> {
    let (kernel, initrd, cmdline) = guest;
    load_cmdline(memory, GuestAddress(CMDLINE_ADDRESS), cmdline)
        .map_err(|error| BootError::Cmdline(error.to_string()))?;
    let text = cmdline
        .as_cstring()
        .map_err(|error| BootError::Cmdline(error.to_string()))?;
    let cmdline_len = u32::try_from(text.as_bytes_with_nul().len())
        .map_err(|error| BootError::Cmdline(error.to_string()))?;
    params::write(
        memory,
        &params::build(mem_size_bytes, kernel.header, cmdline_len, initrd),
    )?;
    tables::write_page_tables(memory)?;
    tables::write_gdt(memory)?;
    // The address is a constant below 1 MiB.
    let mp_address = u32::try_from(EBDA_ADDRESS).unwrap_or_default();
    memory.write_slice(
        &mptable::build(mp_address, vcpu_count),
        GuestAddress(EBDA_ADDRESS),
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::ram::{Merger, Ram};
    use std::io::Cursor;

    const MEM_SIZE_BYTES: u64 = 4 << 20;

    fn placed(size: usize, kernel_end: u64) -> Result<Initrd, BootError> {
        let ram = Ram::new(MEM_SIZE_BYTES, Merger::Nobody).unwrap();
        let kernel = kernel::Kernel {
            entry: HIMEM_ADDRESS,
            end: kernel_end,
            header: None,
        };
        let image = vec![0x5a; size];
        let initrd = load_initrd(
            ram.memory(),
            MEM_SIZE_BYTES,
            &kernel,
            &mut Cursor::new(image),
        );
        ram.release().unwrap();
        initrd
    }

    #[test]
    fn the_initrd_lies_page_aligned_at_the_end_of_memory() {
        let initrd = placed(5000, 0x20_0000).unwrap();
        assert_eq!(
            initrd,
            Initrd {
                address: 0x3f_e000,
                size_bytes: 5000
            }
        );
    }

    #[test]
    fn an_initrd_never_overlaps_the_kernel() {
        let end = 0x3f_e000;
        placed(5000, end).unwrap();
        let error = placed(5000, end + 1).unwrap_err();
        assert!(error.to_string().contains("mem_size_mib"), "{error}");
        placed(8 << 20, HIMEM_ADDRESS).unwrap_err();
    }

    #[test]
    fn an_empty_initrd_is_refused() {
        let error = placed(0, HIMEM_ADDRESS).unwrap_err();
        assert!(matches!(error, BootError::InitrdEmpty), "{error}");
    }
}
