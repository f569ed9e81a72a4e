//! How the demo went.

use serde::Serialize;

use crate::bytes::in_units;
use crate::command::CommandError;

/// Part of the duplicate pages that must be given back, in percent.
const SHARED_PERCENT_MIN: u64 = 95;

/// The demo's result; its JSON form is the last line of `demo --json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Summary {
    /// Number of VMs.
    pub(super) vms: u16,
    /// What ran in them.
    pub(super) guest: &'static str,
    /// PSS of the server with all guests' memory filled and nothing merged.
    pub(super) memory_before_bytes: u64,
    /// PSS of the server with everything merged, while all guests still ran.
    pub(super) memory_after_bytes: u64,
    /// Shared pages.
    pub(super) pages_shared: u64,
    /// Guest pages that use them beyond the first.
    pub(super) pages_sharing: u64,
    /// Zero pages given back.
    pub(super) pages_zero: u64,
    /// Pages that could be given back, by the workload's oracle; null where it has none.
    pub(super) duplicate_pages: Option<u64>,
    /// Bytes given back, net of pool, mappings and records.
    pub(super) saved_bytes: i64,
    /// Pages that guests found with wrong contents, over all VMs.
    pub(super) verify_errors: u64,
    /// Passes over all their pages that guests verified, over all VMs.
    pub(super) verify_passes: u64,
    /// From the demo's start to the end of its server.
    pub(super) elapsed_ms: u64,
}

impl Summary {
    pub(super) fn to_json(&self) -> Result<String, CommandError> {
        serde_json::to_string(self)
            .map(|line| line + "\n")
            .map_err(|error| CommandError::Other(format!("no json form: {error}")))
    }

    pub(super) fn to_text(&self) -> String {
        let mut lines = vec![
            format!("{} {} vms, {} ms", self.vms, self.guest, self.elapsed_ms),
            format!(
                "  memory   {} before, {} after (PSS of the server)",
                in_units(i128::from(self.memory_before_bytes)),
                in_units(i128::from(self.memory_after_bytes)),
            ),
            format!(
                "  pages    {} shared by {} more, {} zero",
                self.pages_shared, self.pages_sharing, self.pages_zero
            ),
            format!(
                "  saved    {} net of all costs",
                in_units(i128::from(self.saved_bytes))
            ),
            format!(
                "  verified {} passes, {} errors",
                self.verify_passes, self.verify_errors
            ),
        ];
        if let Some(duplicates) = self.duplicate_pages {
            let percent = self.given_back() * 100 / duplicates.max(1);
            let line = format!("  given back {percent} % of {duplicates} duplicate pages");
            lines.insert(3, line);
        }
        lines.join("\n") + "\n"
    }

    fn given_back(&self) -> u64 {
        self.pages_sharing + self.pages_zero
    }

    /// Why the demo has not shown what it should; `None` if it has.
    pub(super) fn shortcoming(&self) -> Option<String> {
        if self.verify_errors > 0 {
            return Some(format!("{} pages had wrong contents", self.verify_errors));
        }
        let duplicates = self.duplicate_pages?;
        let is_short = self.given_back() * 100 < duplicates * SHARED_PERCENT_MIN;
        is_short.then(|| {
            format!(
                "only {} of {duplicates} duplicate pages were given back, less than {} %",
                self.given_back(),
                SHARED_PERCENT_MIN
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary() -> Summary {
        Summary {
            vms: 8,
            guest: "pageload",
            memory_before_bytes: 512 << 20,
            memory_after_bytes: 128 << 20,
            pages_shared: 10,
            pages_sharing: 70,
            pages_zero: 25,
            duplicate_pages: Some(100),
            saved_bytes: 1 << 20,
            verify_errors: 0,
            verify_passes: 24,
            elapsed_ms: 5000,
        }
    }

    #[test]
    fn json_has_exactly_the_promised_keys() {
        let json: serde_json::Value = serde_json::from_str(&summary().to_json().unwrap()).unwrap();
        let mut keys: Vec<_> = json.as_object().unwrap().keys().cloned().collect();
        keys.sort();
        let mut promised = [
            "vms",
            "guest",
            "memory_before_bytes",
            "memory_after_bytes",
            "pages_shared",
            "pages_sharing",
            "pages_zero",
            "duplicate_pages",
            "saved_bytes",
            "verify_errors",
            "verify_passes",
            "elapsed_ms",
        ];
        promised.sort_unstable();
        assert_eq!(keys, promised);
    }

    #[test]
    fn demo_falls_short_by_an_error_or_too_little_sharing() {
        assert_eq!(summary().shortcoming(), None);
        let wrong = Summary {
            verify_errors: 1,
            ..summary()
        };
        assert!(wrong.shortcoming().unwrap().contains("wrong contents"));
        let little = Summary {
            pages_zero: 24,
            ..summary()
        };
        assert!(little.shortcoming().unwrap().contains("94 of 100"));
        let unknown = Summary {
            duplicate_pages: None,
            pages_zero: 0,
            ..summary()
        };
        assert_eq!(unknown.shortcoming(), None);
    }
}
