//! The gate all vCPUs of a VM pass before each entry into the guest: run, stand still, or leave.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// What the vCPUs are to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Order {
    /// Run the guest.
    Run = 0,
    /// Stand still at the gate.
    Pause = 1,
    /// Leave the gate for good. Never taken back.
    Exit = 2,
}

/// What the gate says to a vCPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pass {
    /// Run the guest.
    Run,
    /// Run the guest, which stood still meanwhile.
    RunAfterPause,
    /// Leave.
    Leave,
}

/// The gate of one VM.
#[derive(Debug)]
pub(crate) struct Gate {
    /// Mirror of the order, written under the lock: what the fast path reads.
    order: AtomicU8,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    order: Order,
    /// Stands the vCPUs still whatever the order but `Exit`; the guard's, beside the user's pause.
    held: bool,
    /// vCPUs that neither stand still nor have left.
    passing: usize,
}

impl State {
    /// The order that counts.
    fn effective(&self) -> Order {
        if self.held && self.order == Order::Run {
            Order::Pause
        } else {
            self.order
        }
    }
}

impl Gate {
    /// A closed gate for `vcpus` vCPUs: they stand still until told to run.
    pub(crate) fn new(vcpus: usize) -> Gate {
        Gate {
            order: AtomicU8::new(Order::Pause as u8),
            state: Mutex::new(State {
                order: Order::Pause,
                held: false,
                passing: vcpus,
            }),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the order. The caller kicks the vCPUs out of the guest afterwards.
    pub(crate) fn set(&self, order: Order) {
        let mut state = self.lock();
        if state.order != Order::Exit {
            state.order = order;
        }
        self.publish(state);
    }

    /// Stands the vCPUs still until it is taken back, without a change of the order. To hold, the
    /// caller kicks the vCPUs out of the guest afterwards.
    pub(crate) fn set_held(&self, held: bool) {
        let mut state = self.lock();
        state.held = held;
        self.publish(state);
    }

    fn publish(&self, state: MutexGuard<'_, State>) {
        self.order.store(state.effective() as u8, Ordering::SeqCst);
        drop(state);
        self.changed.notify_all();
    }

    /// For a vCPU: waits while the order is to stand still. A vCPU told to leave calls
    /// [`Gate::leave`] next.
    pub(crate) fn pass(&self) -> Pass {
        if self.order.load(Ordering::SeqCst) == Order::Run as u8 {
            return Pass::Run;
        }
        let mut state = self.lock();
        state.passing -= 1;
        self.changed.notify_all();
        let paused = |state: &mut State| state.effective() == Order::Pause;
        state = self
            .changed
            .wait_while(state, paused)
            .unwrap_or_else(PoisonError::into_inner);
        state.passing += 1;
        if state.effective() == Order::Run {
            Pass::RunAfterPause
        } else {
            Pass::Leave
        }
    }

    /// For a vCPU whose guest asked to be held: returns after `time`, or when the order changes.
    pub(crate) fn hold(&self, time: Duration) {
        let running = |state: &mut State| state.effective() == Order::Run;
        drop(
            self.changed
                .wait_timeout_while(self.lock(), time, running)
                .unwrap_or_else(PoisonError::into_inner),
        );
    }

    /// For a vCPU that is over: it is not waited for any more.
    pub(crate) fn leave(&self) {
        self.lock().passing -= 1;
        self.changed.notify_all();
    }

    /// Waits until every vCPU stands still or has left.
    pub(crate) fn wait_still(&self) {
        let state = self.lock();
        let moving = |state: &mut State| state.passing > 0 && state.effective() == Order::Pause;
        drop(
            self.changed
                .wait_while(state, moving)
                .unwrap_or_else(PoisonError::into_inner),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::AtomicU64;
    use std::time::Instant;

    /// Longest wait for another thread; only a hang is longer.
    const LONG: Duration = Duration::from_secs(120);

    /// Waits until the vCPUs have gone round more often than `before`.
    fn wait_for_rounds(rounds: &AtomicU64, before: u64) {
        let deadline = Instant::now() + LONG;
        while rounds.load(Ordering::SeqCst) <= before {
            assert!(Instant::now() < deadline, "no vcpu runs");
            std::thread::yield_now();
        }
    }

    /// [`Gate::wait_still`] with an end: who is waited for may not stand still because of a bug.
    fn wait_still(gate: &Arc<Gate>) {
        let (done, is_still) = std::sync::mpsc::channel();
        let gate = gate.clone();
        std::thread::spawn(move || {
            gate.wait_still();
            done.send(())
        });
        is_still.recv_timeout(LONG).expect("they stand still");
    }

    /// The thread's result.
    fn join<T>(thread: std::thread::JoinHandle<T>) -> T {
        let deadline = Instant::now() + LONG;
        while !thread.is_finished() {
            assert!(Instant::now() < deadline, "it goes on");
            std::thread::yield_now();
        }
        thread.join().unwrap()
    }

    #[test]
    fn vcpus_stand_still_run_and_leave_as_ordered() {
        let gate = Arc::new(Gate::new(2));
        let rounds = Arc::new(AtomicU64::new(0));
        let threads: Vec<_> = (0..2)
            .map(|_| {
                let (gate, rounds) = (gate.clone(), rounds.clone());
                std::thread::spawn(move || {
                    while gate.pass() != Pass::Leave {
                        rounds.fetch_add(1, Ordering::SeqCst);
                        std::thread::yield_now();
                    }
                    gate.leave();
                })
            })
            .collect();
        wait_still(&gate);
        assert_eq!(rounds.load(Ordering::SeqCst), 0, "closed at first");
        for _ in 0..50 {
            let before = rounds.load(Ordering::SeqCst);
            gate.set(Order::Run);
            wait_for_rounds(&rounds, before);
            gate.set(Order::Pause);
            wait_still(&gate);
            let still = rounds.load(Ordering::SeqCst);
            std::thread::yield_now();
            assert_eq!(rounds.load(Ordering::SeqCst), still);
        }
        gate.set(Order::Exit);
        threads.into_iter().for_each(join);
    }

    #[test]
    fn a_sleeping_vcpu_wakes_when_it_is_wanted() {
        let gate = Arc::new(Gate::new(1));
        gate.set(Order::Run);
        assert!(matches!(gate.pass(), Pass::Run | Pass::RunAfterPause));
        let sleeper = gate.clone();
        let thread = std::thread::spawn(move || {
            sleeper.hold(Duration::from_secs(3600));
            sleeper.pass()
        });
        gate.set(Order::Exit);
        assert!(matches!(join(thread), Pass::Leave));
    }

    #[test]
    fn who_is_held_stands_still_through_every_order_but_the_exit() {
        let gate = Arc::new(Gate::new(1));
        gate.set(Order::Run);
        gate.set_held(true);
        let rounds = Arc::new(AtomicU64::new(0));
        let (theirs, seen) = (gate.clone(), rounds.clone());
        let vcpu = std::thread::spawn(move || {
            while theirs.pass() != Pass::Leave {
                seen.fetch_add(1, Ordering::SeqCst);
                std::thread::yield_now();
            }
            theirs.leave();
        });
        for order in [Order::Pause, Order::Run] {
            gate.set(order);
            wait_still(&gate);
            assert_eq!(rounds.load(Ordering::SeqCst), 0);
        }
        gate.set_held(false);
        wait_for_rounds(&rounds, 0);
        gate.set_held(true);
        wait_still(&gate);
        gate.set(Order::Exit);
        join(vcpu);
    }

    #[test]
    fn exit_is_never_taken_back() {
        let gate = Gate::new(1);
        gate.set(Order::Exit);
        gate.set(Order::Run);
        assert_eq!(gate.pass(), Pass::Leave);
    }

    #[test]
    fn a_vcpu_that_left_is_not_waited_for() {
        let gate = Arc::new(Gate::new(1));
        gate.set(Order::Run);
        assert_eq!(gate.pass(), Pass::Run);
        gate.leave();
        gate.set(Order::Pause);
        wait_still(&gate);
    }
}
