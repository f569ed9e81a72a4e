//! The pageload guest that is built into the monitor: a workload that knows what each of its pages
//! holds, for tests, benchmarks and the demo.
//!
//! Its source is `resources/pageload`; the `pageload-workload` crate there has its command line, its
//! page contents, and what a complete merge of several guests comes to.

/// The guest as an ELF file for the Linux 64-bit boot protocol: one segment, loaded at 1 MiB.
#[must_use]
pub fn image() -> &'static [u8] {
    include_bytes!(env!("PAGELOAD_GUEST"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(offset: usize) -> u64 {
        u64::from_le_bytes(image()[offset..offset + 8].try_into().unwrap())
    }

    #[test]
    fn image_is_one_segment_between_one_and_two_mib() {
        assert_eq!(image()[..6], *b"\x7fELF\x02\x01");
        assert_eq!(image()[0x38], 1, "program headers");
        let (entry, header) = (word(0x18), usize::try_from(word(0x20)).unwrap());
        let (address, memory_bytes) = (word(header + 0x18), word(header + 0x28));
        assert_eq!(address, 1 << 20);
        assert!(address + memory_bytes <= 2 << 20, "{memory_bytes} bytes");
        assert!((address..address + memory_bytes).contains(&entry));
    }
}
