//! Where a drive's file is read, written, flushed and closed: a thread of its own, while it is needed.
//!
//! Storage may not answer for minutes, or never. So nobody else waits for it: not the event loop,
//! which serves all devices of a domain, and not the reaper, which ends all its VMs. A drive has one
//! piece of I/O in hand at a time, so its requests are done in order, and a drive that hangs keeps
//! one thread, which no other drive needs. The thread is started by the first piece, and ends when
//! none came for [`IDLE`].
//!
//! A piece moves bytes between the file and a buffer of its own, never guest memory. What is written
//! late, after its VM has ended, is written to the file that it was meant for; what is read late goes
//! nowhere. And no page of a guest is pinned that the merge engine may replace meanwhile.
//!
//! Rejected: a pool of threads for each domain, which so many drives that hang use up. `io_uring`: where
//! I/O would wait the kernel takes a thread as well, so it is no faster; see ARCHITECTURE.md, section
//! 10.
//!
//! # Locks
//! `Shared::state` is a leaf, held for moments: never while a file is used.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::super::Doorbells;

/// How long a thread waits for the next piece before it ends.
const IDLE: Duration = Duration::from_secs(5);
/// A piece that takes longer is not waited for when its VM ends.
const SLOW: Duration = Duration::from_millis(500);
/// Stack of a thread: it makes system calls and little else.
const STACK_BYTES: usize = 256 << 10;
/// For fuzz targets, where whoever waits for a piece does it (`Closing::settle`): an input then has
/// one outcome, and no time goes into switches between threads.
const IS_THREADLESS: bool = cfg!(all(feature = "fuzzing", not(test)));

/// What is done with the file.
#[derive(Debug)]
pub(crate) enum Operation {
    /// Fills the buffer.
    Read { offset: u64, buffer: Vec<u8> },
    /// Writes all of the buffer.
    Write { offset: u64, buffer: Vec<u8> },
    /// Makes what was written durable.
    Flush,
}

impl Operation {
    fn carry_out(self, file: &File) -> io::Result<Vec<u8>> {
        match self {
            Operation::Read { offset, mut buffer } => {
                file.read_exact_at(&mut buffer, offset)?;
                Ok(buffer)
            }
            Operation::Write { offset, buffer } => {
                file.write_all_at(&buffer, offset)?;
                Ok(buffer)
            }
            Operation::Flush => {
                file.sync_data()?;
                Ok(Vec::new())
            }
        }
    }
}

/// What became of the piece in hand.
#[derive(Debug)]
pub(crate) enum Polled {
    /// There is none.
    Idle,
    /// It is not done. The doorbell rings when it is.
    Busy,
    /// It is done; its buffer.
    Done(io::Result<Vec<u8>>),
}

/// A drive's lane. Dropping it has the file closed, without waiting for it.
#[derive(Debug)]
pub(crate) struct Lane {
    /// `None` once it is dropped.
    file: Option<Arc<File>>,
    label: String,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    piece: Piece,
    /// Nobody wants to hear of the piece in hand: the device was reset.
    is_abandoned: bool,
    doorbells: Option<Doorbells>,
    has_thread: bool,
    end: End,
    /// As storage that does not answer.
    #[cfg(test)]
    is_hung: bool,
}

#[derive(Debug, Default)]
enum Piece {
    #[default]
    None,
    /// With the file, so that the thread has none of its own between two pieces.
    Waiting(Operation, Arc<File>),
    UnderWay(Instant),
    Done(io::Result<Vec<u8>>),
}

#[derive(Debug, Default)]
enum End {
    #[default]
    Open,
    Closing(Arc<File>),
    /// By the thread, just now.
    Hand,
    Closed,
}

impl Lane {
    /// A lane without a thread. `label` names it in log messages.
    pub(crate) fn new(file: File, label: &str) -> Lane {
        Lane {
            file: Some(Arc::new(file)),
            label: label.to_owned(),
            shared: Arc::default(),
        }
    }

    /// Rings `doorbells[0]` whenever a piece is done, from now on.
    pub(crate) fn connect(&self, doorbells: Doorbells) {
        self.shared.lock().doorbells = Some(doorbells);
    }

    /// The file, for what never waits.
    pub(crate) fn file(&self) -> Option<&File> {
        self.file.as_deref()
    }

    /// Takes what is done; what was abandoned is thrown away.
    pub(crate) fn poll(&self) -> Polled {
        let mut state = self.shared.lock();
        match std::mem::take(&mut state.piece) {
            Piece::None => Polled::Idle,
            Piece::Done(_) if state.is_abandoned => {
                state.is_abandoned = false;
                Polled::Idle
            }
            Piece::Done(done) => Polled::Done(done),
            busy @ (Piece::Waiting(..) | Piece::UnderWay(_)) => {
                state.piece = busy;
                Polled::Busy
            }
        }
    }

