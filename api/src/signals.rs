//! Signals that end a command in order, where it has something to put right first.

use std::future::poll_fn;
use std::io;
use std::task::Poll;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Signals that are caught, for good.
#[derive(Debug)]
pub struct EndSignals {
    caught: Vec<(u8, Signal)>,
}

impl EndSignals {
    /// Catches `kinds`, but for a SIGHUP that our parent had ignored: whoever uses nohup wants us to
    /// stay.
    ///
    /// # Errors
    /// If the system refuses, or does not say what is ignored.
    pub fn catch(kinds: &[SignalKind]) -> io::Result<EndSignals> {
        let status = std::fs::read_to_string("/proc/self/status")?;
        let mut caught = Vec::new();
        for &kind in kinds {
            if kind == SignalKind::hangup() && ignores(&status, kind) {
                continue;
            }
            // Numbers of signals are below 65.
            let number = u8::try_from(kind.as_raw_value()).unwrap_or_default();
            caught.push((number, signal(kind)?));
        }
        Ok(EndSignals { caught })
    }

    /// Waits for the next of them; its number.
    pub async fn came(&mut self) -> u8 {
        poll_fn(|cx| {
            let mut caught = self.caught.iter_mut();
            let came = caught
                .find_map(|(number, signal)| signal.poll_recv(cx).is_ready().then_some(*number));
            came.map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }
}

/// Whether the process of this `/proc/PID/status` ignores `signal`: bit n - 1 of `SigIgn` is
/// signal n (`proc_pid_status(5)`).
fn ignores(status: &str, signal: SignalKind) -> bool {
    let mask = status
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal.as_raw_value() - 1) & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ignored_signals_are_told_from_the_others() {
        let status = "Name:\tsamepage\nSigBlk:\t0000000000000001\nSigIgn:\t0000000000001001\n";
        assert!(ignores(status, SignalKind::hangup()));
        assert!(ignores(status, SignalKind::pipe()));
        assert!(!ignores(status, SignalKind::terminate()));
        assert!(!ignores("", SignalKind::hangup()));
    }
}
