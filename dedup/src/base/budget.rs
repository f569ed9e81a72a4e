//! The memory budget as the engine keeps it: nothing is allocated for a merge or an unmerge that
//! was not reserved first.
//!
//! What is taken already is not added up here: guests take memory without asking (each write to a
//! shared page does), so a [`MemoryGauge`] is asked for the real figure whenever it matters, and
//! only what was promised and does not show in that figure yet is kept: a reservation is held until
//! after the allocation, and remembered until the figure is younger than that. What is counted twice
//! meanwhile errs on the safe side.
//!
//! # Locks
//! `Budget::state` is a leaf. It is not held while the gauge is asked, which reads files and may have
//! locks of its own: beside busy guests the worker may be off the CPU for tens of milliseconds
//! meanwhile, and an exit, which tells that memory was given back, would wait for it. Whoever looks
//! after the guests while memory runs out asks for the budget and for what is waited for without the
//! lock.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::base::page::pages_to_bytes;
use crate::base::sync::{self, Condvar, Mutex};

/// Pages of the pool that a merge may fill although nothing is left. Two guests' pages go for
/// each, so a worker that waited here would keep back what it waits for.
const MERGE_OVERDRAFT_PAGES: u32 = 16;

/// How long an unmerge waits for memory where nobody is expected to give any back.
pub(crate) const UNMERGE_PATIENCE: Duration = Duration::from_millis(500);

/// Longest time between two looks at the gauge while somebody waits: it does not say by itself
/// that guests gave something back.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// Tells how much memory may still be taken.
pub trait MemoryGauge: fmt::Debug + Send + Sync {
    /// What may still be taken within `budget_bytes` (`None`: no budget) and within any limit that
    /// the gauge knows of itself. `None` where nothing limits.
    fn headroom(&self, budget_bytes: Option<u64>) -> Option<Headroom>;
}

/// Memory that may still be taken, as it was at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Headroom {
    /// So much.
    pub bytes: u64,
    /// What was taken from this moment on is not counted.
    pub as_of: Instant,
}

/// Why a reservation was not made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(crate) enum Shortage {
    /// Whoever it was for does not want it any more.
    #[error("interrupted by a new order")]
    Cancelled,
    /// Nobody gave memory back in time.
    #[error("the memory budget is short of {missing_bytes} bytes")]
    Starved {
        /// What would have been enough.
        missing_bytes: u64,
    },
}

impl From<Shortage> for io::Error {
    fn from(shortage: Shortage) -> io::Error {
        let kind = match shortage {
            Shortage::Cancelled => io::ErrorKind::Interrupted,
            Shortage::Starved { .. } => io::ErrorKind::OutOfMemory,
        };
        io::Error::new(kind, shortage)
    }
}

/// The budget of one domain.
#[derive(Debug)]
pub(crate) struct Budget {
    /// In bytes; [`UNLIMITED`] for none. Written with the lock, read without.
    limit: AtomicU64,
    /// What those who wait would need, in bytes. Written with the lock, read without.
    waiting: AtomicU64,
    state: Mutex<State>,
    changed: Condvar,
}

/// More than any machine has.
const UNLIMITED: u64 = u64::MAX;

#[derive(Debug)]
struct State {
    gauge: Option<Arc<dyn MemoryGauge>>,
    /// Promised.
    reserved_bytes: u64,
    /// Promised and taken, at this moment; kept until the gauge's figure is younger.
    taken: VecDeque<(Instant, u64)>,
    /// Orders that sent away who waited.
    cancels: u64,
    /// Times that somebody said that there is more memory now.
    wakes: u64,
    patience: Duration,
}

impl State {
    /// Bytes that can be promised now, by what the gauge said; `None` where nothing limits.
    fn room_bytes(&mut self, headroom: Option<Headroom>) -> Option<u64> {
        let Some(headroom) = headroom else {
            self.taken.clear();
            return None;
        };
        while self
            .taken
            .front()
            .is_some_and(|&(at, _)| at < headroom.as_of)
        {
            self.taken.pop_front();
        }
        let unseen_bytes: u64 = self.taken.iter().map(|&(_, bytes)| bytes).sum();
        let promised_bytes = self.reserved_bytes + unseen_bytes;
        Some(headroom.bytes.saturating_sub(promised_bytes))
    }
}

/// Memory that was promised. Dropped once it was taken: then it is the gauge's to show it.
#[derive(Debug)]
pub(crate) struct Reservation {
    budget: Arc<Budget>,
    bytes: u64,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut state = sync::lock(&self.budget.state);
        state.reserved_bytes -= self.bytes;
        if state.gauge.is_some() {
            state.taken.push_back((Instant::now(), self.bytes));
        }
        drop(state);
        self.budget.changed.notify_all();
    }
}

