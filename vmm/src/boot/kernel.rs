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
    /// The file ends before what its headers name.
    #[error("is cut short: its headers name {named_bytes} bytes, the file has {file_bytes}")]
    CutShort {
        /// End of what the headers name.
        named_bytes: u64,
        /// Size of the file.
        file_bytes: u64,
    },
    /// Headers that no kernel has, and that would take long to follow.
    #[error("has {what} of {value}, at most {most} is taken")]
    Excess {
        /// What there is too much of.
        what: &'static str,
        /// How much.
        value: u64,
        /// How much is taken.
        most: u64,
    },
    /// A segment with more in the file than in memory.
    #[error("has a segment of {file_bytes} bytes in the file and only {memory_bytes} in memory")]
    BadSegment {
        /// `p_filesz`.
        file_bytes: u64,
        /// `p_memsz`.
        memory_bytes: u64,
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

const ELF_MAGIC: &[u8] = b"\x7fELF";
const ELF_CLASS_64: u8 = 2;
const ELF_MACHINE_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// Bytes of an ELF-64 program header.
const PROGRAM_HEADER_BYTES: u64 = 56;
/// Most program headers that are read. Linux has 5 to 10.
const PROGRAM_HEADERS_MAX: u64 = 128;
/// Most bytes of notes, over all program headers. Linux has some hundred.
const NOTE_BYTES_MAX: u64 = 1 << 20;
/// Bytes of a unit of `syssize` (`Documentation/arch/x86/boot.rst`).
const PARAGRAPH_BYTES: u64 = 16;

/// Bytes of `image` that [`load`] puts into memory: what a start takes, known before it takes any.
pub(crate) fn loaded_bytes<F: Read + Seek>(image: &mut F) -> Result<u64, KernelError> {
    let head = read_head(image)?;
    if !head.starts_with(ELF_MAGIC) {
        return Ok(image.seek(SeekFrom::End(0))?);
    }
    let segments = program_headers(image, &head)?;
    let loaded = segments.iter().filter(|segment| segment.kind == PT_LOAD);
    Ok(loaded.fold(0, |sum, segment| sum.saturating_add(segment.file_bytes)))
}

fn read_head<F: Read + Seek>(image: &mut F) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    image.seek(SeekFrom::Start(0))?;
    Read::by_ref(image).take(0x210).read_to_end(&mut head)?;
    Ok(head)
}