    /// Hands in the next piece. The lane must be idle.
    pub(crate) fn submit(&self, operation: Operation) {
        let Some(file) = &self.file else {
            return;
        };
        let mut state = self.shared.lock();
        debug_assert!(matches!(state.piece, Piece::None), "one piece at a time");
        state.piece = Piece::Waiting(operation, file.clone());
        if let Err(error) = self.shared.wake(&mut state, &self.label) {
            state.piece = Piece::Done(Err(error));
            drop(state);
            self.shared.ring();
        }
    }

    /// Lets go of the piece in hand: what is read is thrown away. What is written may be written yet,
    /// before anything that is handed in later.
    pub(crate) fn abandon(&self) {
        let mut state = self.shared.lock();
        match state.piece {
            Piece::None => {}
            Piece::Done(_) => state.piece = Piece::None,
            Piece::Waiting(..) | Piece::UnderWay(_) => state.is_abandoned = true,
        }
    }

    /// What waits for the file to be closed once the lane is dropped.
    pub(crate) fn closing(&self) -> Closing {
        Closing(self.shared.clone())
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        let Some(file) = self.file.take() else {
            return;
        };
        let mut state = self.shared.lock();
        state.doorbells = None;
        // One that was not begun is as if the guest had not asked yet.
        let begun = std::mem::take(&mut state.piece);
        if let Piece::UnderWay(_) = begun {
            state.piece = begun;
        }
        state.end = End::Closing(file);
        if let Err(error) = self.shared.wake(&mut state, &self.label) {
            log::warn!("{}: no thread to close the drive: {error}", self.label);
            let file = std::mem::replace(&mut state.end, End::Closed);
            drop(state);
            drop(file);
            self.shared.changed.notify_all();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Its fields are set one at a time: whole after any panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has a thread look at the state.
    fn wake(self: &Arc<Shared>, state: &mut State, label: &str) -> io::Result<()> {
        if IS_THREADLESS {
            return Ok(());
        }
        if state.has_thread {
            self.changed.notify_all();
            return Ok(());
        }
        let shared = self.clone();
        std::thread::Builder::new()
            .name(format!("io:{label}"))
            .stack_size(STACK_BYTES)
            .spawn(move || shared.work())?;
        state.has_thread = true;
        Ok(())
    }

    fn ring(&self) {
        self.changed.notify_all();
        let doorbells = self.lock().doorbells.clone();
        if let Some(doorbell) = doorbells.as_deref().and_then(<[_]>::first) {
            // A counter that is full rings as well.
            let _full = doorbell.write(1);
        }
    }

    /// The thread.
    fn work(&self) {
        while self.step() {}
    }

    /// Does what is next. False if nothing comes after it.
    fn step(&self) -> bool {
        match self.next() {
            Some(Next::Piece(operation, file)) => {
                #[cfg(test)]
                self.hang();
                let done = operation.carry_out(&file);
                // Before anybody hears of it: the last one to hold the file closes it.
                drop(file);
                self.lock().piece = Piece::Done(done);
                self.ring();
                true
            }
            Some(Next::Close(file)) => {
                drop(file);
                self.lock().end = End::Closed;
                self.changed.notify_all();
                false
            }
            None => false,
        }
    }

    #[cfg(test)]
    fn hang(&self) {
        let hung = self.changed.wait_while(self.lock(), |state| state.is_hung);
        drop(hung.unwrap_or_else(PoisonError::into_inner));
    }

    /// What is to be done next; `None` if the thread is to end.
    fn next(&self) -> Option<Next> {
        let is_idle = |state: &mut State| {
            !matches!(state.piece, Piece::Waiting(..)) && !matches!(state.end, End::Closing(_))
        };
        let (mut state, _) = self
            .changed
            .wait_timeout_while(self.lock(), IDLE, is_idle)
            .unwrap_or_else(PoisonError::into_inner);
        match std::mem::take(&mut state.piece) {
            Piece::Waiting(operation, file) => {
                state.piece = Piece::UnderWay(Instant::now());
                return Some(Next::Piece(operation, file));
            }
            other => state.piece = other,
        }
        match std::mem::replace(&mut state.end, End::Hand) {
            End::Closing(file) => Some(Next::Close(file)),
            other => {
                state.end = other;
                state.has_thread = false;
                None
            }
        }
    }
}

enum Next {
    Piece(Operation, Arc<File>),
    Close(Arc<File>),
}

/// Tells when a drive's file is closed.
#[derive(Debug)]
pub struct Closing(Arc<Shared>);

impl Closing {
    #[cfg(test)]
    fn is_under_way(&self) -> bool {
        matches!(self.0.lock().piece, Piece::UnderWay(_))
    }

    #[cfg(test)]
    pub(crate) fn set_hung(&self, is_hung: bool) {
        self.0.lock().is_hung = is_hung;
        self.0.changed.notify_all();
    }

    /// Waits until no piece is under way. True if one is done that somebody wants to hear of.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn settle(&self) -> bool {
        if IS_THREADLESS && matches!(self.0.lock().piece, Piece::Waiting(..)) {
            self.0.step();
        }
        let is_busy =
            |state: &mut State| matches!(state.piece, Piece::Waiting(..) | Piece::UnderWay(_));
        let settled = self.0.changed.wait_while(self.0.lock(), is_busy);
        let state = settled.unwrap_or_else(PoisonError::into_inner);
        matches!(state.piece, Piece::Done(_)) && !state.is_abandoned
    }

    /// Waits until the file is closed, and whoever wants the drive's lock can have it. Not any longer
    /// than until `deadline`, and not for storage that is known to be slow. False if it is open.
    pub fn wait(&self, deadline: Instant) -> bool {
        let mut state = self.0.lock();
        loop {
            if matches!(state.end, End::Closed) {
                return true;
            }
            let now = Instant::now();
            let until = match state.piece {
                Piece::UnderWay(since) => deadline.min(since + SLOW),
                _ => deadline,
            };
            if now >= until {
                return false;
            }
            let (woken, _) = self
                .0
                .changed
                .wait_timeout(state, until - now)
                .unwrap_or_else(PoisonError::into_inner);
            state = woken;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    const LONG: Duration = Duration::from_secs(120);

    fn lane() -> Lane {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(b"0123456789", 0).unwrap();
        Lane::new(file, "test")
    }

    fn done(lane: &Lane) -> io::Result<Vec<u8>> {
        lane.closing().settle();
        match lane.poll() {
            Polled::Done(done) => done,
            other => panic!("{other:?}"),
        }
    }

    fn read(offset: u64, length: usize) -> Operation {
        Operation::Read {
            offset,
            buffer: vec![0; length],
        }
    }

    #[test]
    fn pieces_are_done_in_order_and_the_doorbell_rings() {
        let lane = lane();
        let doorbells: Doorbells = [EventFd::new(EFD_NONBLOCK).unwrap()].into();
        lane.connect(doorbells.clone());
        assert!(matches!(lane.poll(), Polled::Idle));
        let write = Operation::Write {
            offset: 3,
            buffer: b"abc".to_vec(),
        };
        lane.submit(write);
        done(&lane).unwrap();
        lane.submit(read(2, 5));
        assert_eq!(done(&lane).unwrap(), b"2abc6");
        lane.submit(Operation::Flush);
        done(&lane).unwrap();
        lane.submit(read(8, 5));
        let error = done(&lane).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        drop(lane);
        assert_ne!(doorbells[0].read().unwrap(), 0);
    }

    #[test]
    fn nobody_hears_of_a_piece_that_was_abandoned() {
        let lane = lane();
        lane.submit(read(0, 3));
        lane.abandon();
        lane.closing().settle();
        assert!(matches!(lane.poll(), Polled::Idle));
        lane.submit(read(4, 2));
        assert_eq!(done(&lane).unwrap(), b"45");
    }

    #[test]
    fn the_file_is_closed_when_the_lane_was_dropped_and_not_before() {
        for is_used in [false, true] {
            let lane = lane();
            let closing = lane.closing();
            if is_used {
                lane.submit(read(0, 3));
                done(&lane).unwrap();
            }
            assert!(!closing.wait(Instant::now()));
            drop(lane);
            assert!(closing.wait(Instant::now() + LONG));
        }
    }

    #[test]
    fn nobody_waits_for_storage_that_does_not_answer() {
        let lane = lane();
        let closing = lane.closing();
        closing.set_hung(true);
        lane.submit(read(0, 3));
        assert!(matches!(lane.poll(), Polled::Busy));
        let deadline = Instant::now() + LONG;
        while !closing.is_under_way() {
            assert!(Instant::now() < deadline, "nobody began");
            std::thread::yield_now();
        }
        let waiting = lane.closing();
        drop(lane);
        // There is time, and no sense in waiting for so long.
        let (told, heard) = mpsc::channel();
        std::thread::spawn(move || told.send(waiting.wait(Instant::now() + LONG * 1000)));
        assert!(!heard.recv_timeout(LONG).expect("an answer"));
        closing.set_hung(false);
        closing.settle();
        assert!(closing.wait(Instant::now() + LONG));
    }

    #[test]
    fn a_piece_that_was_begun_is_finished_after_the_lane_was_dropped() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let lane = Lane::new(File::create(&path).unwrap(), "test");
        let closing = lane.closing();
        lane.submit(Operation::Write {
            offset: 0,
            buffer: vec![7; 9],
        });
        drop(lane);
        assert!(closing.wait(Instant::now() + LONG));
        // Begun or not: never half of it.
        let length = std::fs::read(&path).unwrap().len();
        assert!(length == 0 || length == 9, "{length}");
    }
}
