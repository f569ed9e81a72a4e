//! What a machine keeps of its drives: their files, until they are closed.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::id::VmId;
use crate::virtio::Closing;

/// How long the end of a VM waits for its drives' files to be closed.
const CLOSE_PATIENCE: Duration = Duration::from_millis(500);

/// A VM's drives, which are closed once their devices are dropped.
#[derive(Debug, Default)]
pub(crate) struct Closings(Mutex<Vec<Closing>>);

impl Closings {
    pub(crate) fn add(&self, closing: Closing) {
        self.lock().push(closing);
    }

    /// Waits until they are closed, so that their locks are anybody's, but not for storage that does
    /// not answer.
    pub(crate) fn wait(&self, id: &VmId) {
        let deadline = Instant::now() + CLOSE_PATIENCE;
        let closings = std::mem::take(&mut *self.lock());
        let open = closings.iter().filter(|closing| !closing.wait(deadline));
        let count = open.count();
        if count > 0 {
            log::warn!("vm {id}: {count} of its drives stay locked: their storage does not answer");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Closing>> {
        // Changed by single pushes: whole after any panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
