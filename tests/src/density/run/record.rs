//! What a run has found so far. Launches, consoles and samples write to it at the same time.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::density::model::{Guest, Mark, Sample};

/// Errors that are kept of one run; a fleet that fails says the same hundreds of times.
const ERRORS_MAX: usize = 50;

/// The place of a guest in the order of launches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct GuestIndex(usize);

/// A run's record.
#[derive(Debug)]
pub(crate) struct Record {
    began: Instant,
    found: Mutex<Found>,
}

/// What was found, as the report has it.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) guests: Vec<Guest>,
    pub(crate) samples: Vec<Sample>,
    pub(crate) marks: Vec<Mark>,
    pub(crate) errors: Vec<String>,
    /// Ended by the benchmark itself: their end is no incident.
    stopped: Vec<GuestIndex>,
    errors_left_out: usize,
    phase: String,
}

/// How far the fleet is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Asked for.
    pub(crate) asked: usize,
    /// Refused.
    pub(crate) refused: usize,
    /// Ended though nobody asked for it.
    pub(crate) lost: usize,
    /// Launched and not ended.
    pub(crate) running: usize,
    /// Of these, ready for work.
    pub(crate) ready: usize,
    /// Rounds of all guests, the ended ones included.
    pub(crate) rounds: u64,
}

impl Record {
    /// An empty one of a run that begins now.
    pub(crate) fn new() -> Record {
        Record {
            began: Instant::now(),
            found: Mutex::default(),
        }
    }

    /// When the run began.
    pub(crate) fn began(&self) -> Instant {
        self.began
    }

    /// Seconds since then.
    pub(crate) fn now_s(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }

    /// A guest is asked for.
    pub(crate) fn asked(&self, id: String) -> GuestIndex {
        let asked_at_s = self.now_s();
        let mut found = self.lock();
        found.guests.push(Guest {
            id,
            asked_at_s,
            launch_s: None,
            refusal: None,
            ready_at_s: None,
            ended: None,
            rounds: 0,
        });
        GuestIndex(found.guests.len() - 1)
    }

    /// It was launched, which took this long.
    pub(crate) fn launched(&self, index: GuestIndex, launch_s: f64) {
        self.with(index, |guest| guest.launch_s = Some(launch_s));
    }

    /// It was refused.
    pub(crate) fn refused(&self, index: GuestIndex, why: String) {
        self.with(index, |guest| guest.refusal = Some(why));
    }

    /// It is ready for work. The first time counts.
    pub(crate) fn ready(&self, index: GuestIndex) {
        let now_s = self.now_s();
        self.with(index, |guest| {
            guest.ready_at_s.get_or_insert(now_s);
        });
    }

    /// It has done so many rounds of work.
    pub(crate) fn rounds(&self, index: GuestIndex, rounds: u64) {
        self.with(index, |guest| guest.rounds = guest.rounds.max(rounds));
    }

    /// It has ended. The first reason counts. The run's own stop is an end only if it was planned
    /// for this guest by [`Record::stops`].
    pub(crate) fn ended(&self, index: GuestIndex, why: &str) {
        let now_s = self.now_s();
        self.with(index, |guest| {
            guest.ended.get_or_insert_with(|| (now_s, why.to_owned()));
        });
    }

    /// The benchmark is about to end it, as the workload has it.
    pub(crate) fn stops(&self, index: GuestIndex) {
        self.lock().stopped.push(index);
    }

    /// Adds a moment.
    pub(crate) fn mark(&self, name: &str) {
        let at_s = self.now_s();
        let name = name.to_owned();
        self.lock().marks.push(Mark { at_s, name });
    }

    /// Notes what went wrong.
    pub(crate) fn error(&self, text: String) {
        let mut found = self.lock();
        if found.errors.contains(&text) {
            return;
        }
        if found.errors.len() < ERRORS_MAX {
            found.errors.push(text);
        } else {
            found.errors_left_out += 1;
        }
    }

    /// Says what is being done.
    pub(crate) fn phase(&self, text: impl Into<String>) {
        self.lock().phase = text.into();
    }

    /// What is being done.
    pub(crate) fn current_phase(&self) -> String {
        self.lock().phase.clone()
    }

