//! The event loop: one thread that serves the queues of all devices of all VMs of a monitor.
//!
//! A device that has queues hands in a *subscriber* ([`Subscriber`]): it registers its eventfds in
//! `init` and handles them in `process`, on the thread named `events`. Rejected: a thread per
//! device, which hundreds of VMs in one process would pay for in stacks and context switches.
//!
//! A subscriber that panics takes its own VM down, nobody else's: the panic is caught here, the
//! subscriber is never called again, and the `on_panic` it was added with is told.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use event_manager::{
    EventManager, EventOps, Events, MutEventSubscriber, RemoteEndpoint, SubscriberId,
};

use crate::panics;

/// What serves a device's eventfds on the event loop thread.
pub type Subscriber = Box<dyn MutEventSubscriber + Send>;

/// Called with the panic's text when a subscriber panicked. Runs on the event loop thread, with no
/// device lock held, and must not wait for the event loop.
pub type OnPanic = Box<dyn Fn(String) + Send>;

/// Errors of the event loop.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EventsError {
    /// Its epoll or eventfd could not be made, or its thread is gone.
    #[error("event loop: {0}")]
    Loop(#[from] event_manager::Error),
    /// The thread could not be started.
    #[error("cannot start the event loop thread: {0}")]
    Spawn(#[source] std::io::Error),
}

/// The event loop of one monitor. Dropping it stops and joins the thread.
#[derive(Debug)]
pub struct EventLoop {
    remote: EventRemote,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// Adds and removes subscribers from any thread but the event loop's own.
#[derive(Clone)]
pub struct EventRemote {
    endpoint: RemoteEndpoint<Guarded>,
}

impl std::fmt::Debug for EventRemote {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("EventRemote")
    }
}

impl EventLoop {
    /// Starts the thread `events`.
    ///
    /// # Errors
    /// [`EventsError`] when the loop's file descriptors or its thread cannot be made.
    pub fn new() -> Result<EventLoop, EventsError> {
        let mut manager = EventManager::<Guarded>::new()?;
        let endpoint = manager.remote_endpoint();
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = stop.clone();
        let thread = std::thread::Builder::new()
            .name("events".to_owned())
            .spawn(move || {
                while !stopping.load(Ordering::Acquire) {
                    if let Err(error) = manager.run() {
                        // epoll_wait fails only on a broken set: to try again would spin.
                        log::error!("event loop ends: {error}");
                        break;
                    }
                }
            })
            .map_err(EventsError::Spawn)?;
        Ok(EventLoop {
            remote: EventRemote { endpoint },
            stop,
            thread: Some(thread),
        })
    }

    /// The handle by which other threads add and remove subscribers.
    pub fn remote(&self) -> EventRemote {
        self.remote.clone()
    }
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Err(error) = self.remote.endpoint.kick() {
            // Joining a thread that cannot be woken would hang: leave it, it holds nothing of a VM.
            log::error!("cannot wake the event loop to stop it: {error}");
            return;
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the event loop thread panicked");
        }
    }
}

impl EventRemote {
    /// Adds a subscriber; its `init` has run on the event loop thread when this returns.
    ///
    /// # Errors
    /// [`EventsError::Loop`] when the event loop is gone.
    pub fn add(
        &self,
        subscriber: Subscriber,
        on_panic: OnPanic,
    ) -> Result<SubscriberId, EventsError> {
        let guarded = Guarded {
            inner: Some(subscriber),
            on_panic,
        };
        let added = self.endpoint.call_blocking(
            move |ops| -> Result<SubscriberId, event_manager::Error> {
                Ok(ops.add_subscriber(guarded))
            },
        )?;
        Ok(added)
    }

    /// Removes and drops subscribers, all in one turn of the event loop. When this returns none of
    /// them is running, and none ever will be again.
    ///
    /// Rejected: one after the other. Each would wait for a turn of every other device, so the VM
    /// with the most drives, whose disks may be the busiest, would take longest to end.
    ///
    /// # Errors
    /// [`EventsError::Loop`] when an id is unknown or the event loop is gone.
    pub fn remove(&self, ids: Vec<SubscriberId>) -> Result<(), EventsError> {
        if ids.is_empty() {
            return Ok(());
        }
        // Dropped on this thread, after the event loop let go of them: a slow drop (a flush of a
        // disk) must not hold up the other VMs' devices.
        let removed = self.endpoint.call_blocking(move |ops| {
            let ids = ids.into_iter();
            let removed: Vec<_> = ids.map(|id| ops.remove_subscriber(id)).collect();
            Ok::<_, event_manager::Error>(removed)
        })?;
        for subscriber in removed {
            subscriber?;
        }
        Ok(())
    }
}

