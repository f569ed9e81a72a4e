//! The thread that takes ended VMs down.
//!
//! The end of a VM is found by one of its own vCPU threads, which cannot join itself, or by the
//! event loop, which must not wait: both leave the machine to this thread.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use crate::panics;
use crate::state::EndReason;
use crate::vm::Corpse;

/// The reaper of one monitor. Its thread ends when every [`Sender`] is gone.
#[derive(Debug)]
pub(crate) struct Reaper {
    thread: JoinHandle<()>,
}

impl Reaper {
    /// Starts the thread `reaper`.
    pub(crate) fn spawn() -> std::io::Result<(Reaper, Sender<Corpse>)> {
        let (sender, receiver) = channel();
        let thread = std::thread::Builder::new()
            .name("reaper".to_owned())
            .spawn(move || run(&receiver))?;
        Ok((Reaper { thread }, sender))
    }

    /// Waits for the thread, after all senders were dropped.
    pub(crate) fn join(self) {
        if self.thread.join().is_err() {
            log::error!("the reaper thread panicked");
        }
    }
}

fn run(corpses: &Receiver<Corpse>) {
    for Corpse {
        vm,
        machine,
        reason,
    } in corpses
    {
        let id = vm.info().id;
        // A panic must neither stop the reaping of others nor leave this VM alive for ever.
        let done = catch_unwind(AssertUnwindSafe(|| machine.tear_down(&id)));
        let reason = match done {
            Ok(()) => reason,
            Err(payload) => {
                let text = panics::text(&*payload);
                EndReason::Error(format!("{reason}; its teardown panicked: {text}"))
            }
        };
        vm.publish_end(reason);
    }
}
