#![no_main]
//! Any bytes at all on a connection, however they are cut.

libfuzzer_sys::fuzz_target!(|input: &[u8]| samepage::fuzzing::connection(input));
