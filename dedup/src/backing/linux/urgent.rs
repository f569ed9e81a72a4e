//! A real-time priority for as long as writers wait for a thread.
//!
//! Beside more busy threads than CPUs a thread is off its CPU for tens of milliseconds at a time, and
//! whoever writes to what it has protected sleeps for as long. A nice value does not help: among
//! threads of the normal policy even the most urgent one waits for the next tick or two.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, Ordering};

use super::check::check;

/// The least urgent of all real-time priorities.
const PRIORITY: libc::c_int = 1;

/// The process may not have a real-time priority.
static IS_REFUSED: AtomicBool = AtomicBool::new(false);

/// Has its thread run before those of the normal policy until it is dropped, if the process may do
/// that. A thread of any other policy stays as it is.
#[derive(Debug)]
pub(crate) struct Urgent {
    is_raised: bool,
    /// The policy is the thread's.
    not_send: PhantomData<*const ()>,
}

impl Urgent {
    pub(crate) fn begin() -> Urgent {
        let not_send = PhantomData;
        // SAFETY: the call takes a number and touches no memory of ours.
        let policy = unsafe { libc::sched_getscheduler(0) };
        if policy != libc::SCHED_OTHER || IS_REFUSED.load(Ordering::Relaxed) {
            return Urgent {
                is_raised: false,
                not_send,
            };
        }
        let raised = set(libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK, PRIORITY);
        if let Err(error) = &raised {
            log::info!("merging has no real-time priority, writers may wait for longer: {error}");
            IS_REFUSED.store(true, Ordering::Relaxed);
        }
        Urgent {
            is_raised: raised.is_ok(),
            not_send,
        }
    }
}

impl Drop for Urgent {
    fn drop(&mut self) {
        if self.is_raised
            && let Err(error) = set(libc::SCHED_OTHER, 0)
        {
            log::error!("cannot give a real-time priority back: {error}");
        }
    }
}

/// Sets the calling thread's policy. Its nice value stays.
fn set(policy: libc::c_int, sched_priority: libc::c_int) -> std::io::Result<()> {
    let parameters = libc::sched_param { sched_priority };
    // SAFETY: the parameters are valid for as long as the call takes, which only reads them.
    check(unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> libc::c_int {
        // SAFETY: as above.
        unsafe { libc::sched_getscheduler(0) }
    }

    #[test]
    fn the_policy_is_what_it_was_afterwards() {
        let before = policy();
        let urgent = Urgent::begin();
        let is_raised = policy() == libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK;
        assert_eq!(is_raised, urgent.is_raised);
        drop(Urgent::begin());
        assert_eq!(
            is_raised,
            policy() != before,
            "the inner one changed nothing"
        );
        drop(urgent);
        assert_eq!(policy(), before);
    }
}
