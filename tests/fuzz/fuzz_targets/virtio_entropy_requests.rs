#![no_main]
//! Random descriptors behind an entropy device's queue that is set up as it should be.

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    vmm::virtio::fuzzing::entropy_requests(input);
});
