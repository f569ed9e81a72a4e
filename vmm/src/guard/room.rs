//! Memory that a domain's device queues and starts may take before the guard looks again.
//!
//! vCPUs take memory without asking, so the guard looks as often as their speed demands. Everything
//! else that fills guest memory asks here. Queues get a *grant* at each look, and one that is used
//! up asks for the next look at once; so a disk that is read into untouched memory never takes more
//! than there is, however large its requests are. A start *reserves* what its kernel and initrd
//! take before it loads them.
//!
//! While guests are held nothing is granted: whoever asks is told to come back, and waits nowhere
//! that the end of a VM waits for.
//!
//! # Locks
//! `Room::put_off` is taken by the event loop alone. `Room::reserving` is held by a start that
//! reserves, and while a gauge is asked for it; the guard takes neither.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::Watch;
use crate::admission::{GivenUp, NoMemory};
use crate::virtio::{Allowance, Doorbells};

/// What [`Room::grant`] gives where nothing limits.
const UNLIMITED: u64 = u64::MAX;
/// Longest time between two looks of a start that is held whether it may go on.
const HELD_INTERVAL: Duration = Duration::from_millis(20);

/// The room of one domain.
#[derive(Debug)]
pub(crate) struct Room {
    /// What queues may still take of the last grant.
    left_bytes: AtomicU64,
    /// The most that a queue asked for in vain since then.
    wanted_bytes: AtomicU64,
    /// What starts have reserved and not taken yet.
    reserved_bytes: AtomicU64,
    /// Guards that hold the domain's guests.
    holders: AtomicU32,
    /// Has the event loop ring the doorbells that were put off.
    resume: EventFd,
    /// By device and queue, so that a guest that rings again and again is in it once.
    put_off: Mutex<BTreeMap<(usize, usize), Doorbells>>,
    reserving: Mutex<()>,
    released: Condvar,
}

impl Room {
    /// A room without anything to take, until the guard's first look.
    pub(crate) fn new() -> io::Result<Room> {
        Ok(Room {
            left_bytes: AtomicU64::new(0),
            wanted_bytes: AtomicU64::new(0),
            reserved_bytes: AtomicU64::new(0),
            holders: AtomicU32::new(0),
            resume: EventFd::new(EFD_NONBLOCK)?,
            put_off: Mutex::default(),
            reserving: Mutex::default(),
            released: Condvar::new(),
        })
    }

    /// Sets what queues may take from now on; `None` where nothing limits. A queue that asked for
    /// more gets that much: it is a page or two, and below the line there is room for them.
    pub(crate) fn grant(&self, bytes: Option<u64>) {
        let wanted_bytes = self.wanted_bytes.swap(0, Ordering::SeqCst);
        let left_bytes = bytes.map_or(UNLIMITED, |bytes| bytes.max(wanted_bytes));
        self.left_bytes.store(left_bytes, Ordering::SeqCst);
        if wanted_bytes > 0 {
            self.resume();
        }
    }

    /// Takes `bytes` of the grant, if they are left; else the next one will have them.
    fn take(&self, bytes: u64) -> bool {
        let take = |left: u64| match left {
            UNLIMITED => Some(UNLIMITED),
            _ => left.checked_sub(bytes),
        };
        let taken = self
            .left_bytes
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, take);
        if taken.is_err() {
            self.wanted_bytes.fetch_max(bytes, Ordering::SeqCst);
        }
        taken.is_ok()
    }

    /// What starts will take for certain.
    pub(crate) fn reserved_bytes(&self) -> u64 {
        self.reserved_bytes.load(Ordering::SeqCst)
    }

    /// Stands everybody still who asks, until each of those who hold has released.
    pub(crate) fn hold(&self) {
        self.holders.fetch_add(1, Ordering::SeqCst);
    }

    pub(crate) fn release(&self) {
        if self.holders.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.resume();
            self.released.notify_all();
        }
    }

    fn is_held(&self) -> bool {
        self.holders.load(Ordering::SeqCst) > 0
    }

    fn resume(&self) {
        // A counter that is full wakes the event loop as well.
        let _full = self.resume.write(1);
    }

    fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
        // Changed by single inserts and removes, or guards no data.
        mutex.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Rings the doorbells that were put off, on the event loop.
///
/// On that thread, and not on the guard's: a queue that was just put off is in the list by then, and
/// the guard waits for no lock of the event loop.
#[derive(Debug)]
pub(crate) struct Resumer(pub(crate) Arc<Watch>);

impl MutEventSubscriber for Resumer {
    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        let room = &self.0.room;
        let _times = room.resume.read();
        let doorbells = std::mem::take(&mut *Room::lock(&room.put_off));
        for ((_, queue), doorbells) in doorbells {
            if let Some(doorbell) = doorbells.get(queue) {
                let _full = doorbell.write(1);
            }
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(&self.0.room.resume, EventSet::IN)) {
            log::error!("cannot watch for memory that queues wait for: {error}");
        }
    }
}

