//! What is shown while runs are made: a bar on a terminal, lines now and then elsewhere.

use std::io::IsTerminal;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytesize::ByteSize;
use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::task::JoinHandle;
use tokio::time::interval;

use super::record::Record;
use crate::density::model::{Arm, Fleet, Run};
use crate::density::plan::expected_s;

/// Time between two changes of the bar,
const BAR_INTERVAL: Duration = Duration::from_millis(500);
/// and between two lines in one phase of a run.
const LINE_INTERVAL: Duration = Duration::from_secs(15);

/// The progress of all runs.
#[derive(Debug)]
pub(crate) struct Progress {
    is_terminal: bool,
    runs: usize,
    /// The run that is being made, counted from 1; its bar, and what it is called.
    current: Option<(usize, ProgressBar, Arm)>,
    began: Instant,
    /// What the plan expects the runs before the current one to take, and all of them.
    expected_before_s: f64,
    expected_all_s: f64,
}

impl Progress {
    /// Of these runs. Says how long they will take.
    pub(crate) fn new(arms: &[Arm]) -> Progress {
        let expected_all_s = arms.iter().map(expected_s).sum();
        let progress = Progress {
            is_terminal: std::io::stderr().is_terminal(),
            runs: arms.len(),
            current: None,
            began: Instant::now(),
            expected_before_s: 0.0,
            expected_all_s,
        };
        let about = HumanDuration(Duration::from_secs_f64(expected_all_s));
        progress.say(&format!("{} runs, about {about}", arms.len()));
        progress
    }

    /// The next run begins.
    pub(crate) fn begin(&mut self, arm: Arm) {
        let number = self.current.as_ref().map_or(0, |(number, ..)| *number) + 1;
        let target = if self.is_terminal {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        };
        let bar = ProgressBar::with_draw_target(Some(permille(1.0)), target);
        if let Ok(style) = ProgressStyle::with_template("{prefix} [{bar:24}] {wide_msg}") {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_prefix(format!("{number}/{} {}", self.runs, title(&arm)));
        self.current = Some((number, bar, arm));
    }

    /// Shows the run's record until the handle is aborted.
    pub(crate) fn follow(&self, record: Arc<Record>) -> JoinHandle<()> {
        let Some((_, bar, arm)) = self.current.clone() else {
            return tokio::spawn(std::future::ready(()));
        };
        let (is_terminal, expected_s) = (self.is_terminal, expected_s(&arm));
        let after_s = (self.expected_all_s - self.expected_before_s - expected_s).max(0.0);
        tokio::spawn(async move {
            let mut ticks = interval(BAR_INTERVAL);
            let mut last: Option<(String, Instant)> = None;
            loop {
                ticks.tick().await;
                let spent_s = record.now_s();
                bar.set_position(permille(spent_s / expected_s));
                let left_s = (expected_s - spent_s).max(0.0) + after_s;
                let line = line(&record, left_s);
                bar.set_message(line.clone());
                let phase = record.current_phase();
                let is_due = last.as_ref().is_none_or(|(shown, at)| {
                    kind(shown) != kind(&phase) || at.elapsed() >= LINE_INTERVAL
                });
                if !is_terminal && is_due {
                    eprintln!("{} {line}", bar.prefix());
                    last = Some((phase, Instant::now()));
                }
            }
        })
    }

    /// The current run is over.
    pub(crate) fn end(&mut self, run: &Run) {
        self.expected_before_s += expected_s(&run.arm);
        let Some((number, bar, _)) = &self.current else {
            return;
        };
        bar.finish_and_clear();
        let took_s = run.samples.last().map_or(0.0, |sample| sample.at_s);
        let took = HumanDuration(Duration::from_secs_f64(took_s));
        let peak = ByteSize::b(run.peak_bytes);
        let mut line = format!(
            "{number}/{} {}: {took}, peak {peak}",
            self.runs,
            title(&run.arm)
        );
        for error in &run.errors {
            line += &format!("\n    error: {error}");
        }
        self.say(&line);
    }

    /// No run is being made any more.
    pub(crate) fn clear(&mut self) {
        if let Some((_, bar, _)) = self.current.take() {
            bar.finish_and_clear();
        }
    }

    /// How long all runs took.
    pub(crate) fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    fn say(&self, text: &str) {
        eprintln!("{text}");
    }
}

/// What a run is, in few words.
pub(crate) fn title(arm: &Arm) -> String {
    let fleet = match arm.fleet {
        Fleet::Vms(vms) => format!("{vms} vms"),
        Fleet::UntilFull(most) => format!(
            "until {} or {most} vms",
            ByteSize::b(arm.memory_limit_bytes)
        ),
    };
    format!("{} {} ({fleet}, thp {})", arm.workload, arm.engine, arm.thp)
}

fn line(record: &Record, left_s: f64) -> String {
    let counts = record.counts();
    let memory = ByteSize::b(record.usage_bytes().unwrap_or(0));
    let mut line = format!(
        "{}: {} of {} ready, {memory}, {} to go",
        record.current_phase(),
        counts.ready,
        counts.running,
        HumanDuration(Duration::from_secs_f64(left_s)),
    );
    if counts.lost + counts.refused > 0 {
        line += &format!(", {} ended, {} refused", counts.lost, counts.refused);
    }
    line
}

/// A phase without its numbers: two launches are one phase.
fn kind(phase: &str) -> &str {
    phase
        .find(|c: char| c.is_ascii_digit())
        .map_or(phase, |at| &phase[..at])
}

fn permille(part: f64) -> u64 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "within 0 to 1000"
    )]
    let permille = (part.clamp(0.0, 1.0) * 1000.0) as u64;
    permille
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_are_told_apart_without_their_numbers() {
        assert_eq!(kind("launching 3 of 40"), kind("launching 4 of 40"));
        assert_ne!(kind("launching 3 of 40"), kind("measuring at rest"));
    }

    #[test]
    fn a_part_is_shown_within_the_bar() {
        assert_eq!(permille(-1.0), 0);
        assert_eq!(permille(0.25), 250);
        assert_eq!(permille(7.0), 1000);
        assert_eq!(permille(f64::NAN), 0);
    }
}
