#![no_main]
//! Any bytes at all as a VM's configuration.

libfuzzer_sys::fuzz_target!(|text: &[u8]| samepage::fuzzing::config(text));
