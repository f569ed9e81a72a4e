//! Where pages are given up: on one thread of the monitor, a few at a time.
//!
//! A page that the merge engine has is given up between two batches of its worker, and not before the
//! end of an unmerge, which may wait for memory. The event loop, which serves the devices of all VMs,
//! must not wait for that. Each queue has one request in hand, which goes to the back of the line after
//! each turn, so no guest keeps the others from their turns.
//!
//! Rejected: a thread for each device. All VMs of a monitor have one engine, so where one of them waits
//! for it, all do.
//!
//! # Locks
//! `Lane::state` is a leaf, held for moments: never while pages are given up.

use std::fmt;
use std::io;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use dedup::AccessError;

use super::super::{Budget, Doorbells, Served};
use super::ram_pages::Runs;
use crate::panics;

/// What a call takes of a turn, in bytes moved, whatever it gives up.
const CALL_COST: u64 = 64 << 10;
/// What a page takes beside.
const PAGE_COST: u64 = 1 << 10;

/// Gives up pages of one VM's memory.
pub trait Discard: fmt::Debug + Send + Sync {
    /// Gives up pages of the VM's mapping: they show zeros afterwards, and take no memory until they
    /// are written to. Returns how many; those that cannot be given up now stay as they are.
    ///
    /// # Errors
    /// [`AccessError`]; pages before those that were refused may be given up.
    fn discard(&self, pages: Range<u32>) -> Result<u32, AccessError>;
}

/// The line of a monitor's lanes that have something to do. A clone is another way in.
#[derive(Clone, Debug)]
pub struct Discards {
    /// `None` where whoever hands something in carries it out.
    line: Option<Sender<Arc<Lane>>>,
}

impl Discards {
    /// Starts the thread `discard`.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start() -> io::Result<(Discards, DiscardThread)> {
        let (line, lanes) = channel::<Arc<Lane>>();
        let thread = std::thread::Builder::new().name("discard".to_owned());
        let thread = thread.spawn(move || lanes.into_iter().for_each(|lane| lane.work()))?;
        Ok((Discards { line: Some(line) }, DiscardThread(Some(thread))))
    }

    /// Without a thread: for tests and fuzz targets, where each input then has one outcome.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn at_once() -> Discards {
        Discards { line: None }
    }
}

/// The thread. To be dropped after the last of its [`Discards`]: that ends it, and the drop waits.
#[derive(Debug)]
pub struct DiscardThread(Option<JoinHandle<()>>);

impl Drop for DiscardThread {
    fn drop(&mut self) {
        if self.0.take().is_some_and(|thread| thread.join().is_err()) {
            log::error!("the discard thread panicked");
        }
    }
}

/// What became of a request.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    pub(super) pages: u32,
    /// The last one of several.
    pub(super) failure: Option<AccessError>,
}

/// What became of the request in hand.
#[derive(Debug)]
pub(super) enum Polled {
    /// There is none.
    Idle,
    /// It is not done. The doorbell rings when it is.
    Busy,
    /// It is done.
    Done(Outcome),
}

/// A queue's lane.
#[derive(Debug)]
pub(super) struct Lane {
    discard: Arc<dyn Discard>,
    line: Discards,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    step: Step,
    /// Nobody wants to hear of the request in hand: the device was reset.
    is_abandoned: bool,
    /// The VM is ending: nobody waits for anything.
    is_closed: bool,
    /// Rings for the queue of this number.
    doorbell: Option<(Doorbells, usize)>,
}

#[derive(Debug, Default)]
enum Step {
    #[default]
    Idle,
    /// In the line.
    Waiting(Runs, Outcome),
    UnderWay,
    Done(Outcome),
}

