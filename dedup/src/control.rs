//! What the worker is told: run or not, how fast, and what happened meanwhile.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What the engine does, with KSM's three values of `run`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Run {
    /// 0: no merging; what is merged stays merged.
    Stop,
    /// 1: merge.
    #[default]
    Merge,
    /// 2: no merging; what was merged is private again.
    Unmerge,
}

/// How fast the worker scans.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pace {
    /// Pages visited in a batch.
    pub pages_to_scan: u32,
    /// Pause between two batches, in milliseconds. While passes change nothing it doubles, up to
    /// 64 times.
    pub sleep_millisecs: u32,
}

impl Default for Pace {
    /// 2048 pages, then 10 ms: a few percent of a core while there is something to do. KSM's 100
    /// pages and 20 ms would take a quarter of an hour for 16 GiB.
    fn default() -> Pace {
        Pace {
            pages_to_scan: 2048,
            sleep_millisecs: 10,
        }
    }
}

/// The pause never doubles more often than this.
const IDLE_LEVEL_MAX: u32 = 6;

/// The worker's orders, behind the control lock.
#[derive(Debug)]
pub(crate) struct Control {
    pub(crate) run: Run,
    pub(crate) pace: Pace,
    /// The engine is going.
    pub(crate) stop: bool,
    /// Something happened that the worker should look at without delay.
    pub(crate) kicked: bool,
    /// There are exiting regions to finish.
    pub(crate) reap: bool,
    /// Callers who wait for passes; the worker does not pause while there are any.
    pub(crate) waiters: u32,
    /// Memory is short: no pauses while passes still change something.
    pub(crate) hurry: bool,
    /// Passes ended since the engine was made.
    pub(crate) passes: u64,
    idle_level: u32,
}

impl Control {
    pub(crate) fn new(run: Run, pace: Pace) -> Control {
        Control {
            run,
            pace,
            stop: false,
            kicked: false,
            reap: false,
            waiters: 0,
            hurry: false,
            passes: 0,
            idle_level: 0,
        }
    }

    /// Takes note of a batch: a pass that changed nothing makes the next pauses longer.
    pub(crate) fn note_batch(&mut self, passes: u64, changes: u64) {
        self.passes += passes;
        if changes > 0 {
            self.idle_level = 0;
        } else if passes > 0 {
            self.idle_level = (self.idle_level + 1).min(IDLE_LEVEL_MAX);
        }
    }

    /// Ends the quiet of [`Control::note_batch`].
    pub(crate) fn wake_up(&mut self) {
        self.idle_level = 0;
    }

    /// How long to pause now.
    pub(crate) fn pause(&self) -> Duration {
        if self.waiters > 0 || (self.hurry && self.idle_level == 0) {
            return Duration::ZERO;
        }
        // A pace without pauses still must not burn a core for nothing.
        let idle_millisecs = u32::from(self.idle_level > 0);
        let sleep_millisecs = self.pace.sleep_millisecs.max(idle_millisecs);
        Duration::from_millis(u64::from(sleep_millisecs)) * (1 << self.idle_level)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_while_nothing_changes_and_shrink_at_once() {
        let mut control = Control::new(Run::Merge, Pace::default());
        let short = control.pause();
        for _ in 0..20 {
            control.note_batch(1, 0);
        }
        assert_eq!(control.pause(), short * 64);
        control.note_batch(0, 0);
        assert_eq!(
            control.pause(),
            short * 64,
            "a batch inside a pass tells nothing"
        );
        control.note_batch(1, 3);
        assert_eq!(control.pause(), short);
    }

    #[test]
    fn a_pace_without_pauses_pauses_when_nothing_changes() {
        let pace = Pace {
            pages_to_scan: 1,
            sleep_millisecs: 0,
        };
        let mut control = Control::new(Run::Merge, pace);
        assert_eq!(control.pause(), Duration::ZERO);
        control.note_batch(1, 0);
        assert_eq!(control.pause(), Duration::from_millis(2));
    }

    #[test]
    fn nobody_who_waits_for_a_pass_waits_for_a_pause() {
        let mut control = Control::new(Run::Merge, Pace::default());
        control.waiters = 1;
        assert_eq!(control.pause(), Duration::ZERO);
    }
}
