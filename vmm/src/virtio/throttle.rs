//! A rate limiter with a timer that has the queue served again.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Instant;

use vmm_sys_util::timerfd::TimerFd;

use crate::config::RateLimiterConfig;
use crate::rate_limiter::RateLimiter;

/// Limits what a queue serves.
pub struct Throttle {
    limiter: RateLimiter,
    timer: TimerFd,
}

impl std::fmt::Debug for Throttle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Throttle").field(&self.limiter).finish()
    }
}

impl Throttle {
    /// A limit as configured, or none.
    ///
    /// # Errors
    /// No timer can be made.
    pub fn new(config: Option<&RateLimiterConfig>) -> io::Result<Throttle> {
        Ok(Throttle {
            limiter: RateLimiter::new(config, Instant::now()),
            timer: TimerFd::new()?,
        })
    }

    /// Becomes readable when what was refused should be tried again. To be watched edge-triggered:
    /// nobody reads it.
    pub(super) fn waker(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    /// Takes one operation of `bytes` bytes. Where there are no tokens for it nothing is taken, and
    /// the timer goes off when there will be.
    pub(super) fn take(&mut self, bytes: u64) -> bool {
        match self.limiter.take(bytes, Instant::now()) {
            Ok(()) => true,
            Err(wait) => match self.timer.reset(wait, None) {
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
