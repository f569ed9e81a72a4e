//! The VMs of one monitor, by id.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::id::VmId;
use crate::vm::Vm;

/// The list. Its lock is not held over what is done with a VM.
#[derive(Debug, Default)]
pub(crate) struct Roster(Mutex<BTreeMap<VmId, Arc<Vm>>>);

impl Roster {
    pub(crate) fn lock(&self) -> MutexGuard<'_, BTreeMap<VmId, Arc<Vm>>> {
        // Changed by single inserts and removes: whole after any panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of them, ordered by id.
    pub(crate) fn all(&self) -> Vec<Arc<Vm>> {
        self.lock().values().cloned().collect()
    }
}
