#![no_main]
//! Random descriptors and buffers in the queues of a balloon that is set up as it should be.

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    vmm::virtio::fuzzing::balloon_requests(input);
});
