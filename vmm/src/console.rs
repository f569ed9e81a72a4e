//! A VM's console: what its serial port printed, and the way to type into it.
//!
//! Output goes into a bounded ring; every reader has its own position in it, so a slow or dead
//! reader costs nothing and can hold up neither the guest nor other readers. Rejected: a channel
//! per subscriber, which is either unbounded or makes the guest wait.
//!
//! A reader waits on its own thread, or as a task that leaves a [`Waker`]: hundreds of them then
//! need no thread. The waker is the standard library's, so no async runtime is named here.

use std::collections::{BTreeMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

/// Bytes of output kept.
pub const HISTORY_BYTES_MAX: usize = 256 << 10;

/// Most bytes that [`ConsoleReader::poll_read`] gives at once: what a task holds while its client
/// is slow, times as many tasks as there are.
const POLLED_BYTES_MAX: usize = 16 << 10;

/// Errors of [`Console::write_input`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConsoleError {
    /// The VM does not run, so nobody reads.
    #[error("console: the vm is not running")]
    NotRunning,
    /// The serial port's interrupt could not be raised.
    #[error("console: {0}")]
    Interrupt(String),
}

/// Where input goes: the serial port of a running VM.
pub(crate) trait InputSink: Send + Sync {
    /// Takes as much of `input` as there is room for and returns how much that was.
    fn write_input(&self, input: &[u8]) -> Result<usize, ConsoleError>;
}

/// A VM's console. Clones are the same console; it outlives the VM, with its history.
#[derive(Clone)]
pub struct Console {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Console {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let log = self.shared.lock();
        f.debug_struct("Console")
            .field("end", &log.end())
            .field("ended", &log.ended)
            .finish()
    }
}

struct Shared {
    log: Mutex<Log>,
    /// Output arrived, the guest took input, or the VM ended.
    changed: Condvar,
    input: Mutex<Option<Weak<dyn InputSink>>>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Log> {
        // A log is consistent between any two of its own statements: nothing to repair.
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the log by what readers want to know, and wakes all that wait.
    fn tell(&self, change: impl FnOnce(&mut Log)) {
        let waiting = {
            let mut log = self.lock();
            change(&mut log);
            std::mem::take(&mut log.waiting)
        };
        self.changed.notify_all();
        // Without the log's lock: a waker is code of its reader's, and may come back here.
        for waker in waiting.into_values() {
            if catch_unwind(AssertUnwindSafe(|| waker.wake())).is_err() {
                // Neither the guest that prints nor the other readers may pay for it.
                log::error!("console: waking a reader panicked");
            }
        }
    }
}

#[derive(Default)]
struct Log {
    ring: VecDeque<u8>,
    /// Position of the ring's first byte, counted from the first byte ever printed.
    start: u64,
    /// How often the guest made room for input.
    input_room_count: u64,
    ended: bool,
    /// How many readers there ever were: the number of the next one.
    reader_count: u64,
    /// Tasks to wake at the next output, by the number of their reader.
    waiting: BTreeMap<u64, Waker>,
}

impl Log {
    fn end(&self) -> u64 {
        self.start + self.ring.len() as u64
    }

    fn push(&mut self, bytes: &[u8]) {
        self.ring.extend(bytes);
        let excess = self.ring.len().saturating_sub(HISTORY_BYTES_MAX);
        self.ring.drain(..excess);
        self.start += excess as u64;
    }

    /// At most `max_bytes` from `position` on, and how many before them were already overwritten.
    fn since(&self, position: u64, max_bytes: usize) -> (Vec<u8>, u64) {
        let lost = self.start.saturating_sub(position);
        let skip = usize::try_from(position.saturating_sub(self.start)).unwrap_or(usize::MAX);
        let bytes = self.ring.iter().skip(skip).take(max_bytes);
        (bytes.copied().collect(), lost)
    }
}

impl Default for Console {
    fn default() -> Console {
        Console::new()
    }
}

impl Console {
    /// A console nothing was printed on.
    pub fn new() -> Console {
        let shared = Shared {
            log: Mutex::default(),
            changed: Condvar::new(),
            input: Mutex::default(),
        };
        Console {
            shared: Arc::new(shared),
        }
    }

