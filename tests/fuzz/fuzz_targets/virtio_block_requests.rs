#![no_main]
//! Random descriptors and request headers behind a queue that is set up as it should be.

include!("../disk.rs");

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let Some((&options, input)) = input.split_first() else {
        return;
    };
    // VIRTIO_RING_F_EVENT_IDX.
    let features = u64::from(options & 2 != 0) << 29;
    vmm::virtio::fuzzing::requests(disk(options & 1 != 0), features, input);
});
