//! Loading a kernel: an ELF image (vmlinux, or a bare-metal guest) or a bzImage.

use std::io::{self, Read, Seek, SeekFrom};

use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use vm_memory::{GuestAddress, ReadVolatile};

use crate::memory::GuestMemory;
use crate::memory::layout::{HIMEM_ADDRESS, low_ram_end};

/// Errors of loading a kernel. The caller names the file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// The file could not be read.
    #[error("cannot read it: {0}")]
    Read(#[from] io::Error),
    /// Neither format's magic number is there.
    #[error("is neither an ELF kernel nor a bzImage")]
    UnknownFormat,
    /// An ELF file, but not of 64-bit x86.
    #[error("is an ELF file for another machine (class {class}, machine {machine}), not x86-64")]
    WrongMachine {
        /// `EI_CLASS`; 2 is 64-bit.
        class: u8,
        /// `e_machine`; 62 is x86-64.
        machine: u16,
    },
    /// It needs memory that the guest does not have.
    #[error("needs guest memory up to {needed_bytes:#x}, mem_size_mib gives {given_bytes:#x}")]
    TooLarge {
        /// End of the kernel (guest physical).
        needed_bytes: u64,
        /// End of low RAM (guest physical).
        given_bytes: u64,
    },
    /// A bzImage without a 64-bit entry point.
    #[error("is a bzImage without a 64-bit entry point")]
    No64BitEntry,
    /// Its entry point is not in what it loads.
    #[error("has its entry point at {entry:#x}, outside of what it loads")]
    EntryOutside {
        /// The entry point.
        entry: u64,
    },
    /// The loader refused it.
    #[error("cannot be loaded: {0}")]
    Load(#[from] linux_loader::loader::Error),
}

/// A loaded kernel.
#[derive(Debug, Clone)]
pub(crate) struct Kernel {
    /// Where the first instruction is (guest physical, 64-bit mode).
    pub(crate) entry: u64,
    /// First address after everything the kernel needs to start.
    pub(crate) end: u64,
    /// A bzImage's setup header.
    pub(crate) header: Option<setup_header>,
}

/// 64-bit entry point of a bzImage relative to its load address
/// (`Documentation/arch/x86/boot.rst`).
const BZIMAGE_ENTRY_64: u64 = 0x200;
/// `XLF_KERNEL_64` in `xloadflags`.
const XLF_KERNEL_64: u16 = 1;
/// Boot protocol from which `init_size` and `pref_address` are there.
const PROTOCOL_2_10: u16 = 0x020a;

const ELF_CLASS_64: u8 = 2;
const ELF_MACHINE_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;

/// Loads `image` into `memory` of `mem_size_bytes`.
pub(crate) fn load<F>(
    memory: &GuestMemory,
    mem_size_bytes: u64,
    image: &mut F,
) -> Result<Kernel, KernelError>
where
    F: Read + ReadVolatile + Seek,
{
    let mut head = Vec::new();
    image.seek(SeekFrom::Start(0))?;
    Read::by_ref(image).take(0x210).read_to_end(&mut head)?;
    if head.starts_with(b"\x7fELF") {
        load_elf(memory, mem_size_bytes, image, &head)
    } else if head.get(0x202..0x206) == Some(b"HdrS".as_slice()) {
        load_bzimage(memory, mem_size_bytes, image)
    } else {
        Err(KernelError::UnknownFormat)
    }
}

fn fits(needed_bytes: u64, mem_size_bytes: u64) -> Result<(), KernelError> {
    let given_bytes = low_ram_end(mem_size_bytes);
    if needed_bytes <= given_bytes {
        Ok(())
    } else {
        Err(KernelError::TooLarge {
            needed_bytes,
            given_bytes,
        })
    }
}

fn load_elf<F>(
    memory: &GuestMemory,
    mem_size_bytes: u64,
    image: &mut F,
    head: &[u8],
) -> Result<Kernel, KernelError>
where
    F: Read + ReadVolatile + Seek,
{
    let class = head.get(4).copied().unwrap_or_default();
    let machine = u16::from_le_bytes([byte(head, 18), byte(head, 19)]);
    if class != ELF_CLASS_64 || machine != ELF_MACHINE_X86_64 {
        return Err(KernelError::WrongMachine { class, machine });
    }
    // Before anything is loaded: linux-loader reports memory that is too small as a file that
    // cannot be read.
    let segments = elf_segments(image, head)?;
    let end = segments.iter().map(|segment| segment.1).max().unwrap_or(0);
    fits(end, mem_size_bytes)?;
    let loaded = Elf::load(memory, None, image, Some(GuestAddress(HIMEM_ADDRESS)))?;
    let entry = loaded.kernel_load.0;
    if !segments
        .iter()
        .any(|(start, end)| (*start..*end).contains(&entry))
    {
        return Err(KernelError::EntryOutside { entry });
    }
    Ok(Kernel {
        entry,
        end,
        header: None,
    })
}

/// Start and end (guest physical) of every loaded segment.
fn elf_segments<F: Read + Seek>(
    image: &mut F,
    head: &[u8],
) -> Result<Vec<(u64, u64)>, KernelError> {
    // ELF-64 header: e_phoff at 32, e_phentsize at 54, e_phnum at 56.
    let offset = u64_at(head, 32);
    let size = usize::from(u16::from_le_bytes([byte(head, 54), byte(head, 55)]));
    let count = usize::from(u16::from_le_bytes([byte(head, 56), byte(head, 57)]));
    let mut table = Vec::new();
    image.seek(SeekFrom::Start(offset))?;
    Read::by_ref(image)
        .take((size * count) as u64)
        .read_to_end(&mut table)?;
    let mut segments = Vec::new();
    for header in table.chunks_exact(size.max(1)) {
        // Program header: p_type at 0, p_paddr at 24, p_memsz at 40.
        let kind = u32::from_le_bytes([0, 1, 2, 3].map(|at| byte(header, at)));
        if kind == PT_LOAD {
            let start = u64_at(header, 24);
            segments.push((start, start.saturating_add(u64_at(header, 40))));
        }
    }
    Ok(segments)
}

/// A byte of a header; what lies beyond a truncated file reads as zero and is refused later.
fn byte(bytes: &[u8], at: usize) -> u8 {
    bytes.get(at).copied().unwrap_or_default()
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|i| byte(bytes, at + i)))
}