    /// The last [`HISTORY_BYTES_MAX`] bytes printed.
    pub fn history(&self) -> Vec<u8> {
        self.shared.lock().since(0, HISTORY_BYTES_MAX).0
    }

    /// A reader that gets the history first and then what is printed from now on.
    pub fn subscribe(&self) -> ConsoleReader {
        let mut log = self.shared.lock();
        log.reader_count += 1;
        ConsoleReader {
            shared: self.shared.clone(),
            number: log.reader_count,
            position: log.start,
            lost_bytes: 0,
        }
    }

    /// Types `input`. Returns how many bytes were taken: fewer than given when the guest does not
    /// read fast enough, 0 when it does not read at all. Nothing is dropped.
    ///
    /// # Errors
    /// [`ConsoleError::NotRunning`] before the VM was started and after it ended.
    pub fn write_input(&self, input: &[u8]) -> Result<usize, ConsoleError> {
        let sink = self
            .shared
            .input
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        // Upgraded outside the lock: the serial port's own lock is taken next.
        let sink = sink
            .and_then(|sink| sink.upgrade())
            .ok_or(ConsoleError::NotRunning)?;
        sink.write_input(input)
    }

    /// Types all of `input`, waiting for the guest to read where needed. Returns how many bytes
    /// were taken by `deadline`.
    ///
    /// # Errors
    /// [`ConsoleError::NotRunning`] when the VM does not run or ends meanwhile.
    pub fn write_input_all(
        &self,
        mut input: &[u8],
        deadline: Instant,
    ) -> Result<usize, ConsoleError> {
        let whole = input.len();
        loop {
            // Read before the attempt: room made after it is then not missed.
            let room_seen = self.shared.lock().input_room_count;
            input = &input[self.write_input(input)?..];
            if input.is_empty() {
                return Ok(whole);
            }
            let log = self.shared.lock();
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                return Ok(whole - input.len());
            };
            let still = |log: &mut Log| log.input_room_count == room_seen && !log.ended;
            drop(
                self.shared
                    .changed
                    .wait_timeout_while(log, left, still)
                    .unwrap_or_else(PoisonError::into_inner),
            );
        }
    }

    /// Appends output of the guest.
    pub(crate) fn print(&self, bytes: &[u8]) {
        self.shared.tell(|log| log.push(bytes));
    }

    /// Connects the input to a serial port. Held weakly: the port belongs to the running VM.
    pub(crate) fn connect(&self, sink: Weak<dyn InputSink>) {
        *self
            .shared
            .input
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(sink);
    }

    /// Tells waiting writers that the guest took some input.
    pub(crate) fn input_room(&self) {
        self.shared.lock().input_room_count += 1;
        self.shared.changed.notify_all();
    }

    /// Tells readers that nothing more will come.
    pub(crate) fn end(&self) {
        *self
            .shared
            .input
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = None;
        self.shared.tell(|log| log.ended = true);
    }
}

/// What [`ConsoleReader::read`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConsoleRead {
    /// Output, at least one byte.
    Bytes(Vec<u8>),
    /// Nothing was printed in time.
    TimedOut,
    /// The VM ended and everything it printed was read.
    Ended,
}

/// One reader of a console, at its own position.
pub struct ConsoleReader {
    shared: Arc<Shared>,
    /// Its own among the console's readers.
    number: u64,
    position: u64,
    lost_bytes: u64,
}

impl std::fmt::Debug for ConsoleReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConsoleReader")
            .field("position", &self.position)
            .finish()
    }
}