/// One VM's leave to take memory, from the beginning of its start to its end.
#[derive(Debug)]
pub(crate) struct VmAllowance {
    watch: Arc<Watch>,
    page_bytes: u64,
    /// Why nothing is to be taken any more: the VM ends, or its start is given up.
    over: OnceLock<GivenUp>,
    /// What its start has reserved and not taken yet.
    reserved_bytes: AtomicU64,
    /// What its start has taken.
    loaded_bytes: AtomicU64,
}

impl VmAllowance {
    /// For a VM whose memory comes in pages of `page_bytes`.
    pub(crate) fn new(watch: &Arc<Watch>, page_bytes: u64) -> VmAllowance {
        VmAllowance {
            watch: watch.clone(),
            page_bytes,
            over: OnceLock::new(),
            reserved_bytes: AtomicU64::new(0),
            loaded_bytes: AtomicU64::new(0),
        }
    }

    /// Takes everything back, for good. A start that is under way fails for the first reason given.
    pub(crate) fn close(&self, why: GivenUp) {
        self.over.get_or_init(|| why);
        self.watch.room.released.notify_all();
    }

    /// Why it was closed, if it was.
    pub(crate) fn over(&self) -> Option<GivenUp> {
        self.over.get().copied()
    }

    fn is_over(&self) -> bool {
        self.over().is_some()
    }

    /// What loading has taken so far.
    pub(crate) fn loaded_bytes(&self) -> u64 {
        self.loaded_bytes.load(Ordering::Relaxed)
    }

    /// Reserves what a start takes, before it takes any of it.
    ///
    /// # Errors
    /// [`NoMemory`] when that is more than is left, with VMs ended for none of it.
    pub(crate) fn reserve(&self, bytes: u64) -> Result<(), NoMemory> {
        let wanted_bytes = bytes.next_multiple_of(self.page_bytes);
        let room = &self.watch.room;
        // One after the other, so that two do not reserve the same.
        let _reserving = Room::lock(&room.reserving);
        if let Some((limit, room_bytes, limit_bytes)) = self.watch.room_for_start()
            && wanted_bytes > room_bytes
        {
            return Err(NoMemory {
                wanted_bytes,
                room_bytes,
                limit,
                limit_bytes,
            });
        }
        self.reserved_bytes.store(wanted_bytes, Ordering::SeqCst);
        room.reserved_bytes
            .fetch_add(wanted_bytes, Ordering::SeqCst);
        RESERVED_BYTES.fetch_add(wanted_bytes, Ordering::SeqCst);
        // Its speed is to be reckoned with from now on.
        self.watch.ring();
        Ok(())
    }

    /// Waits while guests are held, then takes `bytes` of what was reserved.
    ///
    /// # Errors
    /// [`GivenUp`] when the start is not to go on.
    pub(crate) fn load(&self, bytes: u64) -> Result<(), GivenUp> {
        let room = &self.watch.room;
        let mut reserving = None;
        while room.is_held() && !self.is_over() {
            let guard = reserving.unwrap_or_else(|| Room::lock(&room.reserving));
            // With an end: the guard does not take the lock to say so.
            let (guard, _) = room
                .released
                .wait_timeout(guard, HELD_INTERVAL)
                .unwrap_or_else(PoisonError::into_inner);
            reserving = Some(guard);
        }
        drop(reserving);
        if let Some(why) = self.over() {
            return Err(why);
        }
        self.unreserve(bytes);
        self.loaded_bytes.fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    }

    /// The start is over: what it did not take is anybody's.
    pub(crate) fn settle(&self) {
        self.unreserve(u64::MAX);
    }

    fn unreserve(&self, bytes: u64) {
        let mut taken_bytes = 0;
        let update =
            self.reserved_bytes
                .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |reserved| {
                    taken_bytes = reserved.min(bytes);
                    Some(reserved - taken_bytes)
                });
        debug_assert!(update.is_ok(), "the closure always answers");
        let room = &self.watch.room;
        room.reserved_bytes.fetch_sub(taken_bytes, Ordering::SeqCst);
        RESERVED_BYTES.fetch_sub(taken_bytes, Ordering::SeqCst);
    }
}

impl Drop for VmAllowance {
    fn drop(&mut self) {
        self.settle();
    }
}

/// What starts in all domains of this process have reserved and not taken: a cgroup's limit counts
/// for them together.
pub(super) static RESERVED_BYTES: AtomicU64 = AtomicU64::new(0);

impl Allowance for VmAllowance {
    fn is_open(&self) -> bool {
        !self.is_over() && !self.watch.room.is_held()
    }

    fn take(&self, bytes: u64) -> bool {
        if !self.is_open() {
            return false;
        }
        let taken = self.watch.room.take(bytes);
        if !taken {
            self.watch.ring();
        }
        taken
    }

    fn page_bytes(&self) -> u64 {
        self.page_bytes
    }

