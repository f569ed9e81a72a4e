//! What the guard asks of a VM, and does to it.

use std::sync::PoisonError;
use std::time::Instant;

use dedup::ProcessMemory;

use super::{Cell, Vm};
use crate::admission::GivenUp;
use crate::guard::policy::Candidate;

impl Vm {
    /// Memory that it shares with nobody, or that its start has taken so far, as `process` tells;
    /// `None` if it has none.
    pub(crate) fn private_bytes(&self, process: &ProcessMemory) -> Option<u64> {
        let cell = self.lock();
        if let Some(allowance) = &cell.starting {
            return Some(allowance.loaded_bytes());
        }
        let private = cell.machine.as_ref()?.private_bytes(process);
        private
            .inspect_err(|error| log::warn!("vm {}: how much memory it has: {error}", self.id))
            .ok()
    }

    /// Stands its guest still, beside what a user says about it, until each who held it released
    /// it. Does not wait.
    pub(crate) fn hold(&self) {
        self.change_holders(|holders| holders + 1);
    }

    /// Takes back one [`Vm::hold`].
    pub(crate) fn release(&self) {
        self.change_holders(|holders| holders.saturating_sub(1));
    }

    fn change_holders(&self, change: impl FnOnce(u32) -> u32) {
        let mut cell = self.lock();
        cell.holders = change(cell.holders);
        // Lock order: cell -> gate.
        if let Some(machine) = &cell.machine {
            machine.set_held(cell.holders > 0);
        }
    }

    /// Whether its end was found, or its start given up, and that is not over yet.
    pub(crate) fn is_ending(&self) -> bool {
        let cell = self.lock();
        let is_given_up = cell
            .starting
            .as_ref()
            .is_some_and(|start| start.over().is_some());
        is_given_up || cell.state.is_alive() && cell.machine.is_none()
    }

    /// Whether there is something to end: a machine, or a start that was not given up yet.
    pub(crate) fn can_be_ended(&self) -> bool {
        let cell = self.lock();
        let is_starting = cell
            .starting
            .as_ref()
            .is_some_and(|start| start.over().is_none());
        is_starting || cell.machine.is_some()
    }

    /// Has its start fail, if there is one under way. Does not wait.
    pub(crate) fn give_up_start(&self) -> bool {
        let cell = self.lock();
        let starting = cell.starting.as_ref();
        starting
            .inspect(|allowance| allowance.close(GivenUp::NoMemory))
            .is_some()
    }

    /// Waits until `deadline` for the end, or for the end of a start that was given up. True if it
    /// holds nothing any more.
    pub(crate) fn wait_gone(&self, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        let is_there = |cell: &mut Cell| cell.starting.is_some() || cell.state.is_alive();
        let (cell, _) = self
            .changed
            .wait_timeout_while(self.lock(), left, is_there)
            .unwrap_or_else(PoisonError::into_inner);
        cell.starting.is_none() && !cell.state.is_alive()
    }

    /// The lowest is ended first when memory runs out.
    pub(crate) fn oom_priority(&self) -> i32 {
        self.config().samepage.oom_priority
    }

    /// What the guard judges it by. One of which the kernel does not tell how much memory it has
    /// counts with all that it may have: it must not be spared for that.
    pub(crate) fn candidate(&self, process: &ProcessMemory) -> Candidate {
        let private_bytes = self.private_bytes(process);
        Candidate {
            id: self.id.clone(),
            oom_priority: self.oom_priority(),
            private_bytes: private_bytes.unwrap_or_else(|| self.config().mem_size_bytes()),
        }
    }

    /// What it may come to hold, if it holds memory.
    pub(crate) fn nominal_bytes(&self) -> Option<u64> {
        let is_alive = self.state().is_alive();
        is_alive.then(|| self.config().mem_size_bytes())
    }
}
