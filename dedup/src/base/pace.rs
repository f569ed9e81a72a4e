//! How fast the worker scans, as its users set it.

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Who says how many pages a batch has; KSM's `advisor_mode`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AdvisorMode {
    /// The operator, by `pages_to_scan`.
    #[default]
    None,
    /// The advisor, by the target time of a pass.
    ScanTime,
}

/// How fast the worker scans.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pace {
    /// Pages visited in a batch. With an advisor, what it advised last.
    pub pages_to_scan: u32,
    /// Pause between two batches, in milliseconds. While passes change nothing it doubles, up to
    /// 640 ms.
    pub sleep_millisecs: u32,
    /// Highest share of one CPU for the worker, 1 to 100: pauses are made longer to keep it, with
    /// an advisor or without. Not kept while somebody waits for full scans.
    pub max_cpu_percent: u32,
    /// Who says how many pages a batch has.
    pub advisor_mode: AdvisorMode,
    /// In this time the advisor has everything visited that is due, in milliseconds: what was
    /// written to in regions with a [`DirtySource`](crate::DirtySource), all of any other. KSM's
    /// `advisor_target_scan_time` is in seconds.
    pub target_scan_time_ms: u32,
    /// Fewest pages that the advisor may advise, as KSM's file of this name.
    pub advisor_min_pages_to_scan: u32,
    /// Most pages that the advisor may advise, as KSM's file of this name.
    pub advisor_max_pages_to_scan: u32,
}

/// A pace that makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum PaceError {
    /// A batch without pages would never end a pass.
    #[error("{0} 0: must be at least 1")]
    NoPages(&'static str),
    /// Not a share of one CPU.
    #[error("max_cpu_percent {0}: must be 1 to 100")]
    Cpu(u32),
    /// No time.
    #[error("target_scan_time_ms 0: must be at least 1")]
    NoTime,
    /// Bounds that leave nothing between them.
    #[error("advisor_min_pages_to_scan {min}: is above advisor_max_pages_to_scan {max}")]
    Bounds {
        /// The lower one.
        min: u32,
        /// The upper one.
        max: u32,
    },
}

impl Pace {
    /// Checks the limits.
    ///
    /// # Errors
    /// [`PaceError`] for the first value that is out of them.
    pub fn validate(&self) -> Result<(), PaceError> {
        let (min, max) = (
            self.advisor_min_pages_to_scan,
            self.advisor_max_pages_to_scan,
        );
        if self.pages_to_scan == 0 {
            return Err(PaceError::NoPages("pages_to_scan"));
        }
        if min == 0 {
            return Err(PaceError::NoPages("advisor_min_pages_to_scan"));
        }
        if !(1..=100).contains(&self.max_cpu_percent) {
            return Err(PaceError::Cpu(self.max_cpu_percent));
        }
        if self.target_scan_time_ms == 0 {
            return Err(PaceError::NoTime);
        }
        if min > max {
            return Err(PaceError::Bounds { min, max });
        }
        Ok(())
    }

    pub(crate) fn cpu_percent(&self) -> u32 {
        self.max_cpu_percent.clamp(1, 100)
    }
}

impl Default for Pace {
    /// 2048 pages, then 10 ms: a few percent of a core while there is something to do. KSM's 100
    /// pages and 20 ms would take a quarter of an hour for 16 GiB.
    fn default() -> Pace {
        Pace {
            pages_to_scan: 2048,
            sleep_millisecs: 10,
            max_cpu_percent: 100,
            advisor_mode: AdvisorMode::None,
            target_scan_time_ms: 1000,
            advisor_min_pages_to_scan: 500,
            advisor_max_pages_to_scan: 30_000,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pace_that_makes_no_sense_is_refused_with_the_value() {
        let refused = |change: fn(&mut Pace)| {
            let mut pace = Pace::default();
            change(&mut pace);
            pace.validate().unwrap_err()
        };
        Pace::default().validate().unwrap();
        assert_eq!(
            refused(|pace| pace.pages_to_scan = 0),
            PaceError::NoPages("pages_to_scan")
        );
        assert_eq!(
            refused(|pace| pace.max_cpu_percent = 101),
            PaceError::Cpu(101)
        );
        assert_eq!(refused(|pace| pace.max_cpu_percent = 0), PaceError::Cpu(0));
        assert_eq!(
            refused(|pace| pace.target_scan_time_ms = 0),
            PaceError::NoTime
        );
        let (min, max) = (500, 499);
        assert_eq!(
            refused(|pace| pace.advisor_max_pages_to_scan = 499),
            PaceError::Bounds { min, max }
        );
    }
}
