//! The end of a VM: found, asked for, waited for.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::{Cell, Corpse, Vm};
use crate::admission::GivenUp;
use crate::error::MonitorError;
use crate::state::{EndReason, Step, VmState};

/// How long a stop waits for a start that it has given up.
const GIVE_UP_PATIENCE: Duration = Duration::from_secs(10);

impl Vm {
    /// Ends the VM, if it is alive and nobody else did. Does not wait.
    ///
    /// Any thread may call this, vCPU threads and the event loop included, with no device lock held.
    pub(crate) fn end(self: &Arc<Vm>, reason: EndReason) {
        let Some(machine) = self.lock().machine.take() else {
            return;
        };
        log::info!("vm {}: {reason}", self.id);
        machine.begin_exit();
        let corpse = Corpse {
            vm: self.clone(),
            machine,
            reason,
        };
        if let Err(unsent) = self.reaper.send(corpse) {
            // The monitor ends every VM before its reaper: this is a monitor being dropped late.
            let Corpse {
                machine, reason, ..
            } = unsent.0;
            machine.tear_down(&self.id);
            self.publish_end(reason);
        }
    }

    /// For the reaper: the machine is gone.
    pub(crate) fn publish_end(&self, reason: EndReason) {
        let mut cell = self.lock();
        match cell.state.after(Step::End(reason)) {
            Ok(ended) => cell.state = ended,
            Err(illegal) => log::error!("vm {}: {illegal}", self.id),
        }
        drop(cell);
        self.console.end();
        self.changed.notify_all();
    }

    /// Ends the VM by request and waits until its memory was handed over. A VM that has ended
    /// already stays ended for its own reason.
    ///
    /// A start that is under way is given up: the VM is as before it. It may stand in a file whose
    /// storage does not answer, so it is not waited for longer than [`GIVE_UP_PATIENCE`].
    pub(crate) fn stop(self: &Arc<Vm>) -> Result<(), MonitorError> {
        let cell = self.lock();
        let id = self.id.clone();
        if let Some(start) = &cell.starting {
            start.close(GivenUp::Stopped);
            let is_starting = |cell: &mut Cell| cell.starting.is_some();
            let (cell, _) = self
                .changed
                .wait_timeout_while(cell, GIVE_UP_PATIENCE, is_starting)
                .unwrap_or_else(PoisonError::into_inner);
            return if cell.starting.is_some() {
                Err(MonitorError::Ending(id))
            } else {
                Ok(())
            };
        }
        if cell.state == VmState::NotStarted {
            let state = cell.state.clone();
            return Err(MonitorError::NotRunning { id, state });
        }
        drop(cell);
        self.end(EndReason::Stopped);
        let alive = |cell: &mut Cell| cell.state.is_alive();
        let cell = self.lock();
        drop(
            self.changed
                .wait_while(cell, alive)
                .unwrap_or_else(PoisonError::into_inner),
        );
        Ok(())
    }

    /// Sees to it that nothing becomes of it any more: it cannot be started, and whoever reads its
    /// console reads to the end. False, and without effect, if it is alive or just being started.
    pub(crate) fn forget(&self) -> bool {
        {
            let mut cell = self.lock();
            if cell.starting.is_some() || cell.state.is_alive() {
                return false;
            }
            cell.is_forgotten = true;
        }
        self.console.end();
        self.changed.notify_all();
        true
    }

    /// Waits for the end until `deadline`; not any longer once it was forgotten.
    pub(crate) fn wait_ended(&self, deadline: Instant) -> Option<EndReason> {
        let left = deadline.saturating_duration_since(Instant::now());
        let going =
            |cell: &mut Cell| !matches!(cell.state, VmState::Ended(_)) && !cell.is_forgotten;
        let (cell, _) = self
            .changed
            .wait_timeout_while(self.lock(), left, going)
            .unwrap_or_else(PoisonError::into_inner);
        match &cell.state {
            VmState::Ended(reason) => Some(reason.clone()),
            _ => None,
        }
    }
}
