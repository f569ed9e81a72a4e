#![no_main]
//! Any bytes at all as a VM's configuration, most of which are nearly one.

use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};

/// One of so many changes is to bytes, which are no JSON afterwards as a rule.
const BYTES_IN: u32 = 16;

fuzz_target!(|text: &[u8]| samepage::fuzzing::config(text));

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let changed = match seed % BYTES_IN {
        0 => None,
        _ => samepage::fuzzing::config_mutator::mutate(&data[..size], seed, max_size),
    };
    match changed {
        Some(text) => {
            data[..text.len()].copy_from_slice(&text);
            text.len()
        }
        None => fuzzer_mutate(data, size, max_size),
    }
});