/// Somebody who waits for memory, as [`Budget::waiting_bytes`] tells it.
struct Waiting<'a> {
    budget: &'a Budget,
    bytes: u64,
}

impl<'a> Waiting<'a> {
    fn new(budget: &'a Budget, bytes: u64) -> Waiting<'a> {
        budget.waiting.fetch_add(bytes, Ordering::Relaxed);
        Waiting { budget, bytes }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.budget.waiting.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl Budget {
    /// A budget that limits nothing until it has a gauge.
    pub(crate) fn new() -> Arc<Budget> {
        let state = State {
            gauge: None,
            reserved_bytes: 0,
            taken: VecDeque::new(),
            cancels: 0,
            wakes: 0,
            patience: UNMERGE_PATIENCE,
        };
        Arc::new(Budget {
            limit: AtomicU64::new(UNLIMITED),
            waiting: AtomicU64::new(0),
            state: Mutex::new(state),
            changed: Condvar::new(),
        })
    }

    /// Asks `gauge` from now on.
    pub(crate) fn set_gauge(&self, gauge: Arc<dyn MemoryGauge>) {
        sync::lock(&self.state).gauge = Some(gauge);
        self.changed.notify_all();
    }

    /// Changes the budget; `None` for none.
    pub(crate) fn set_bytes(&self, budget_bytes: Option<u64>) {
        let mut state = sync::lock(&self.state);
        let limit_bytes = budget_bytes.unwrap_or(UNLIMITED);
        self.limit.store(limit_bytes, Ordering::Relaxed);
        // Nobody kept account while there was none.
        state.taken.clear();
        state.wakes += 1;
        drop(state);
        self.changed.notify_all();
    }

    /// The budget; `None` for none. Waits for nobody.
    pub(crate) fn bytes(&self) -> Option<u64> {
        let limit_bytes = self.limit.load(Ordering::Relaxed);
        (limit_bytes != UNLIMITED).then_some(limit_bytes)
    }

    /// Changes how long an unmerge waits for memory.
    pub(crate) fn set_patience(&self, patience: Duration) {
        sync::lock(&self.state).patience = patience;
        self.changed.notify_all();
    }

    /// Bytes that somebody waits for; 0 when nobody does. Waits for nobody.
    pub(crate) fn waiting_bytes(&self) -> u64 {
        self.waiting.load(Ordering::Relaxed)
    }

    /// Has those who wait look again: memory was given back, or a region is exiting.
    pub(crate) fn wake(&self) {
        // With the lock, so that nobody who has just looked misses it.
        sync::lock(&self.state).wakes += 1;
        self.changed.notify_all();
    }

    /// Sends away everybody who waits now.
    pub(crate) fn cancel_waiters(&self) {
        sync::lock(&self.state).cancels += 1;
        self.changed.notify_all();
    }

    /// What the gauge says, asked without the lock.
    fn headroom(&self) -> Option<Headroom> {
        let gauge = sync::lock(&self.state).gauge.clone();
        gauge?.headroom(self.bytes())
    }

    /// Whether `bytes` could be reserved without waiting.
    pub(crate) fn has_room(&self, bytes: u64) -> bool {
        let headroom = self.headroom();
        let room_bytes = sync::lock(&self.state).room_bytes(headroom);
        room_bytes.is_none_or(|room| room >= bytes)
    }

    /// Reserves `bytes`, and waits for them as long as the domain's patience allows.
    ///
    /// # Errors
    /// [`Shortage`], also as soon as `is_cancelled` says so after a [`Budget::wake`].
    pub(crate) fn reserve(
        self: &Arc<Budget>,
        bytes: u64,
        is_cancelled: impl Fn() -> bool,
    ) -> Result<Reservation, Shortage> {
        let state = sync::lock(&self.state);
        let (cancels, mut wakes, begun) = (state.cancels, state.wakes, Instant::now());
        drop(state);
        // Told from the first wait to the end of the last, the looks between them included.
        let mut waiting = None;
        loop {
            let headroom = self.headroom();
            let mut state = sync::lock(&self.state);
            if is_cancelled() || state.cancels != cancels {
                return Err(Shortage::Cancelled);
            }
            let missing_bytes = match state.room_bytes(headroom) {
                Some(room) if room < bytes => bytes - room,
                _ => {
                    state.reserved_bytes += bytes;
                    return Ok(self.reservation(bytes));
                }
            };
            let Some(left) = state.patience.checked_sub(begun.elapsed()) else {
                return Err(Shortage::Starved { missing_bytes });
            };
            waiting.get_or_insert_with(|| Waiting::new(self, bytes));
            // What was given back after the gauge was asked may be enough.
            if state.wakes == wakes {
                state = sync::wait_timeout(&self.changed, state, left.min(LOOK_INTERVAL));
            }
            wakes = state.wakes;
        }
    }

    /// Reserves pool pages for a merge: `pages` of them, or as many as there are, or a few all the
    /// same. Never waits: a merge gives back more than it takes. Returns how many.
    pub(crate) fn reserve_for_merge(self: &Arc<Budget>, pages: u32) -> (Reservation, u32) {
        let headroom = self.headroom();
        let mut state = sync::lock(&self.state);
        let room_pages = match state.room_bytes(headroom) {
            Some(bytes) => u32::try_from(bytes / bytes_of(1)).unwrap_or(u32::MAX),
            None => u32::MAX,
        };
        let granted = pages.min(room_pages.max(MERGE_OVERDRAFT_PAGES));
        state.reserved_bytes += bytes_of(granted);
        (self.reservation(bytes_of(granted)), granted)
    }

    fn reservation(self: &Arc<Budget>, bytes: u64) -> Reservation {
        let budget = Arc::clone(self);
        Reservation { budget, bytes }
    }
}

/// Bytes that `pages` pages take.
pub(crate) fn bytes_of(pages: u32) -> u64 {
    pages_to_bytes(pages) as u64
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::mpsc;
    use std::thread;

    use proptest::prelude::*;

    use super::*;

    /// A gauge that is told what is in use.
    #[derive(Debug, Default)]
    pub(crate) struct Told(pub(crate) AtomicU64);

    impl MemoryGauge for Told {
        fn headroom(&self, budget_bytes: Option<u64>) -> Option<Headroom> {
            let as_of = Instant::now();
            let bytes = budget_bytes?.saturating_sub(self.0.load(Ordering::Relaxed));
            Some(Headroom { bytes, as_of })
        }
    }

    pub(crate) fn budget(bytes: u64) -> (Arc<Budget>, Arc<Told>) {
        let (budget, told) = (Budget::new(), Arc::new(Told::default()));
        budget.set_gauge(told.clone());
        budget.set_bytes(Some(bytes));
        (budget, told)
    }

    const LONG: Duration = Duration::from_secs(120);

    proptest! {
        #[test]
        fn promises_and_use_never_exceed_the_budget_but_for_the_overdraft(
            steps in proptest::collection::vec((0..4u8, 0..200u32, any::<usize>()), 1..100)
        ) {
            const BUDGET: u64 = 400 << 12;
            let (budget, told) = budget(BUDGET);
            budget.set_patience(Duration::ZERO);
            let (mut held, mut used) = (Vec::new(), 0);
            for (step, pages, pick) in steps {
                let promised: u64 = held.iter().map(|r: &Reservation| r.bytes).sum();
                let room = BUDGET.saturating_sub(used).saturating_sub(promised);
                match step {
                    0 => match budget.reserve(bytes_of(pages), || false) {
                        Ok(reservation) => {
                            prop_assert!(bytes_of(pages) <= room);
                            held.push(reservation);
                        }
                        Err(shortage) => {
                            let missing_bytes = bytes_of(pages) - room;
                            prop_assert_eq!(shortage, Shortage::Starved { missing_bytes });
                        }
                    },
                    1 => {
                        let (reservation, granted) = budget.reserve_for_merge(pages);
                        prop_assert!(granted <= pages);
                        prop_assert!(bytes_of(granted) <= room.max(bytes_of(MERGE_OVERDRAFT_PAGES)));
                        prop_assert!(granted > 0 || pages == 0);
                        held.push(reservation);
                    }
                    // What was promised is taken.
                    2 if !held.is_empty() => {
                        let taken = held.swap_remove(pick % held.len());
                        used += taken.bytes;
                        told.0.store(used, Ordering::Relaxed);
                    }
                    // Something is given back.
                    _ => {
                        used -= used.min(bytes_of(pages));
                        told.0.store(used, Ordering::Relaxed);
                    }
                }
            }
            drop(held);
            prop_assert_eq!(sync::lock(&budget.state).reserved_bytes, 0);
        }
    }

    #[test]
    fn without_a_budget_everything_is_granted() {
        let (budget, _) = budget(0);
        budget.set_bytes(None);
        assert!(budget.has_room(u64::MAX));
        drop(budget.reserve(1 << 40, || false).unwrap());
        assert_eq!(budget.reserve_for_merge(256).1, 256);
    }

    /// Somebody who waits for a page with an empty budget, on a thread of its own.
    fn waiter(
        budget: &Arc<Budget>,
        is_cancelled: impl Fn() -> bool + Send + 'static,
    ) -> thread::JoinHandle<Result<(), Shortage>> {
        let theirs = budget.clone();
        let waiter = thread::spawn(move || theirs.reserve(4096, is_cancelled).map(drop));
        while budget.waiting_bytes() == 0 {
            assert!(!waiter.is_finished(), "it does not wait");
            thread::yield_now();
        }
        waiter
    }

    #[test]
    fn who_waits_is_fed_by_what_is_given_back() {
        let (budget, told) = budget(1 << 20);
        told.0.store(1 << 20, Ordering::Relaxed);
        budget.set_patience(LONG);
        let waiter = waiter(&budget, || false);
        assert_eq!(budget.waiting_bytes(), 4096);
        told.0.store(0, Ordering::Relaxed);
        budget.wake();
        assert_eq!(waiter.join().unwrap(), Ok(()));
        assert_eq!(budget.waiting_bytes(), 0);
    }

    #[test]
    fn who_waits_for_a_region_that_exits_is_sent_away() {
        let (budget, _) = budget(0);
        budget.set_patience(LONG);
        let exiting = Arc::new(AtomicU64::new(0));
        let theirs = exiting.clone();
        let waiter = waiter(&budget, move || theirs.load(Ordering::Relaxed) > 0);
        exiting.store(1, Ordering::Relaxed);
        budget.wake();
        assert_eq!(waiter.join().unwrap(), Err(Shortage::Cancelled));
    }

    #[test]
    fn a_new_order_sends_away_who_waits_and_nobody_after() {
        let (budget, told) = budget(4096);
        told.0.store(4096, Ordering::Relaxed);
        budget.set_patience(LONG);
        let waiter = waiter(&budget, || false);
        budget.cancel_waiters();
        assert_eq!(waiter.join().unwrap(), Err(Shortage::Cancelled));
        told.0.store(0, Ordering::Relaxed);
        drop(budget.reserve(4096, || false).unwrap());
    }

    /// A gauge that tells that it is asked, and answers when it may.
    #[derive(Debug)]
    struct Slow {
        asked: mpsc::SyncSender<()>,
        may_answer: Mutex<mpsc::Receiver<()>>,
    }

    impl MemoryGauge for Slow {
        fn headroom(&self, _: Option<u64>) -> Option<Headroom> {
            self.asked.send(()).unwrap();
            self.may_answer.lock().unwrap().recv().unwrap();
            None
        }
    }

    #[test]
    fn nobody_waits_for_who_asks_the_gauge() {
        let (budget, _) = budget(1 << 20);
        let (asked, is_asked) = mpsc::sync_channel(0);
        let (answer, may_answer) = mpsc::sync_channel(0);
        let may_answer = Mutex::new(may_answer);
        budget.set_gauge(Arc::new(Slow { asked, may_answer }));
        let theirs = budget.clone();
        let worker = thread::spawn(move || theirs.has_room(4096));
        is_asked.recv().unwrap();
        let theirs = budget.clone();
        let (told, figures) = mpsc::channel();
        thread::spawn(move || {
            // An exit, and the guard.
            theirs.wake();
            told.send((theirs.bytes(), theirs.waiting_bytes()))
        });
        let figures = figures.recv_timeout(LONG);
        answer.send(()).unwrap();
        assert!(worker.join().unwrap());
        assert_eq!(figures, Ok((Some(1 << 20), 0)));
    }

    /// A gauge whose figure is as old as itself.
    #[derive(Debug)]
    struct Stale(Instant);

    impl MemoryGauge for Stale {
        fn headroom(&self, budget_bytes: Option<u64>) -> Option<Headroom> {
            let as_of = self.0;
            budget_bytes.map(|bytes| Headroom { bytes, as_of })
        }
    }

    #[test]
    fn what_was_taken_counts_until_the_gauges_figure_is_younger() {
        let budget = Budget::new();
        budget.set_gauge(Arc::new(Stale(Instant::now())));
        budget.set_bytes(Some(10_000));
        for _ in 0..2 {
            drop(budget.reserve(4096, || false).unwrap());
        }
        assert!(!budget.has_room(4096), "8192 are taken, the gauge or not");
        budget.set_gauge(Arc::new(Stale(Instant::now() + LONG)));
        assert!(budget.has_room(10_000));
    }

    #[test]
    fn patience_ends() {
        let (budget, _) = budget(100);
        budget.set_patience(Duration::ZERO);
        let starved = budget.reserve(4096, || false).map(drop);
        let missing_bytes = 3996;
        assert_eq!(starved, Err(Shortage::Starved { missing_bytes }));
        let text = io::Error::from(Shortage::Starved { missing_bytes }).to_string();
        assert!(text.contains("3996 bytes"), "{text}");
    }
}