    /// Adds a look at the server, and to it how far the fleet is.
    pub(crate) fn sample(&self, mut sample: Sample) {
        let mut found = self.lock();
        let counts = found.counts();
        sample.guests_running = counts.running;
        sample.guests_ready = counts.ready;
        sample.rounds = counts.rounds;
        found.samples.push(sample);
    }

    /// How far the fleet is.
    pub(crate) fn counts(&self) -> Counts {
        self.lock().counts()
    }

    /// What each guest is at, in the order of launches.
    pub(crate) fn guests(&self) -> Vec<(GuestIndex, Guest)> {
        let found = self.lock();
        let indexes = (0..).map(GuestIndex);
        indexes.zip(found.guests.iter().cloned()).collect()
    }

    /// One guest.
    pub(crate) fn guest(&self, index: GuestIndex) -> Option<Guest> {
        self.lock().guests.get(index.0).cloned()
    }

    /// Usage of the cgroup over time, as (seconds since the run's begin, bytes).
    pub(crate) fn usage(&self) -> Vec<(f64, u64)> {
        let found = self.lock();
        let usage = |sample: &Sample| (sample.at_s, sample.memory.usage_bytes);
        found.samples.iter().map(usage).collect()
    }

    /// Usage of the cgroup at the last look.
    pub(crate) fn usage_bytes(&self) -> Option<u64> {
        let found = self.lock();
        found.samples.last().map(|one| one.memory.usage_bytes)
    }

    /// Everything; the record is empty afterwards.
    pub(crate) fn take(&self) -> Found {
        let mut found = std::mem::take(&mut *self.lock());
        if found.errors_left_out > 0 {
            let more = format!("and {} more errors", found.errors_left_out);
            found.errors.push(more);
        }
        found
    }

    fn with(&self, index: GuestIndex, change: impl FnOnce(&mut Guest)) {
        if let Some(guest) = self.lock().guests.get_mut(index.0) {
            change(guest);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Found> {
        // Each change is one statement: there is nothing half done to be seen after a panic.
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Found {
    fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        for (index, guest) in self.guests.iter().enumerate() {
            counts.asked += 1;
            counts.rounds += guest.rounds;
            counts.refused += usize::from(guest.refusal.is_some());
            if guest.ended.is_some() {
                counts.lost += usize::from(!self.stopped.contains(&GuestIndex(index)));
            } else if guest.launch_s.is_some() {
                counts.running += 1;
                counts.ready += usize::from(guest.ready_at_s.is_some());
            }
        }
        counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fleet_is_counted_by_what_became_of_its_guests() {
        let record = Record::new();
        let indexes: Vec<_> = (0..5)
            .map(|number| record.asked(format!("g{number}")))
            .collect();
        for &index in &indexes[..4] {
            record.launched(index, 0.1);
        }
        record.refused(indexes[4], "full".to_owned());
        record.ready(indexes[0]);
        record.ready(indexes[1]);
        record.rounds(indexes[1], 3);
        record.ended(indexes[1], "oom_victim");
        record.stops(indexes[2]);
        record.ended(indexes[2], "stopped");

        let expected = Counts {
            asked: 5,
            refused: 1,
            lost: 1,
            running: 2,
            ready: 1,
            rounds: 3,
        };
        assert_eq!(record.counts(), expected);
    }

    #[test]
    fn the_first_end_and_the_most_rounds_count() {
        let record = Record::new();
        let index = record.asked("g".to_owned());
        record.rounds(index, 5);
        record.rounds(index, 4);
        record.ended(index, "oom_victim");
        record.ended(index, "stopped");
        let guest = record.guest(index).unwrap();
        assert_eq!(guest.rounds, 5);
        assert_eq!(guest.ended.unwrap().1, "oom_victim");
    }

    #[test]
    fn errors_are_kept_once_and_not_without_end() {
        let record = Record::new();
        for number in 0..ERRORS_MAX + 7 {
            record.error(format!("error {number}"));
            record.error("error 0".to_owned());
        }
        let errors = record.take().errors;
        assert_eq!(errors.len(), ERRORS_MAX + 1);
        assert_eq!(errors[ERRORS_MAX], "and 7 more errors");
    }
}
