//! A rate limiter with a timer that has the queue served again.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::timerfd::TimerFd;

use crate::config::RateLimiterConfig;
use crate::rate_limiter::RateLimiter;

/// Limits what a queue serves. A clone is another handle of the same limit, by which it can be
/// changed while the device works.
#[derive(Clone)]
pub struct Throttle {
    state: Arc<Mutex<State>>,
    waker: RawFd,
}

/// The lock is a leaf, held for one decision.
struct State {
    limiter: RateLimiter,
    timer: TimerFd,
}

impl std::fmt::Debug for Throttle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Throttle")
            .field(&self.lock().limiter)
            .finish()
    }
}

impl Throttle {
    /// A limit as configured, or none.
    ///
    /// # Errors
    /// No timer can be made.
    pub fn new(config: Option<&RateLimiterConfig>) -> io::Result<Throttle> {
        let timer = TimerFd::new()?;
        Ok(Throttle {
            waker: timer.as_raw_fd(),
            state: Arc::new(Mutex::new(State {
                limiter: RateLimiter::new(config, Instant::now()),
                timer,
            })),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A limiter is whole after any panic: it is changed by sums.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts new buckets in place of those that `config` has. Whoever waits for the old ones tries
    /// again at once.
    pub fn update(&self, config: &RateLimiterConfig) {
        let mut state = self.lock();
        state.limiter.update(config, Instant::now());
        if let Err(error) = state.timer.reset(Duration::from_nanos(1), None) {
            // What waits does so for as long as it was told before.
            log::error!("rate limiter: cannot set a timer: {error}");
        }
    }

    /// Becomes readable when what was refused should be tried again. To be watched edge-triggered:
    /// nobody reads it.
    pub(super) fn waker(&self) -> RawFd {
        self.waker
    }

    /// Takes one operation of `bytes` bytes. Where there are no tokens for it nothing is taken, and
    /// the timer goes off when there will be.
    pub(super) fn take(&self, bytes: u64) -> bool {
        let mut state = self.lock();
        match state.limiter.take(bytes, Instant::now()) {
            Ok(()) => true,
            Err(wait) => match state.timer.reset(wait, None) {
                Ok(()) => false,
                Err(error) => {
                    // Without a timer nobody would come back to the queue: rather no limit.
                    log::error!("rate limiter: cannot set a timer of {wait:?}: {error}");
                    true
                }
            },
        }
    }
}
