//! A bound on what a guest can make us log.

use std::time::{Duration, Instant};

/// Messages let through in one window.
const MESSAGES_PER_WINDOW: u32 = 8;
/// Length of a window.
const WINDOW: Duration = Duration::from_secs(60);

/// Lets a few messages through per window and counts the rest.
///
/// For messages whose number the guest decides: without a bound, a loop in a guest is a full disk
/// on the host.
#[derive(Debug, Default)]
pub struct LogLimit {
    window_start: Option<Instant>,
    passed: u32,
    left_out: u64,
}

impl LogLimit {
    /// A limit nothing was counted against.
    pub fn new() -> Self {
        LogLimit::default()
    }

    /// Whether to log a message now: `Some` with the number of messages left out since the last one
    /// that passed.
    pub fn admit(&mut self, now: Instant) -> Option<u64> {
        let expired = self
            .window_start
            .is_none_or(|start| now.saturating_duration_since(start) >= WINDOW);
        if expired {
            self.window_start = Some(now);
            self.passed = 0;
        }
        if self.passed >= MESSAGES_PER_WINDOW {
            self.left_out += 1;
            return None;
        }
        self.passed += 1;
        Some(std::mem::take(&mut self.left_out))
    }

    /// Logs a warning about the device `label`, if the limit admits it.
    pub fn warn(&mut self, label: &str, problem: &dyn std::fmt::Display) {
        match self.admit(Instant::now()) {
            Some(0) => log::warn!("{label}: {problem}"),
            Some(left_out) => {
                log::warn!("{label}: {problem} ({left_out} messages before this one left out)");
            }
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_passes_a_few_messages_and_is_counted() {
        let mut limit = LogLimit::new();
        let start = Instant::now();
        let passed = (0..1000).filter(|_| limit.admit(start).is_some()).count();
        assert_eq!(passed, MESSAGES_PER_WINDOW as usize);
        assert_eq!(
            limit.admit(start + WINDOW),
            Some(1000 - u64::from(MESSAGES_PER_WINDOW))
        );
        assert_eq!(limit.admit(start + WINDOW), Some(0));
    }
}
