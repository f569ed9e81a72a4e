//! What a guest tells of its memory (virtio 1.2, 5.5.6.3). Pure.

use std::collections::BTreeMap;

use serde::Serialize;

/// Bytes of one statistic: a tag of two bytes and a value of eight.
pub(super) const ENTRY_BYTES: usize = 10;
/// Most bytes of a buffer that are looked at: room for twice as many statistics as there are.
pub(super) const BUFFER_BYTES_MAX: u64 = (2 * BalloonStatistics::NAMES.len() * ENTRY_BYTES) as u64;

/// Reply of Firecracker's `GET /balloon/statistics`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct BalloonStatistics {
    /// Pages of 4 KiB that the balloon is to hold.
    pub target_pages: u32,
    /// Pages of 4 KiB that it holds, as the guest says.
    pub actual_pages: u32,
    /// The same in MiB.
    pub target_mib: u32,
    /// The same in MiB.
    pub actual_mib: u32,
    /// What the guest told last, by Firecracker's names; it may leave out any of them.
    #[serde(flatten)]
    pub guest: BTreeMap<&'static str, u64>,
}

impl BalloonStatistics {
    /// Firecracker's names of what a guest may tell, in the order of their tags from 0 on.
    pub const NAMES: [&str; 16] = [
        "swap_in",
        "swap_out",
        "major_faults",
        "minor_faults",
        "free_memory",
        "total_memory",
        "available_memory",
        "disk_caches",
        "hugetlb_allocations",
        "hugetlb_failures",
        "oom_kill",
        "alloc_stall",
        "async_scan",
        "direct_scan",
        "async_reclaim",
        "direct_reclaim",
    ];
}

/// Reads a buffer of the guest's. Tags that nobody knows are left out.
pub(super) fn parse(buffer: &[u8]) -> BTreeMap<&'static str, u64> {
    let (entries, _) = buffer.as_chunks::<ENTRY_BYTES>();
    let entries = entries.iter().filter_map(|entry| {
        let (tag, value) = entry.split_first_chunk::<2>()?;
        let name = BalloonStatistics::NAMES.get(usize::from(u16::from_le_bytes(*tag)))?;
        Some((*name, u64::from_le_bytes(*value.first_chunk()?)))
    });
    entries.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(tag: u16, value: u64) -> Vec<u8> {
        [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()
    }

    #[test]
    fn statistics_go_by_firecrackers_names_and_unknown_ones_are_left_out() {
        let buffer = [entry(4, 1 << 40), entry(16, 1), entry(15, 7)].concat();
        let expected = BTreeMap::from([("free_memory", 1 << 40), ("direct_reclaim", 7)]);
        assert_eq!(parse(&buffer), expected);
    }

    #[test]
    fn the_reply_has_what_the_guest_told_beside_the_size() {
        let statistics = BalloonStatistics {
            target_pages: 256,
            target_mib: 1,
            guest: BTreeMap::from([("oom_kill", 2)]),
            ..BalloonStatistics::default()
        };
        let json = serde_json::to_string(&statistics).unwrap();
        let expected =
            r#"{"target_pages":256,"actual_pages":0,"target_mib":1,"actual_mib":0,"oom_kill":2}"#;
        assert_eq!(json, expected);
    }
}
