//! What a stretch of work takes, of the clock and of the calling thread's CPU time.

use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

/// Time that a batch took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Spent {
    pub(crate) cpu: Duration,
    pub(crate) wall: Duration,
}

/// Started where the work begins, on the thread that does it.
#[derive(Debug)]
pub(crate) struct Stopwatch {
    begun: Instant,
    cpu_before: Duration,
}

impl Stopwatch {
    pub(crate) fn start() -> Stopwatch {
        Stopwatch {
            begun: Instant::now(),
            cpu_before: thread_cpu(),
        }
    }

    pub(crate) fn spent(&self) -> Spent {
        Spent {
            cpu: thread_cpu().saturating_sub(self.cpu_before),
            wall: self.begun.elapsed(),
        }
    }
}

/// CPU time of the calling thread, system calls included (`CLOCK_THREAD_CPUTIME_ID`).
fn thread_cpu() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_takes_cpu_time_and_waiting_takes_none() {
        let working = Stopwatch::start();
        let mut sum = 0_u64;
        while working.spent().cpu < Duration::from_millis(5) {
            sum = std::hint::black_box(sum + 1);
        }
        assert!(working.spent().wall >= Duration::from_millis(5));
        let waiting = Stopwatch::start();
        let (_sender, receiver) = std::sync::mpsc::channel::<()>();
        let silence = receiver.recv_timeout(Duration::from_millis(50));
        assert!(silence.is_err());
        assert!(waiting.spent().cpu < Duration::from_millis(25));
    }
}
