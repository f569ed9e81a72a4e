#![no_main]
//! Random packets in both queues of a vsock device, while the host's side acts at random.

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    vmm::virtio::fuzzing::vsock_packets(input);
});
