#![no_main]
//! Random descriptors in both queues of a network device, while frames come.

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    vmm::virtio::fuzzing::network_frames(input);
});