/// A subscriber that is cut off when it panics.
struct Guarded {
    inner: Option<Subscriber>,
    on_panic: OnPanic,
}

impl Guarded {
    fn call(&mut self, ops: &mut EventOps, f: impl FnOnce(&mut Subscriber, &mut EventOps)) -> bool {
        let Some(inner) = self.inner.as_mut() else {
            return false;
        };
        match catch_unwind(AssertUnwindSafe(|| f(inner, ops))) {
            Ok(()) => true,
            Err(payload) => {
                (self.on_panic)(panics::text(&*payload));
                // Not dropped: what it holds was left in the middle of something, and a second
                // panic in its drop would take the event loop down. It goes when it is removed.
                false
            }
        }
    }
}

impl MutEventSubscriber for Guarded {
    fn init(&mut self, ops: &mut EventOps) {
        self.call(ops, |inner, ops| inner.init(ops));
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if !self.call(ops, |inner, ops| inner.process(events, ops)) {
            // Nobody reads this descriptor again: left in the set, it would wake the loop for ever.
            if let Err(error) = ops.remove(Events::empty_raw(events.fd())) {
                log::error!(
                    "cannot drop fd {} from the event loop: {error}",
                    events.fd()
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use event_manager::EventSet;
    use std::sync::mpsc;
    use std::time::Duration;
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    struct Echo {
        wake: EventFd,
        seen: mpsc::Sender<u64>,
        panics: bool,
    }

    impl MutEventSubscriber for Echo {
        fn init(&mut self, ops: &mut EventOps) {
            ops.add(Events::new(&self.wake, EventSet::IN)).unwrap();
        }

        fn process(&mut self, _events: Events, _ops: &mut EventOps) {
            assert!(!self.panics, "echo broke");
            self.seen.send(self.wake.read().unwrap()).unwrap();
        }
    }

    fn echo(panics: bool) -> (EventFd, mpsc::Receiver<u64>, Subscriber) {
        let wake = EventFd::new(EFD_NONBLOCK).unwrap();
        let (seen, receiver) = mpsc::channel();
        let subscriber = Echo {
            wake: wake.try_clone().unwrap(),
            seen,
            panics,
        };
        (wake, receiver, Box::new(subscriber))
    }

    const LONG: Duration = Duration::from_secs(120);

    #[test]
    fn subscribers_are_served_until_they_are_removed() {
        let events = EventLoop::new().unwrap();
        let (wake, seen, subscriber) = echo(false);
        let id = events.remote().add(subscriber, Box::new(|_| ())).unwrap();
        wake.write(3).unwrap();
        assert_eq!(seen.recv_timeout(LONG), Ok(3));
        events.remote().remove(vec![id]).unwrap();
        assert_eq!(
            seen.recv_timeout(LONG),
            Err(mpsc::RecvTimeoutError::Disconnected)
        );
    }

    #[test]
    fn a_panicking_subscriber_is_cut_off_and_the_others_go_on() {
        let events = EventLoop::new().unwrap();
        let (bad_wake, _bad_seen, bad) = echo(true);
        let (good_wake, good_seen, good) = echo(false);
        let (told, told_receiver) = mpsc::channel();
        let bad_id = events
            .remote()
            .add(bad, Box::new(move |text| told.send(text).unwrap()))
            .unwrap();
        events.remote().add(good, Box::new(|_| ())).unwrap();
        bad_wake.write(1).unwrap();
        assert!(
            told_receiver
                .recv_timeout(LONG)
                .unwrap()
                .contains("echo broke")
        );
        good_wake.write(1).unwrap();
        assert_eq!(good_seen.recv_timeout(LONG), Ok(1));
        events.remote().remove(vec![bad_id]).unwrap();
    }
}