    fn ring_later(&self, doorbells: &Doorbells, queue: usize) {
        if self.is_over() {
            return;
        }
        let device = Arc::as_ptr(doorbells).cast::<EventFd>().addr();
        Room::lock(&self.watch.room.put_off).insert((device, queue), doorbells.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::EventLoop;
    use crate::roster::Roster;
    use std::time::Instant;

    const LONG: Duration = Duration::from_secs(120);

    fn watch() -> Arc<Watch> {
        let engine = dedup::Engine::new(&dedup::Settings::default()).unwrap();
        Watch::new(Arc::new(engine), Arc::new(Roster::default())).unwrap()
    }

    fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
        let deadline = Instant::now() + LONG;
        while !done() {
            assert!(Instant::now() < deadline, "not in time: {what}");
            std::thread::yield_now();
        }
    }

    #[test]
    fn queues_take_what_was_granted_and_then_ask_for_a_look() {
        let room = Room::new().unwrap();
        assert!(!room.take(1), "nothing before the first look");
        room.grant(Some(10));
        assert!(room.take(6));
        assert!(!room.take(6));
        assert!(room.take(4), "what is left is left");
        room.grant(Some(0));
        assert!(room.take(6), "what was asked for");
        assert!(!room.take(1));
        room.grant(None);
        assert!(room.take(u64::MAX - 1) && room.take(u64::MAX - 1));
    }

    #[test]
    fn a_queue_that_was_put_off_is_rung_once_when_there_is_memory_or_nobody_is_held() {
        let watch = watch();
        let events = EventLoop::new().unwrap();
        let resumer = Box::new(Resumer(watch.clone()));
        events
            .remote()
            .add(resumer, Box::new(|text| panic!("{text}")))
            .unwrap();
        let vm = VmAllowance::new(&watch, 4096);
        let doorbells: Doorbells = [(); 2].map(|()| EventFd::new(EFD_NONBLOCK).unwrap()).into();
        watch.room.grant(Some(4096));
        assert!(vm.take(4096) && !vm.take(8192));
        for _ in 0..3 {
            vm.ring_later(&doorbells, 1);
        }
        watch.room.grant(Some(0));
        wait_for("the doorbell", || doorbells[1].read().is_ok());
        assert!(vm.take(8192), "the grant has what was asked for");

        watch.room.hold();
        watch.room.hold();
        assert!(!vm.is_open() && !vm.take(1));
        vm.ring_later(&doorbells, 0);
        watch.room.release();
        assert!(!vm.is_open(), "somebody else holds it");
        watch.room.release();
        wait_for("the doorbell", || doorbells[0].read().is_ok());
        assert!(vm.is_open());
        assert!(doorbells[1].read().is_err(), "it was rung before");
        drop(events);
    }

    #[test]
    fn nothing_is_taken_for_a_vm_that_ends() {
        let watch = watch();
        watch.room.grant(None);
        let vm = VmAllowance::new(&watch, 4096);
        assert!(vm.take(1));
        vm.close(GivenUp::Stopped);
        assert!(!vm.is_open() && !vm.take(1));
        let doorbells: Doorbells = [EventFd::new(EFD_NONBLOCK).unwrap()].into();
        vm.ring_later(&doorbells, 0);
        assert_eq!(Arc::strong_count(&doorbells), 1, "it is not to be rung");
    }

    #[test]
    fn a_start_reserves_what_is_left_and_gives_back_what_it_did_not_take() {
        let watch = watch();
        let (first, second) = (
            VmAllowance::new(&watch, 4096),
            VmAllowance::new(&watch, 2 << 20),
        );
        let used = watch.gauge.use_bytes();
        watch.engine.set_memory_budget(Some(used + (3 << 30)));
        first.reserve(2 << 30).unwrap();
        let refused = second.reserve((1 << 30) + 1).unwrap_err();
        assert_eq!(refused.wanted_bytes, (1 << 30) + (2 << 20));
        assert!(
            (1 << 28..1 << 30).contains(&refused.room_bytes),
            "{refused}"
        );
        let text = refused.to_string();
        assert!(text.contains("memory_budget of"), "{text}");
        first.load(1 << 30).unwrap();
        first.settle();
        second.reserve(2 << 30).unwrap();
        drop((first, second));
        assert_eq!(watch.room.reserved_bytes(), 0);
    }

    #[test]
    fn a_start_stands_still_while_guests_are_held_and_may_be_the_one_to_go() {
        let watch = watch();
        let vm = Arc::new(VmAllowance::new(&watch, 4096));
        vm.reserve(1 << 20).unwrap();
        watch.room.hold();
        let loading = vm.clone();
        let loader = std::thread::spawn(move || loading.load(4096));
        let loading = vm.clone();
        let other = std::thread::spawn(move || loading.load(4096));
        assert_eq!(vm.loaded_bytes(), 0);
        vm.close(GivenUp::NoMemory);
        vm.close(GivenUp::Stopped);
        assert_eq!(loader.join().unwrap(), Err(GivenUp::NoMemory));
        assert_eq!(other.join().unwrap(), Err(GivenUp::NoMemory));
        watch.room.release();
    }
}
