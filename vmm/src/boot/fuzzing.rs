//! A kernel file of any bytes at all, for a fuzz target and the test that runs its seeds.

use std::io::Cursor;

use vm_memory::GuestAddress;

use super::{cmdline, kernel, load_initrd, write_tables};
use crate::config::VmConfig;
use crate::memory::GuestMemory;

const MEM_SIZE_BYTES: u64 = 4 << 20;
const INITRD: [u8; 5000] = [0x5a; 5000];

/// Loads `image` as a kernel into a small guest, and all that belongs to it if that works. A panic,
/// much time and much memory are findings, an error is none.
///
/// # Panics
/// If a kernel is taken that does not lie in the guest's memory, or whose initrd does not.
#[expect(clippy::expect_used, reason = "only in tests and fuzz targets")]
pub fn kernel(image: &[u8]) {
    let size = usize::try_from(MEM_SIZE_BYTES).expect("a size of memory");
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), size)]).expect("guest memory");
    // A start counts what it takes first, by the same headers.
    let counted = kernel::loaded_bytes(&mut Cursor::new(image));
    let Ok(kernel) = kernel::load(&memory, MEM_SIZE_BYTES, &mut Cursor::new(image)) else {
        return;
    };
    let counted = counted.expect("what can be loaded can be counted");
    assert!(counted <= MEM_SIZE_BYTES, "{counted}");
    assert!(kernel.end <= MEM_SIZE_BYTES, "{kernel:?}");
    assert!(kernel.entry < kernel.end, "{kernel:?}");
    let initrd = load_initrd(&memory, MEM_SIZE_BYTES, &kernel, &mut Cursor::new(INITRD)).ok();
    if let Some(initrd) = initrd {
        let start = u64::from(initrd.address);
        let end = start + u64::from(initrd.size_bytes);
        assert!(kernel.end <= start && end <= MEM_SIZE_BYTES, "{initrd:?}");
    }
    let cmdline = cmdline::compose(&VmConfig::new("kernel")).expect("no drives, no arguments");
    write_tables(&memory, MEM_SIZE_BYTES, 1, (&kernel, initrd, &cmdline)).expect("room for tables");
}

#[cfg(test)]
mod tests {
    #[test]
    fn seeds_of_the_fuzz_target_are_no_findings() {
        for seed in crate::fuzz_seeds::of("kernel_loader") {
            super::kernel(&seed);
        }
    }
}
