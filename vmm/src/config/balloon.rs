//! The balloon, as Firecracker's `balloon` describes it.

use serde::{Deserialize, Serialize};

use super::MergeMode;

/// Memory that the guest gives back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonConfig {
    /// How much the guest is to give up, in MiB.
    pub amount_mib: u32,
    /// Whether the guest takes memory back from the balloon rather than kill a process for it.
    pub deflate_on_oom: bool,
    /// How often the guest tells of its memory, in seconds; 0 for never.
    #[serde(default)]
    pub stats_polling_interval_s: u16,
    /// Firecracker's free page hinting, which is not supported.
    #[serde(default)]
    pub free_page_hinting: bool,
    /// Whether the guest gives back what it does not use, unasked. Where it is absent, it does if its
    /// memory is merged by the engine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub free_page_reporting: Option<bool>,
}

impl BalloonConfig {
    /// The same with what is absent filled in.
    pub fn resolved(self, merge: MergeMode) -> BalloonConfig {
        let reports = self.free_page_reporting.unwrap_or(merge == MergeMode::On);
        BalloonConfig {
            free_page_reporting: Some(reports),
            ..self
        }
    }
}

/// What may change of a balloon, also while its VM runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BalloonPatch {
    /// `amount_mib`.
    Amount(u32),
    /// `stats_polling_interval_s`: it can't become 0, nor be changed from that.
    Interval(u16),
}

impl BalloonConfig {
    /// Changes what `patch` has.
    pub(crate) fn update(&mut self, patch: BalloonPatch) {
        match patch {
            BalloonPatch::Amount(mib) => self.amount_mib = mib,
            BalloonPatch::Interval(seconds) => self.stats_polling_interval_s = seconds,
        }
    }
}
