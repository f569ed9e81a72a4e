#![no_main]
//! Random accesses to a block device's registers and to memory, and doorbells.

include!("../disk.rs");

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    vmm::virtio::fuzzing::registers(disk(false), input);
    check_size();
});
