//! Waiting for a condition, with a deadline.

use std::time::{Duration, Instant};

/// How long a test waits for anything that a healthy machine brings about, however loaded: only a
/// hang is longer.
pub const PATIENCE: Duration = Duration::from_secs(120);

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
