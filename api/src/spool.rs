//! A file that a thread of its own writes, so that nobody waits long for its storage.
//!
//! Storage may not answer for minutes, or never, nor may the reader of a pipe. Whoever writes a line may
//! hold what others need: a VM's state, or the event loop of a domain. So a line is queued. Its writer
//! waits until it is in the file, but not for a write that takes longer than [`SLOW`]: the first line
//! after storage hung costs that time, the next ones cost none. A line that does not fit into the queue
//! is dropped and counted.
//!
//! Rejected: not to wait at all. Then a line is not there yet when its request is answered, and is lost
//! when the process ends right behind it.
//!
//! # Locks
//! `Shared::state` is a leaf, held for moments: never while the file is used.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Most bytes that wait to be written.
pub const QUEUE_BYTES_MAX: usize = 256 << 10;
/// A write that takes longer is not waited for.
pub const SLOW: Duration = Duration::from_millis(500);
/// Stack of a thread: it makes system calls and little else.
const STACK_BYTES: usize = 256 << 10;

/// The way to the file. Dropping it has the file closed once all is written, without waiting for it.
#[derive(Debug)]
pub struct Spool {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<Vec<u8>>,
    /// Of the queue, and of the line that is being written.
    queued_bytes: usize,
    /// Since when a line is being written.
    under_way: Option<Instant>,
    /// How many lines were ever queued, and how many of these are done, written or not.
    queued: u64,
    done: u64,
    /// The number of the last line that could not be written; 0 if there is none.
    last_failed: u64,
    lost: u64,
    is_closed: bool,
}

impl Spool {
    /// Starts the thread called `name` that writes to `file`.
    ///
    /// # Errors
    /// If there can be no thread.
    pub fn new(file: impl Write + Send + 'static, name: &str) -> io::Result<Spool> {
        let shared: Arc<Shared> = Arc::default();
        let its = Arc::clone(&shared);
        thread::Builder::new()
            .name(name.to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || its.work(file))?;
        Ok(Spool { shared })
    }

    /// Hands in a line, and waits until it is written: not for `patience`, nor for storage that is known
    /// to be slow. False if the line is lost; one that is not written yet is not lost yet.
    pub fn write(&self, line: &[u8], patience: Duration) -> bool {
        let mut state = self.shared.lock();
        if state.queued_bytes + line.len() > QUEUE_BYTES_MAX {
            state.lost += 1;
            return false;
        }
        state.queue.push_back(line.to_owned());
        state.queued_bytes += line.len();
        state.queued += 1;
        let number = state.queued;
        self.shared.changed.notify_all();
        let deadline = Instant::now() + patience;
        loop {
            if state.done >= number {
                return state.last_failed != number;
            }
            let slow = |since: Instant| deadline.min(since + SLOW);
            let until = state.under_way.map_or(deadline, slow);
            let Some(left) = until.checked_duration_since(Instant::now()) else {
                return true;
            };
            let waited = self.shared.changed.wait_timeout(state, left);
            (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// How many lines were ever lost.
    pub fn lost(&self) -> u64 {
        self.shared.lock().lost
    }
}

impl Drop for Spool {
    fn drop(&mut self) {
        self.shared.lock().is_closed = true;
        self.shared.changed.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Numbers and whole lines: of use after any panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread.
    fn work(&self, mut file: impl Write) {
        while let Some(line) = self.next() {
            let is_written = file.write_all(&line).is_ok();
            let mut state = self.lock();
            state.under_way = None;
            state.queued_bytes -= line.len();
            state.done += 1;
            if !is_written {
                state.last_failed = state.done;
                state.lost += 1;
            }
            self.changed.notify_all();
        }
    }

    /// The next line; `None` once there is none and none will come.
    fn next(&self) -> Option<Vec<u8>> {
        let is_idle = |state: &mut State| state.queue.is_empty() && !state.is_closed;
        let waited = self.changed.wait_while(self.lock(), is_idle);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner);
        let line = state.queue.pop_front()?;
        state.under_way = Some(Instant::now());
        // From now on its writer waits for no longer than this may take.
        self.changed.notify_all();
        Some(line)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;

    const LONG: Duration = Duration::from_secs(120);

    /// Storage that does nothing before it is told to.
    struct Held {
        permits: Receiver<io::Result<()>>,
        written: Sender<Vec<u8>>,
    }

    impl Write for Held {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.permits.recv().expect("the test lives")?;
            self.written.send(bytes.to_owned()).expect("the test lives");
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn held() -> (Spool, Sender<io::Result<()>>, Receiver<Vec<u8>>) {
        let (permit, permits) = channel();
        let (written, writes) = channel();
        let spool = Spool::new(Held { permits, written }, "test").unwrap();
        (spool, permit, writes)
    }

    #[test]
    fn a_line_is_written_when_its_writer_goes_on() {
        let (spool, permit, writes) = held();
        permit.send(Ok(())).unwrap();
        assert!(spool.write(b"one", LONG));
        assert_eq!(writes.try_recv().unwrap(), b"one");
    }

    #[test]
    fn a_line_that_cannot_be_written_is_lost_and_those_behind_it_are_not() {
        let (spool, permit, writes) = held();
        permit.send(Err(io::ErrorKind::StorageFull.into())).unwrap();
        permit.send(Ok(())).unwrap();
        assert!(!spool.write(b"one", LONG));
        assert!(spool.write(b"two", LONG));
        assert_eq!((spool.lost(), writes.recv().unwrap()), (1, b"two".to_vec()));
    }

    #[test]
    fn storage_that_hangs_is_waited_for_by_nobody_and_loses_what_its_queue_has_no_room_for() {
        let (spool, permit, writes) = held();
        let line = [7; 64 << 10];
        let queued = QUEUE_BYTES_MAX / line.len();
        let (told, heard) = channel();
        thread::spawn(move || {
            let patience = LONG * 1000;
            let taken = (0..queued + 3).filter(|_| spool.write(&line, patience));
            told.send((taken.count(), spool)).unwrap();
        });
        let (taken, spool) = heard.recv_timeout(LONG).expect("nobody waits for so long");
        assert_eq!((taken, spool.lost()), (queued, 3));
        for _ in 0..=queued {
            permit.send(Ok(())).unwrap();
        }
        // All that was queued is written, also when nobody can hand in more.
        drop(spool);
        assert_eq!(writes.iter().count(), queued);
    }
}
