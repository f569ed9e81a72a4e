//! What the guard asks of a VM, and does to it.

use super::Vm;
use crate::guard::policy::Candidate;

impl Vm {
    /// Memory that it shares with nobody; `None` if it has none.
    pub(crate) fn private_bytes(&self) -> Option<u64> {
        let private = self.lock().machine.as_ref()?.private_bytes();
        private
            .inspect_err(|error| log::warn!("vm {}: how much memory it has: {error}", self.id))
            .ok()
    }

    /// Stands its guest still, or lets it go on, beside what a user says about it.
    pub(crate) fn set_held(&self, held: bool) {
        if let Some(machine) = &self.lock().machine {
            machine.set_held(held);
        }
    }

    /// Whether its end was found, and it has not ended yet.
    pub(crate) fn is_ending(&self) -> bool {
        let cell = self.lock();
        cell.state.is_alive() && cell.machine.is_none()
    }

    /// Whether it runs or is paused, and its end was not found yet.
    pub(crate) fn has_machine(&self) -> bool {
        self.lock().machine.is_some()
    }

    /// The lowest is ended first when memory runs out.
    pub(crate) fn oom_priority(&self) -> i32 {
        self.config.samepage.oom_priority
    }

    /// What the guard judges it by; `None` if there is nothing to end.
    pub(crate) fn candidate(&self) -> Option<Candidate> {
        Some(Candidate {
            id: self.id.clone(),
            oom_priority: self.oom_priority(),
            private_bytes: self.private_bytes()?,
        })
    }

    /// What it may come to hold, if it holds memory.
    pub(crate) fn nominal_bytes(&self) -> Option<u64> {
        let is_alive = self.state().is_alive();
        is_alive.then(|| self.config.mem_size_bytes())
    }
}
