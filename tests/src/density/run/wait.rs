//! Waiting for a condition, with a deadline, beside other tasks.

use std::time::{Duration, Instant};

/// Time between two looks.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// Returns true as soon as `condition` holds, false if it does not by the deadline. There is one
/// pause at least if it does not hold at once.
pub(crate) async fn poll_until(deadline: Instant, mut condition: impl FnMut() -> bool) -> bool {
    while !condition() {
        tokio::time::sleep(LOOK_INTERVAL).await;
        if Instant::now() >= deadline {
            return condition();
        }
    }
    true
}