impl Lane {
    pub(super) fn new(discard: Arc<dyn Discard>, line: Discards) -> Arc<Lane> {
        Arc::new(Lane {
            discard,
            line,
            state: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Its fields are set one at a time: whole after any panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Rings `doorbells[queue]` whenever a request is done, from now on.
    pub(super) fn connect(&self, doorbells: Doorbells, queue: usize) {
        self.lock().doorbell = Some((doorbells, queue));
    }

    /// Takes what is done.
    pub(super) fn poll(&self) -> Polled {
        let mut state = self.lock();
        match std::mem::take(&mut state.step) {
            Step::Idle => Polled::Idle,
            Step::Done(outcome) => Polled::Done(outcome),
            busy @ (Step::Waiting(..) | Step::UnderWay) => {
                state.step = busy;
                Polled::Busy
            }
        }
    }

    /// Hands in the next request. The lane must be idle.
    pub(super) fn submit(self: &Arc<Lane>, runs: Runs) {
        self.lock().step = Step::Waiting(runs, Outcome::default());
        self.line_up();
    }

    /// To the back of the line.
    fn line_up(self: &Arc<Lane>) {
        match &self.line.line {
            // Without a thread there is no monitor any more.
            Some(line) => drop(line.send(self.clone())),
            None => self.work(),
        }
    }

    /// Lets go of the request in hand. The call in hand may go on until [`Lane::settle`] returns.
    pub(super) fn abandon(&self) {
        let mut state = self.lock();
        match state.step {
            Step::UnderWay => state.is_abandoned = true,
            Step::Idle | Step::Waiting(..) | Step::Done(_) => state.step = Step::Idle,
        }
    }

    /// Waits until nothing that was abandoned is given up any more: its guest may use the page again.
    pub(super) fn settle(&self) {
        let is_busy = |state: &mut State| {
            matches!(state.step, Step::UnderWay) && state.is_abandoned && !state.is_closed
        };
        let settled = self.changed.wait_while(self.lock(), is_busy);
        drop(settled.unwrap_or_else(PoisonError::into_inner));
    }

    /// Has nobody wait any more: the guest does not run again.
    pub(super) fn close(&self) {
        self.lock().is_closed = true;
        self.changed.notify_all();
    }

    /// A turn, on the thread.
    fn work(self: &Arc<Lane>) {
        let (mut runs, mut outcome) = {
            let mut state = self.lock();
            match std::mem::take(&mut state.step) {
                Step::Waiting(runs, outcome) => {
                    state.step = Step::UnderWay;
                    (runs, outcome)
                }
                // It was abandoned while it was in the line.
                other => {
                    state.step = other;
                    return;
                }
            }
        };
        let mut budget = Budget::SLICE;
        while !budget.is_spent() && !self.is_over() {
            let Some(pages) = runs.next_piece() else {
                break;
            };
            budget.spend(Served {
                used_bytes: 0,
                cost_bytes: CALL_COST + PAGE_COST * pages.len() as u64,
            });
            match self.give_up(pages) {
                Ok(pages) => outcome.pages += pages,
                Err(failure) => outcome.failure = Some(failure),
            }
        }
        self.end_turn(runs, outcome);
    }

    /// A panic is a failure like others: the thread is that of all VMs.
    fn give_up(&self, pages: Range<u32>) -> Result<u32, AccessError> {
        let discard = AssertUnwindSafe(|| self.discard.discard(pages));
        catch_unwind(discard).unwrap_or_else(|payload| {
            let text = format!("panicked: {}", panics::text(&*payload));
            Err(AccessError::Kernel(io::Error::other(text)))
        })
    }

    fn is_over(&self) -> bool {
        let state = self.lock();
        state.is_abandoned || state.is_closed
    }

    fn end_turn(self: &Arc<Lane>, runs: Runs, outcome: Outcome) {
        let mut state = self.lock();
        if state.is_abandoned || state.is_closed {
            state.is_abandoned = false;
            state.step = Step::Idle;
            drop(state);
            self.changed.notify_all();
        } else if runs.is_empty() {
            state.step = Step::Done(outcome);
            if let Some((doorbells, queue)) = &state.doorbell
                && let Some(doorbell) = doorbells.get(*queue)
            {
                // A counter that is full rings as well.
                let _full = doorbell.write(1);
            }
        } else {
            state.step = Step::Waiting(runs, outcome);
            drop(state);
            self.line_up();
        }
    }
}

#[cfg(test)]
mod tests;
