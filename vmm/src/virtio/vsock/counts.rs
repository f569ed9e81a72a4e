//! What a vsock device counts.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters of a VM's vsock device, by Firecracker's names: `rx` is to the guest.
#[derive(Debug, Default)]
pub struct VsockCounts {
    pub(super) rx_bytes: AtomicU64,
    pub(super) tx_bytes: AtomicU64,
    pub(super) rx_packets: AtomicU64,
    pub(super) tx_packets: AtomicU64,
    pub(super) conns_added: AtomicU64,
    pub(super) conns_killed: AtomicU64,
    pub(super) conns_removed: AtomicU64,
}

pub(super) fn add(count: &AtomicU64, more: usize) {
    count.fetch_add(more as u64, Ordering::Relaxed);
}

impl VsockCounts {
    /// The counters' names.
    pub const NAMES: [&'static str; 7] = [
        "rx_bytes_count",
        "tx_bytes_count",
        "rx_packets_count",
        "tx_packets_count",
        "conns_added",
        "conns_killed",
        "conns_removed",
    ];

    /// What was counted since the last call, by name.
    pub fn take(&self) -> [(&'static str, u64); 7] {
        let counts = [
            &self.rx_bytes,
            &self.tx_bytes,
            &self.rx_packets,
            &self.tx_packets,
            &self.conns_added,
            &self.conns_killed,
            &self.conns_removed,
        ];
        let mut named = Self::NAMES.map(|name| (name, 0));
        for ((_, value), count) in named.iter_mut().zip(counts) {
            *value = count.swap(0, Ordering::Relaxed);
        }
        named
    }
}