impl ConsoleReader {
    /// Waits for output, at most `timeout`.
    pub fn read(&mut self, timeout: Duration) -> ConsoleRead {
        let shared = self.shared.clone();
        let position = self.position;
        let (log, _) = shared
            .changed
            .wait_timeout_while(shared.lock(), timeout, |log| {
                log.end() <= position && !log.ended
            })
            .unwrap_or_else(PoisonError::into_inner);
        let bytes = self.take(&log, HISTORY_BYTES_MAX);
        match (bytes.is_empty(), log.ended) {
            (false, _) => ConsoleRead::Bytes(bytes),
            (true, true) => ConsoleRead::Ended,
            (true, false) => ConsoleRead::TimedOut,
        }
    }

    /// Output, a piece at a time, for a task: it waits without a thread. `None` once the VM has
    /// ended and everything it printed was read.
    ///
    /// The task that asked last is woken when there is more. Its waker is called on the thread
    /// that prints, a vCPU's, and must not wait.
    pub fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Option<Vec<u8>>> {
        let shared = self.shared.clone();
        let mut log = shared.lock();
        let bytes = self.take(&log, POLLED_BYTES_MAX);
        if !bytes.is_empty() {
            return Poll::Ready(Some(bytes));
        }
        if log.ended {
            return Poll::Ready(None);
        }
        log.waiting.insert(self.number, cx.waker().clone());
        Poll::Pending
    }

    /// What is there to read, and moves on behind it.
    fn take(&mut self, log: &Log, max_bytes: usize) -> Vec<u8> {
        let (bytes, lost_bytes) = log.since(self.position, max_bytes);
        self.lost_bytes += lost_bytes;
        self.position += lost_bytes + bytes.len() as u64;
        bytes
    }

    /// Bytes this reader missed because it was slower than the guest by a whole history.
    pub fn lost_bytes(&self) -> u64 {
        self.lost_bytes
    }
}

