#![no_main]
//! Any bytes at all as a kernel file.

libfuzzer_sys::fuzz_target!(|image: &[u8]| vmm::boot::fuzzing::kernel(image));