fn load_bzimage<F>(
    memory: &GuestMemory,
    mem_size_bytes: u64,
    image: &mut F,
) -> Result<Kernel, KernelError>
where
    F: Read + ReadVolatile + Seek,
{
    let size_bytes = image.seek(SeekFrom::End(0))?;
    fits(HIMEM_ADDRESS + size_bytes, mem_size_bytes)?;
    let start = GuestAddress(HIMEM_ADDRESS);
    let loaded = BzImage::load(memory, Some(start), image, Some(start))?;
    let header = loaded.setup_header.ok_or(KernelError::UnknownFormat)?;
    if header.version < PROTOCOL_2_10 || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(KernelError::No64BitEntry);
    }
    // It unpacks itself to where it wants to be and needs that much there.
    let unpacked = { header.pref_address }
        .max(loaded.kernel_load.0)
        .saturating_add(u64::from(header.init_size));
    let end = loaded.kernel_end.max(unpacked);
    fits(end, mem_size_bytes)?;
    Ok(Kernel {
        entry: loaded.kernel_load.0 + BZIMAGE_ENTRY_64,
        end,
        header: Some(header),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::ram::{Merger, Ram};
    use proptest::prelude::*;
    use std::io::Cursor;
    use vm_memory::Bytes;

    const MEM_SIZE_BYTES: u64 = 4 << 20;

    fn loaded(image: &[u8]) -> Result<Kernel, KernelError> {
        let ram = Ram::new(MEM_SIZE_BYTES, Merger::Nobody).unwrap();
        let kernel = load(ram.memory(), MEM_SIZE_BYTES, &mut Cursor::new(image));
        ram.release().unwrap();
        kernel
    }

    /// An ELF image of one segment of 8 bytes.
    fn elf(entry: u64, address: u64, mem_size: u64) -> Vec<u8> {
        let mut image = vec![0; 120];
        image[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        image[16] = 2;
        image[18] = 62;
        image[24..32].copy_from_slice(&entry.to_le_bytes());
        image[32] = 64;
        image[54] = 56;
        image[56] = 1;
        image[64] = 1;
        image[72] = 120;
        image[88..96].copy_from_slice(&address.to_le_bytes());
        image[96] = 8;
        image[104..112].copy_from_slice(&mem_size.to_le_bytes());
        image.extend(*b"KERNEL!!");
        image
    }

    #[test]
    fn an_elf_kernel_is_put_where_it_says() {
        let ram = Ram::new(MEM_SIZE_BYTES, Merger::Nobody).unwrap();
        let image = elf(0x10_0004, HIMEM_ADDRESS, 0x2000);
        let kernel = load(ram.memory(), MEM_SIZE_BYTES, &mut Cursor::new(&image)).unwrap();
        assert_eq!((kernel.entry, kernel.end), (0x10_0004, 0x10_2000));
        let mut bytes = [0; 8];
        ram.memory()
            .read_slice(&mut bytes, GuestAddress(HIMEM_ADDRESS))
            .unwrap();
        assert_eq!(&bytes, b"KERNEL!!");
        ram.release().unwrap();
    }

    #[test]
    fn a_kernel_that_needs_more_memory_says_how_much() {
        let error = loaded(&elf(HIMEM_ADDRESS, HIMEM_ADDRESS, MEM_SIZE_BYTES)).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("0x500000") && text.contains("0x400000"),
            "{text}"
        );
        let error = loaded(&elf(HIMEM_ADDRESS, HIMEM_ADDRESS, u64::MAX)).unwrap_err();
        assert!(matches!(error, KernelError::TooLarge { .. }), "{error}");
    }

    #[test]
    fn other_files_are_refused_for_what_they_are() {
        assert!(matches!(
            loaded(b"#!/bin/sh"),
            Err(KernelError::UnknownFormat)
        ));
        assert!(matches!(loaded(b""), Err(KernelError::UnknownFormat)));
        let mut arm = elf(HIMEM_ADDRESS, HIMEM_ADDRESS, 8);
        arm[18] = 183;
        assert!(matches!(
            loaded(&arm),
            Err(KernelError::WrongMachine { machine: 183, .. })
        ));
        let outside = elf(HIMEM_ADDRESS + 8, HIMEM_ADDRESS, 8);
        assert!(matches!(
            loaded(&outside),
            Err(KernelError::EntryOutside { .. })
        ));
    }

    proptest! {
        #[test]
        fn damaged_kernels_are_errors_never_panics(
            damage in prop::collection::vec((0_usize..128, any::<u8>()), 0..8),
            cut in 0_usize..=128,
        ) {
            let mut image = elf(HIMEM_ADDRESS, HIMEM_ADDRESS, 8);
            damage.into_iter().for_each(|(at, byte)| image[at] = byte);
            image.truncate(cut);
            drop(loaded(&image));
        }

        #[test]
        fn damaged_bzimages_are_errors_never_panics(
            damage in prop::collection::vec((0x1f1_usize..0x270, any::<u8>()), 0..12),
        ) {
            let mut image = vec![0; 0x1000];
            image[0x1f1] = 1;
            image[0x202..0x206].copy_from_slice(b"HdrS");
            image[0x206..0x208].copy_from_slice(&0x020f_u16.to_le_bytes());
            image[0x211] = 1;
            image[0x236] = 1;
            damage.into_iter().for_each(|(at, byte)| image[at] = byte);
            drop(loaded(&image));
        }
    }
}
