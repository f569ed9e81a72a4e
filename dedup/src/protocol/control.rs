//! What the worker is told: run or not, how fast, and what happened meanwhile.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::base::pace::{AdvisorMode, Pace};
use crate::protocol::advisor::{Advisor, rest};
use crate::protocol::scan_state::Batch;
use crate::protocol::stopwatch::Spent;

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

/// The pause does not double beyond this, whatever the pace: waking up for nothing is what an idle
/// domain costs.
const IDLE_PAUSE_MAX: Duration = Duration::from_millis(640);

/// Doublings after which a millisecond is beyond [`IDLE_PAUSE_MAX`].
const IDLE_LEVEL_MAX: u32 = 10;

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
    /// CPU time that the worker has taken.
    pub(crate) worker_cpu: Duration,
    idle_level: u32,
    advisor: Advisor,
    /// CPU time of the last batch.
    batch_cpu: Duration,
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
            worker_cpu: Duration::ZERO,
            idle_level: 0,
            advisor: Advisor::default(),
            batch_cpu: Duration::ZERO,
        }
    }

    /// Changes the pace. Without the advisor, what it advised last makes no sense any more: as
    /// with KSM the pages of a batch are then the default, unless they come with the change.
    pub(crate) fn set_pace(&mut self, pace: Pace) {
        let was_advised = self.pace.advisor_mode == AdvisorMode::ScanTime
            && self.pace.pages_to_scan == pace.pages_to_scan;
        self.pace = pace;
        if was_advised && pace.advisor_mode == AdvisorMode::None {
            self.pace.pages_to_scan = Pace::default().pages_to_scan;
        }
    }

    /// Takes note of a batch: a pass that changed nothing makes the next pauses longer.
    pub(crate) fn note_batch(&mut self, batch: &Batch, spent: Spent) {
        self.passes += batch.passes;
        if batch.changes > 0 {
            self.idle_level = 0;
        } else if batch.passes > 0 {
            self.idle_level = (self.idle_level + 1).min(IDLE_LEVEL_MAX);
        }
        self.worker_cpu += spent.cpu;
        self.batch_cpu = spent.cpu;
        self.advisor
            .note_batch(batch.pages, spent, batch.passes > 0);
        if self.pace.advisor_mode == AdvisorMode::ScanTime {
            self.pace.pages_to_scan = self.advisor.pages_to_scan(&self.pace, batch.due_pages);
        }
    }

    /// Takes note of how long the worker has paused.
    pub(crate) fn note_pause(&mut self, pause: Duration) {
        self.advisor.note_pause(pause);
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
        let sleep = Duration::from_millis(u64::from(sleep_millisecs));
        let idle = (sleep * (1 << self.idle_level)).min(IDLE_PAUSE_MAX);
        sleep
            .max(idle)
            .max(rest(self.batch_cpu, self.pace.cpu_percent()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(control: &mut Control, passes: u64, changes: u64) {
        let batch = Batch {
            passes,
            changes,
            ..Batch::default()
        };
        control.note_batch(&batch, Spent::default());
    }

    #[test]
    fn pauses_grow_while_nothing_changes_and_shrink_at_once() {
        let mut control = Control::new(Run::Merge, Pace::default());
        let short = control.pause();
        for _ in 0..20 {
            note(&mut control, 1, 0);
        }
        assert_eq!(control.pause(), short * 64);
        note(&mut control, 0, 0);
        assert_eq!(
            control.pause(),
            short * 64,
            "a batch inside a pass tells nothing"
        );
        note(&mut control, 1, 3);
        assert_eq!(control.pause(), short);
    }

    #[test]
    fn a_pace_without_pauses_pauses_when_nothing_changes() {
        let pace = Pace {
            sleep_millisecs: 0,
            ..Pace::default()
        };
        let mut control = Control::new(Run::Merge, pace);
        assert_eq!(control.pause(), Duration::ZERO);
        note(&mut control, 1, 0);
        assert_eq!(control.pause(), Duration::from_millis(2));
        for _ in 0..20 {
            note(&mut control, 1, 0);
        }
        assert_eq!(control.pause(), IDLE_PAUSE_MAX);
    }

    #[test]
    fn a_long_pause_stays_as_long_as_it_is() {
        let pace = Pace {
            sleep_millisecs: 5000,
            ..Pace::default()
        };
        let mut control = Control::new(Run::Merge, pace);
        note(&mut control, 1, 0);
        assert_eq!(control.pause(), Duration::from_millis(5000));
    }

    #[test]
    fn in_a_hurry_there_are_no_pauses_while_passes_change_something() {
        let mut control = Control::new(Run::Merge, Pace::default());
        control.hurry = true;
        note(&mut control, 1, 3);
        assert_eq!(control.pause(), Duration::ZERO);
        note(&mut control, 1, 0);
        assert!(
            control.pause() > Duration::ZERO,
            "nothing left to hurry for"
        );
    }

    #[test]
    fn nobody_who_waits_for_a_pass_waits_for_a_pause() {
        let mut control = Control::new(Run::Merge, Pace::default());
        control.waiters = 1;
        assert_eq!(control.pause(), Duration::ZERO);
    }

    #[test]
    fn pauses_keep_the_worker_within_its_share_of_a_cpu() {
        let pace = Pace {
            sleep_millisecs: 1,
            max_cpu_percent: 20,
            ..Pace::default()
        };
        let mut control = Control::new(Run::Merge, pace);
        let time = Duration::from_millis(5);
        let spent = Spent {
            cpu: time,
            wall: 2 * time,
        };
        control.note_batch(&Batch::default(), spent);
        assert_eq!(control.pause(), Duration::from_millis(20));
        assert_eq!(control.worker_cpu, time);
    }

    #[test]
    fn an_advisor_sets_the_pages_of_a_batch_until_it_is_switched_off() {
        let with_advisor = Pace {
            advisor_mode: AdvisorMode::ScanTime,
            ..Pace::default()
        };
        let mut control = Control::new(Run::Merge, with_advisor);
        let batch = Batch {
            due_pages: 1_000_000,
            ..Batch::default()
        };
        control.note_batch(&batch, Spent::default());
        assert_eq!(control.pace.pages_to_scan, 10_000);
        let advisor_mode = AdvisorMode::None;
        control.set_pace(Pace {
            advisor_mode,
            ..control.pace
        });
        assert_eq!(control.pace, Pace::default());
    }
}