impl Drop for ConsoleReader {
    fn drop(&mut self) {
        let waker = self.shared.lock().waiting.remove(&self.number);
        // Without the log's lock, as in `Shared::tell`.
        drop(waker);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    use super::*;

    const LONG: Duration = Duration::from_secs(120);

    #[test]
    fn a_reader_gets_the_history_first_and_then_what_follows() {
        let console = Console::new();
        console.print(b"early ");
        let mut reader = console.subscribe();
        assert_eq!(reader.read(LONG), ConsoleRead::Bytes(b"early ".to_vec()));
        assert_eq!(reader.read(Duration::ZERO), ConsoleRead::TimedOut);
        let printer = console.clone();
        let thread = std::thread::spawn(move || printer.print(b"late"));
        assert_eq!(reader.read(LONG), ConsoleRead::Bytes(b"late".to_vec()));
        thread.join().unwrap();
        assert_eq!(console.history(), b"early late");
    }

    #[test]
    fn the_end_is_seen_after_the_last_byte() {
        let console = Console::new();
        let mut reader = console.subscribe();
        console.print(b"x");
        console.end();
        assert_eq!(reader.read(LONG), ConsoleRead::Bytes(b"x".to_vec()));
        assert_eq!(reader.read(LONG), ConsoleRead::Ended);
        assert_eq!(console.write_input(b"y"), Err(ConsoleError::NotRunning));
    }

    #[test]
    fn history_is_bounded_and_a_slow_reader_knows_what_it_missed() {
        let console = Console::new();
        let mut reader = console.subscribe();
        console.print(&vec![b'a'; HISTORY_BYTES_MAX]);
        console.print(b"bcd");
        assert_eq!(console.history().len(), HISTORY_BYTES_MAX);
        let ConsoleRead::Bytes(bytes) = reader.read(LONG) else {
            panic!("no bytes")
        };
        assert_eq!(bytes.len(), HISTORY_BYTES_MAX);
        assert!(bytes.ends_with(b"abcd"));
        assert_eq!(reader.lost_bytes(), 3);
    }

    /// Counts how often it is woken, and may panic then.
    #[derive(Default)]
    struct Woken {
        count: AtomicUsize,
        panics: bool,
    }

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.count.fetch_add(1, Ordering::Relaxed);
            assert!(!self.panics, "as this test wants it");
        }
    }

    fn poll(reader: &mut ConsoleReader, woken: &Arc<Woken>) -> Poll<Option<Vec<u8>>> {
        reader.poll_read(&mut Context::from_waker(&Waker::from(woken.clone())))
    }

    #[test]
    fn a_polled_reader_is_woken_once_for_output_and_once_for_the_end() {
        let console = Console::new();
        let mut reader = console.subscribe();
        let woken = Arc::new(Woken::default());
        let count = || woken.count.load(Ordering::Relaxed);
        assert_eq!(poll(&mut reader, &woken), Poll::Pending);
        // Asked again: still one wake.
        assert_eq!(poll(&mut reader, &woken), Poll::Pending);
        console.print(b"a");
        console.print(b"b");
        assert_eq!(count(), 1);
        assert_eq!(poll(&mut reader, &woken), Poll::Ready(Some(b"ab".to_vec())));
        assert_eq!(poll(&mut reader, &woken), Poll::Pending);
        console.end();
        assert_eq!(count(), 2);
        assert_eq!(poll(&mut reader, &woken), Poll::Ready(None));
    }

    #[test]
    fn a_polled_reader_gets_a_long_history_in_pieces() {
        let console = Console::new();
        let printed: Vec<u8> = (0..=250).cycle().take(HISTORY_BYTES_MAX + 7).collect();
        let mut reader = console.subscribe();
        console.print(&printed);
        console.end();
        let woken = Arc::new(Woken::default());
        let mut read = Vec::new();
        while let Poll::Ready(Some(piece)) = poll(&mut reader, &woken) {
            assert!(piece.len() <= POLLED_BYTES_MAX);
            read.extend(piece);
        }
        assert_eq!(read, printed[7..]);
        assert_eq!(reader.lost_bytes(), 7);
    }

    #[test]
    fn a_reader_that_is_gone_is_woken_no_more() {
        let console = Console::new();
        let mut reader = console.subscribe();
        let woken = Arc::new(Woken::default());
        assert_eq!(poll(&mut reader, &woken), Poll::Pending);
        drop(reader);
        assert_eq!(Arc::strong_count(&woken), 1);
        console.print(b"a");
        assert_eq!(woken.count.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_reader_whose_waker_panics_takes_the_end_from_no_other() {
        let console = Console::new();
        let mut readers = [console.subscribe(), console.subscribe()];
        let rude = Arc::new(Woken {
            panics: true,
            ..Woken::default()
        });
        let polite = Arc::new(Woken::default());
        assert_eq!(poll(&mut readers[0], &rude), Poll::Pending);
        assert_eq!(poll(&mut readers[1], &polite), Poll::Pending);
        console.end();
        assert_eq!(rude.count.load(Ordering::Relaxed), 1);
        assert_eq!(polite.count.load(Ordering::Relaxed), 1);
        assert_eq!(poll(&mut readers[1], &polite), Poll::Ready(None));
    }

    struct Slow(Mutex<usize>);

    impl InputSink for Slow {
        fn write_input(&self, input: &[u8]) -> Result<usize, ConsoleError> {
            let taken = input
                .len()
                .min(std::mem::take(&mut *self.0.lock().unwrap()));
            Ok(taken)
        }
    }

    #[test]
    fn writing_all_waits_until_the_guest_makes_room() {
        let console = Console::new();
        let sink = Arc::new(Slow(Mutex::new(2)));
        let weak: Weak<dyn InputSink> = Arc::downgrade(&(sink.clone() as Arc<dyn InputSink>));
        console.connect(weak);
        let guest = console.clone();
        let room = sink.clone();
        let thread = std::thread::spawn(move || {
            *room.0.lock().unwrap() = 8;
            guest.input_room();
        });
        let deadline = Instant::now() + LONG;
        assert_eq!(console.write_input_all(b"hello", deadline), Ok(5));
        thread.join().unwrap();
        assert_eq!(
            console
                .write_input_all(b"hi", Instant::now())
                .map(|n| n <= 2),
            Ok(true)
        );
    }
}