/// Loads `image` into `memory` of `mem_size_bytes`.
pub(crate) fn load<F>(
    memory: &GuestMemory,
    mem_size_bytes: u64,
    image: &mut F,
) -> Result<Kernel, KernelError>
where
    F: Read + ReadVolatile + Seek,
{
    let head = read_head(image)?;
    if head.starts_with(ELF_MAGIC) {
        load_elf(memory, mem_size_bytes, image, &head)
    } else if head.get(0x202..0x206) == Some(b"HdrS".as_slice()) {
        load_bzimage(memory, mem_size_bytes, image, &head)
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
    // Segments that overlap could each fill all of memory, one after the other.
    let loaded_bytes = segments.iter().map(|(start, end)| end - start).sum();
    at_most("loaded bytes", loaded_bytes, low_ram_end(mem_size_bytes))?;
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

/// A program header, as far as it is used.
struct Segment {
    kind: u32,
    file_start: u64,
    file_bytes: u64,
    start: u64,
    memory_bytes: u64,
}

/// Start and end (guest physical) of every loaded segment.
///
/// All that the loader would follow is bounded here, before it reads anything: by the file's size,
/// and by what a kernel may have. A sparse file of terabytes costs its owner nothing, and reading it
/// would hold the start, and whoever waits for it, for hours.
fn elf_segments<F: Read + Seek>(
    image: &mut F,
    head: &[u8],
) -> Result<Vec<(u64, u64)>, KernelError> {
    let file_bytes = image.seek(SeekFrom::End(0))?;
    let mut note_bytes = 0_u64;
    let mut loaded = Vec::new();
    for segment in program_headers(image, head)? {
        if segment.kind != PT_LOAD && segment.kind != PT_NOTE {
            continue;
        }
        let named_bytes = segment.file_start.saturating_add(segment.file_bytes);
        if named_bytes > file_bytes {
            return Err(KernelError::CutShort {
                named_bytes,
                file_bytes,
            });
        }
        if segment.kind == PT_NOTE {
            note_bytes = note_bytes.saturating_add(segment.file_bytes);
            at_most("notes, in bytes,", note_bytes, NOTE_BYTES_MAX)?;
            continue;
        }
        if segment.file_bytes > segment.memory_bytes {
            return Err(KernelError::BadSegment {
                file_bytes: segment.file_bytes,
                memory_bytes: segment.memory_bytes,
            });
        }
        let end = segment.start.saturating_add(segment.memory_bytes);
        loaded.push((segment.start, end));
    }
    Ok(loaded)
}

fn program_headers<F: Read + Seek>(
    image: &mut F,
    head: &[u8],
) -> Result<Vec<Segment>, KernelError> {
    // ELF-64 header: e_phoff at 32, e_phentsize at 54, e_phnum at 56.
    let offset = u64_at(head, 32);
    let size = u64::from(u16::from_le_bytes([byte(head, 54), byte(head, 55)]));
    let count = u64::from(u16::from_le_bytes([byte(head, 56), byte(head, 57)]));
    at_most("a program header, in bytes,", size, PROGRAM_HEADER_BYTES)?;
    at_most("a number of program headers", count, PROGRAM_HEADERS_MAX)?;
    let mut table = Vec::new();
    image.seek(SeekFrom::Start(offset))?;
    Read::by_ref(image)
        .take(size * count)
        .read_to_end(&mut table)?;
    // Program header: p_type at 0, p_offset at 8, p_paddr at 24, p_filesz at 32, p_memsz at 40.
    let size = usize::try_from(size.max(1)).unwrap_or(usize::MAX);
    let segments = table.chunks_exact(size).map(|header| Segment {
        kind: u32::from_le_bytes([0, 1, 2, 3].map(|at| byte(header, at))),
        file_start: u64_at(header, 8),
        start: u64_at(header, 24),
        file_bytes: u64_at(header, 32),
        memory_bytes: u64_at(header, 40),
    });
    Ok(segments.collect())
}

fn at_most(what: &'static str, value: u64, most: u64) -> Result<(), KernelError> {
    if value <= most {
        Ok(())
    } else {
        Err(KernelError::Excess { what, value, most })
    }
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
    head: &[u8],
) -> Result<Kernel, KernelError>
where
    F: Read + ReadVolatile + Seek,
{
    let file_bytes = image.seek(SeekFrom::End(0))?;
    // setup_sects at 0x1f1, 4 where it is 0; syssize at 0x1f4, in paragraphs.
    let setup_sectors = match byte(head, 0x1f1) {
        0 => 4,
        sectors => u64::from(sectors),
    };
    let paragraphs = u32::from_le_bytes([0x1f4, 0x1f5, 0x1f6, 0x1f7].map(|at| byte(head, at)));
    let named_bytes = (setup_sectors + 1) * 512 + u64::from(paragraphs) * PARAGRAPH_BYTES;
    if named_bytes > file_bytes {
        return Err(KernelError::CutShort {
            named_bytes,
            file_bytes,
        });
    }
    fits(HIMEM_ADDRESS.saturating_add(file_bytes), mem_size_bytes)?;
    let start = GuestAddress(HIMEM_ADDRESS);
    let loaded = BzImage::load(memory, Some(start), image, Some(start))?;
    let header = loaded.setup_header.ok_or(KernelError::UnknownFormat)?;
    if header.version < PROTOCOL_2_10 || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(KernelError::No64BitEntry);
    }
    let entry = loaded.kernel_load.0 + BZIMAGE_ENTRY_64;
    if entry >= loaded.kernel_end {
        return Err(KernelError::EntryOutside { entry });
    }
    // It unpacks itself to where it wants to be and needs that much there.
    let unpacked = { header.pref_address }
        .max(loaded.kernel_load.0)
        .saturating_add(u64::from(header.init_size));
    let end = loaded.kernel_end.max(unpacked);
    fits(end, mem_size_bytes)?;
    Ok(Kernel {
        entry,
        end,
        header: Some(header),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::ram::{Merger, Ram};
    use proptest::prelude::*;
    use std::io::{Cursor, Write};
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
    fn what_a_kernel_takes_is_known_before_it_is_loaded() {
        let mut image = elf(HIMEM_ADDRESS, HIMEM_ADDRESS, 0x2000);
        // Debugging information, say.
        image.extend([0; 5000]);
        assert_eq!(loaded_bytes(&mut Cursor::new(&image)).unwrap(), 8);
        let other = loaded_bytes(&mut Cursor::new(&image[1..])).unwrap();
        assert_eq!(other, image.len() as u64 - 1);
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
        // See also the seed `bzimage-that-ends-before-its-entry` of the fuzz target.
        let outside = elf(HIMEM_ADDRESS + 8, HIMEM_ADDRESS, 8);
        assert!(matches!(
            loaded(&outside),
            Err(KernelError::EntryOutside { .. })
        ));
    }

    #[test]
    fn a_kernel_that_would_be_followed_for_hours_is_refused() {
        let field = |at: usize, bytes: &[u8]| {
            let mut image = elf(HIMEM_ADDRESS, HIMEM_ADDRESS, 8);
            image[at..at + bytes.len()].copy_from_slice(bytes);
            image
        };
        // A note that reaches to the end of a sparse file; no need for the file to be there.
        let file = tempfile::tempfile().unwrap();
        let mut note = field(64, &[4]);
        note[96..104].copy_from_slice(&(4_u64 << 40).to_le_bytes());
        (&file).write_all(&note).unwrap();
        file.set_len(5 << 40).unwrap();
        let ram = Ram::new(MEM_SIZE_BYTES, Merger::Nobody).unwrap();
        let error = load(ram.memory(), MEM_SIZE_BYTES, &mut &file).unwrap_err();
        ram.release().unwrap();
        assert!(error.to_string().contains("notes"), "{error}");

        let header_table = field(54, &[0xff; 4]);
        let error = loaded(&header_table).unwrap_err();
        assert!(matches!(error, KernelError::Excess { value: 0xffff, .. }));

        let mut overlapping = field(56, &[100]);
        overlapping.truncate(64);
        let mut segment = elf(HIMEM_ADDRESS, HIMEM_ADDRESS, 2 << 20)[64..120].to_vec();
        segment[8..16].fill(0);
        overlapping.extend(segment.repeat(100));
        let error = loaded(&overlapping).unwrap_err();
        assert!(error.to_string().contains("loaded bytes"), "{error}");
    }

    #[test]
    fn half_a_kernel_is_refused_with_both_sizes() {
        let mut half = elf(HIMEM_ADDRESS, HIMEM_ADDRESS, 8);
        half.truncate(124);
        let error = loaded(&half).unwrap_err().to_string();
        assert!(error.contains("128") && error.contains("124"), "{error}");

        let mut image = vec![0; 0x1000];
        image[0x1f1] = 1;
        image[0x1f4] = 0xff;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        let named_bytes = 1024 + 255 * 16;
        let error = loaded(&image).unwrap_err().to_string();
        assert!(error.contains(&named_bytes.to_string()), "{error}");
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
