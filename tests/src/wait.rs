//! Waiting for a condition, with a deadline.

use std::time::{Duration, Instant};

/// Time between two looks.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);

/// Returns as soon as `condition` holds.
///
/// # Panics
/// If it does not hold within `time`.
pub fn wait_until(what: &str, time: Duration, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + time;
    while !condition() {
        assert!(Instant::now() < deadline, "not within {time:?}: {what}");
        std::thread::sleep(LOOK_INTERVAL);
    }
}
