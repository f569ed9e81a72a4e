//! Warnings of what may go wrong in each of thousands of merges: said now and then.

use std::fmt::Display;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Time between two warnings from one line of code.
const SILENCE: Duration = Duration::from_secs(5);

/// What one line of code complains of.
#[derive(Debug)]
pub(crate) struct Complaints(Mutex<State>);

#[derive(Debug)]
struct State {
    said: Option<Instant>,
    kept_back: u64,
}

impl Complaints {
    pub(crate) const fn new() -> Complaints {
        let state = State {
            said: None,
            kept_back: 0,
        };
        Complaints(Mutex::new(state))
    }

    /// Logs a problem, unless the last one was just now.
    pub(crate) fn say(&self, level: log::Level, problem: impl Display) {
        match self.admit(Instant::now()) {
            None => {}
            Some(0) => log::log!(level, "{problem}"),
            Some(kept_back) => log::log!(level, "{problem}; {kept_back} more such problems before"),
        }
    }

    /// Whether a problem is to be said now, and how many were not since the last one.
    fn admit(&self, now: Instant) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_soon = |said: Instant| now.saturating_duration_since(said) < SILENCE;
        if state.said.is_some_and(is_soon) {
            state.kept_back += 1;
            return None;
        }
        state.said = Some(now);
        Some(std::mem::take(&mut state.kept_back))
    }
}

/// Logs a problem, once in five seconds at most for the line that this stands in.
macro_rules! complain {
    ($level:ident, $($problem:tt)+) => {{
        static COMPLAINTS: $crate::base::complaints::Complaints = $crate::base::complaints::Complaints::new();
        COMPLAINTS.say(log::Level::$level, format_args!($($problem)+));
    }};
}

pub(crate) use complain;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_warning_in_five_seconds_tells_how_many_were_left_out() {
        let complaints = Complaints::new();
        let begun = Instant::now();
        let said: Vec<u64> = (0..10_000)
            .filter_map(|ms| complaints.admit(begun + Duration::from_millis(ms)))
            .collect();
        assert_eq!(said, [0, 4999]);
    }
}
