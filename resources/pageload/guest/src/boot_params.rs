//! What the boot loader left: the fields of Linux' `boot_params` that matter here
//! (Documentation/arch/x86/zero-page.rst).

use core::ptr;

const EXT_CMD_LINE_PTR: usize = 0x0c8;
const E820_ENTRIES: usize = 0x1e8;
const CMD_LINE_PTR: usize = 0x228;
const E820_TABLE: usize = 0x2d0;
const E820_ENTRY_BYTES: usize = 20;
const E820_ENTRIES_MAX: usize = 128;
const E820_RAM: u32 = 1;
/// Linux' COMMAND_LINE_SIZE on x86.
const COMMAND_LINE_BYTES_MAX: usize = 2048;

/// The boot loader's structure, somewhere in low memory.
pub(crate) struct BootParams {
    base: *const u8,
}

impl BootParams {
    /// # Safety
    /// A boot_params structure is at `address`; it and the command line it points to are mapped and
    /// stay as they are.
    pub(crate) unsafe fn at(address: u64) -> BootParams {
        BootParams {
            base: pointer(address),
        }
    }

    /// The command line, up to its first byte that is not UTF-8.
    pub(crate) fn command_line(&self) -> &'static str {
        let low: u32 = self.field(CMD_LINE_PTR);
        let high: u32 = self.field(EXT_CMD_LINE_PTR);
        let start = pointer(u64::from(high) << 32 | u64::from(low));
        if start.is_null() {
            return "";
        }
        // SAFETY: `at` was promised a command line that is mapped; bytes up to its NUL are read.
        let has_byte = |&index: &usize| unsafe { start.wrapping_add(index).read() } != 0;
        let len = (0..COMMAND_LINE_BYTES_MAX).take_while(has_byte).count();
        // SAFETY: `len` bytes were just read there; `at` was promised that nobody writes them.
        let bytes = unsafe { core::slice::from_raw_parts(start, len) };
        bytes.utf8_chunks().next().map_or("", |chunk| chunk.valid())
    }

    /// The ranges of RAM, as first address and bytes.
    pub(crate) fn ram(&self) -> impl Iterator<Item = (u64, u64)> {
        let entries = usize::from(self.field::<u8>(E820_ENTRIES)).min(E820_ENTRIES_MAX);
        (0..entries)
            .map(|index| E820_TABLE + index * E820_ENTRY_BYTES)
            .filter_map(|entry| {
                let kind: u32 = self.field(entry + 16);
                (kind == E820_RAM).then(|| (self.field(entry), self.field(entry + 8)))
            })
    }

    fn field<T: Integer>(&self, offset: usize) -> T {
        // SAFETY:
        // 1. `at` was promised the whole structure (4096 bytes), and offsets here are inside it.
        // 2. Any bytes are an integer; the read needs no alignment.
        unsafe { self.base.wrapping_add(offset).cast::<T>().read_unaligned() }
    }
}

trait Integer {}
impl Integer for u8 {}
impl Integer for u32 {}
impl Integer for u64 {}

fn pointer(address: u64) -> *const u8 {
    // Nothing is lost on a 64-bit machine.
    ptr::with_exposed_provenance(usize::try_from(address).unwrap_or(0))
}
