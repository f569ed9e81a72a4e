//! What a balloon has done, for Firecracker's metrics.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters of a VM's balloon since they were last taken.
#[derive(Debug, Default)]
pub struct BalloonCounts {
    pub(super) inflations: AtomicU64,
    pub(super) deflations: AtomicU64,
    pub(super) statistics: AtomicU64,
    pub(super) bad_statistics: AtomicU64,
    pub(super) reports: AtomicU64,
    pub(super) reported_bytes: AtomicU64,
    pub(super) failed_reports: AtomicU64,
    pub(super) failures: AtomicU64,
}

impl BalloonCounts {
    /// Takes all of them, by Firecracker's names. Each count is taken once.
    pub fn take(&self) -> [(&'static str, u64); 8] {
        [
            ("inflate_count", &self.inflations),
            ("deflate_count", &self.deflations),
            ("stats_updates_count", &self.statistics),
            ("stats_update_fails", &self.bad_statistics),
            ("free_page_report_count", &self.reports),
            ("free_page_report_freed", &self.reported_bytes),
            ("free_page_report_fails", &self.failed_reports),
            ("event_fails", &self.failures),
        ]
        .map(|(name, count)| (name, count.swap(0, Ordering::Relaxed)))
    }

    pub(super) fn add(count: &AtomicU64, more: u64) {
        count.fetch_add(more, Ordering::Relaxed);
    }
}
