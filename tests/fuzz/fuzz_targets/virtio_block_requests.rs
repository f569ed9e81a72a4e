#![no_main]
//! Random descriptors and request headers behind a queue that is set up as it should be.

include!("../disk.rs");

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    vmm::virtio::fuzzing::any_requests(disk, input);
    check_size();
});
