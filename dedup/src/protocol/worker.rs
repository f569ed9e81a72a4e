//! The worker: one thread per domain that scans at its pace and finishes what has exited.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use crate::base::sync;
use crate::protocol::control::Run;
use crate::protocol::core::Shared;
use crate::protocol::scan_state::Work;
use crate::protocol::stopwatch::Stopwatch;

/// What the worker does next.
enum Next {
    Stop,
    Reap,
    Batch { pages: u32 },
}

/// The thread, stopped and joined on drop.
#[derive(Debug)]
pub(crate) struct Worker<W: Work> {
    shared: Arc<Shared<W>>,
    thread: Option<JoinHandle<()>>,
}

impl<W: Work + Send + 'static> Worker<W>
where
    W::Memory: Send + Sync + 'static,
{
    pub(crate) fn spawn(shared: &Arc<Shared<W>>) -> io::Result<Worker<W>> {
        let theirs = Arc::clone(shared);
        let thread = thread::Builder::new()
            .name("dedup".to_owned())
            .spawn(move || while work_unless_it_panics(&theirs) {})?;
        Ok(Worker {
            shared: Arc::clone(shared),
            thread: Some(thread),
        })
    }
}

impl<W: Work> Drop for Worker<W> {
    fn drop(&mut self) {
        sync::lock(&self.shared.control).stop = true;
        self.shared.work.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the dedup worker had panicked");
        }
    }
}

/// One round, and a panic in it means only that merging stops. The thread goes on, because exits
/// depend on it: it finishes what was handed over, so that no region is leaked. At most a run of
/// pool pages is: whether a guest was mapped to them is not known, and punching them would show.
fn work_unless_it_panics<W: Work>(shared: &Shared<W>) -> bool {
    // What is left behind is consistent enough to let regions go: see `sync` on poison.
    if let Ok(goes_on) = catch_unwind(AssertUnwindSafe(|| work(shared))) {
        return goes_on;
    }
    log::error!("the dedup worker panicked, run is now stop");
    let mut control = sync::lock(&shared.control);
    control.run = Run::Stop;
    // A slot that was handed over to the scan would not come up any more.
    control.reap = true;
    // Nobody waits for a pass that will not end.
    shared.work.notify_all();
    drop(control);
    // Should reaping panic as well, it does so at the pace of batches.
    pause(shared)
}

/// One round. False when the worker is to end.
fn work<W: Work>(shared: &Shared<W>) -> bool {
    act(shared) && pause(shared)
}

/// Waits for something to do, and does it. False when the worker is to end.
pub(crate) fn act<W: Work>(shared: &Shared<W>) -> bool {
    match wait_for_work(shared) {
        Next::Stop => return false,
        Next::Reap => shared.reap(),
        Next::Batch { pages } => {
            let begun = Stopwatch::start();
            let batch = shared.batch(pages);
            let spent = begun.spent();
            let mut control = sync::lock(&shared.control);
            control.note_batch(&batch, spent);
            if batch.passes > 0 {
                shared.work.notify_all();
            }
        }
    }
    true
}

fn wait_for_work<W: Work>(shared: &Shared<W>) -> Next {
    let mut control = sync::lock(&shared.control);
    loop {
        control.kicked = false;
        if control.stop {
            return Next::Stop;
        }
        // In a merging engine the handed-over slot comes up by its place after the cursor.
        if control.reap && control.run != Run::Merge {
            return Next::Reap;
        }
        // Lock order: control -> ring is taken nowhere else the other way round.
        if control.run == Run::Merge && shared.has_regions() {
            return Next::Batch {
                pages: control.pace.pages_to_scan,
            };
        }
        control = sync::wait(&shared.work, control);
    }
}

/// Pauses as the pace says, unless something happens. False when the worker is to end.
fn pause<W: Work>(shared: &Shared<W>) -> bool {
    let mut control = sync::lock(&shared.control);
    let begun = Instant::now();
    let until = begun + control.pause();
    while !control.kicked && !control.stop && control.waiters == 0 {
        let Some(left) = until.checked_duration_since(Instant::now()) else {
            break;
        };
        control = sync::wait_timeout(&shared.work, control, left);
    }
    control.note_pause(begun.elapsed());
    if control.kicked {
        control.wake_up();
    }
    !control.stop
}

#[cfg(all(test, not(loom)))]
mod tests;
