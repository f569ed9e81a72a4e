//! The guard: sees to it that a domain never takes more memory than it may.
//!
//! Guests take memory by writing to pages they share, without asking anybody, and the kernel's own
//! answer to a full cgroup is to kill the monitor with all its VMs. So one thread looks at the real
//! figure ([`gauge`]), judges it ([`policy`]), and acts before the kernel does: it has the worker
//! hurry, and past the line it holds all guests of the domain still, ends one VM after the other
//! until there is room, and lets the rest go on. While it works nobody takes memory, neither vCPUs
//! nor device queues nor starts ([`room`]), so the limit is not overrun however long a VM takes to
//! end. Of domains that share a limit, which a cgroup's is, all are held, and the VM to end is chosen
//! among those of all.
//!
//! Taking back free guest pages would be a step between. Guests report them, but at their own pace, and
//! not while they are held.
//!
//! A look must come when it is due, or guests overrun the reserve meanwhile. So it waits for
//! nothing that the worker, a guest or a reply holds, each of which may be off the CPU for tens of
//! milliseconds where guests keep all CPUs busy: it takes no lock of theirs, reads by files of its own
//! that are open from the start (the kernel has a lock for each, and the process may have no descriptor
//! left when it matters), allocates nothing that the full cgroup would have to be charged for, and its
//! thread runs before theirs.
//!
//! # Locks
//! The guard holds none but [`ACTING`] while it waits for a VM's end. Until guests are held it takes
//! but the bell and the roster, which nobody holds for longer than a copy; then the list of
//! domains too, of which the same holds.

pub(crate) mod cgroup;
pub(crate) mod gauge;
mod held;
pub(crate) mod policy;
pub(crate) mod room;
mod round;

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use dedup::Engine;
use thread_priority::ThreadPriority;
use thread_priority::unix::{
    RealtimeThreadSchedulePolicy, ThreadSchedulePolicy, set_thread_priority_and_policy,
    thread_native_id,
};

use self::gauge::{Gauge, Limit};
use self::room::Room;
use self::round::Round;
use crate::admission::UnmergeNoRoom;
use crate::panics;
use crate::roster::Roster;

/// One guard of the process acts at a time: two that see the same full cgroup would end a VM each.
static ACTING: Mutex<()> = Mutex::new(());

/// The guarded domains of this process. Those who share a limit are judged together.
static DOMAINS: Mutex<Vec<Weak<Watch>>> = Mutex::new(Vec::new());

/// Time until the next look when nothing is left to end.
const HELPLESS: Duration = Duration::from_millis(500);
/// How long an unmerge waits where the guard gives it the memory of VMs.
const UNMERGE_PATIENCE_WITH_VICTIMS: Duration = Duration::from_secs(60);
/// The most urgent that a thread can be without being real-time, for who may not be that.
const NICE: i32 = -20;

/// What the guard works on, shared with its monitor.
#[derive(Debug)]
pub(crate) struct Watch {
    pub(crate) engine: Arc<Engine>,
    /// For replies and the merge engine; the guard looks by a twin of it.
    pub(crate) gauge: Arc<Gauge>,
    pub(crate) vms: Arc<Roster>,
    /// What queues and starts may take.
    pub(crate) room: Room,
    unmerge_victims: AtomicBool,
    /// What the last unmerge lacked, if that was refused or gave up.
    unmerge_refusal: Mutex<Option<UnmergeNoRoom>>,
    victims: AtomicU64,
    bell: Mutex<Bell>,
    rung: Condvar,
}

#[derive(Debug, Default)]
struct Bell {
    is_rung: bool,
    stop: bool,
}

impl Watch {
    /// # Errors
    /// If an eventfd cannot be made.
    pub(crate) fn new(engine: Arc<Engine>, vms: Arc<Roster>) -> io::Result<Arc<Watch>> {
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let gauge = Arc::new(Gauge::new(engine.process_memory(), cpus));
        engine.set_memory_gauge(gauge.clone());
        Ok(Arc::new(Watch {
            engine,
            gauge,
            vms,
            room: Room::new()?,
            unmerge_victims: AtomicBool::new(false),
            unmerge_refusal: Mutex::default(),
            victims: AtomicU64::new(0),
            bell: Mutex::default(),
            rung: Condvar::new(),
        }))
    }

    /// Whether the guard ends VMs so that an unmerge fits.
    pub(crate) fn unmerge_victims(&self) -> bool {
        self.unmerge_victims.load(Ordering::Relaxed)
    }

    pub(crate) fn set_unmerge_victims(&self, allowed: bool) {
        self.unmerge_victims.store(allowed, Ordering::Relaxed);
        let patience = allowed.then_some(UNMERGE_PATIENCE_WITH_VICTIMS);
        self.engine.set_unmerge_patience(patience);
        self.ring();
    }

    /// What the last unmerge lacked, if that was refused or gave up.
    pub(crate) fn unmerge_refusal(&self) -> Option<UnmergeNoRoom> {
        let refusal = self.unmerge_refusal.lock();
        *refusal.unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set_unmerge_refusal(&self, refusal: Option<UnmergeNoRoom>) {
        let lock = self.unmerge_refusal.lock();
        *lock.unwrap_or_else(PoisonError::into_inner) = refusal;
    }

    /// VMs that the guard ended so far.
    pub(crate) fn victims(&self) -> u64 {
        self.victims.load(Ordering::Relaxed)
    }

    fn count_victim(&self) {
        self.victims.fetch_add(1, Ordering::Relaxed);
    }

    /// Has the guard look at once: something changed that its next look cannot wait for.
    pub(crate) fn ring(&self) {
        self.bell().is_rung = true;
        self.rung.notify_all();
    }

    /// Adds up what the VMs hold, where the process's own figure does not tell. `gauge` is this one's
    /// or its twin.
    pub(crate) fn count(&self, gauge: &Gauge) {
        let vms = self.vms.all();
        let of = |vm: &Arc<crate::vm::Vm>| vm.private_bytes(gauge.process());
        gauge.calibrate(|| vms.iter().filter_map(of).sum());
    }

    /// What a start may reserve, of the limit that has the least left; `None` where nothing limits.
    /// With it which one that is, and how much.
    pub(crate) fn room_for_start(&self) -> Option<(Limit, u64, u64)> {
        let budget_bytes = self.engine.memory_budget_bytes();
        // A start is when guests begin to take memory: the limit should be the one that counts now.
        self.gauge.follow_moves();
        if budget_bytes.is_some() {
            self.count(&self.gauge);
        }
        let limits = self.gauge.limits(budget_bytes).into_iter().flatten();
        let rooms = limits.map(|(limit, filled)| {
            let reserved_bytes = self.reserved_bytes(limit);
            let line_bytes = self.gauge.line_bytes(filled.limit_bytes);
            let room_bytes = line_bytes.saturating_sub(filled.use_bytes + reserved_bytes);
            (limit, room_bytes, filled.limit_bytes)
        });
        rooms.min_by_key(|&(_, room_bytes, _)| room_bytes)
    }

    /// What starts have reserved and not taken yet, of those that `limit` counts for.
    fn reserved_bytes(&self, limit: Limit) -> u64 {
        match limit {
            Limit::Budget => self.room.reserved_bytes(),
            Limit::Cgroup => room::RESERVED_BYTES.load(Ordering::SeqCst),
        }
    }

    /// The domains that `limit` counts for; this one is among them.
    fn sharing(self: &Arc<Watch>, limit: Limit) -> Vec<Arc<Watch>> {
        let others = match limit {
            Limit::Budget => Vec::new(),
            Limit::Cgroup => domains().iter().filter_map(Weak::upgrade).collect(),
        };
        let others = others.into_iter().filter(|other| !Arc::ptr_eq(other, self));
        std::iter::once(self.clone()).chain(others).collect()
    }

    fn bell(&self) -> MutexGuard<'_, Bell> {
        self.bell.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for `time` or until the bell rings. False when the guard is to end.
    fn wait(&self, time: Duration) -> bool {
        let quiet = |bell: &mut Bell| !bell.is_rung && !bell.stop;
        let (mut bell, _) = self
            .rung
            .wait_timeout_while(self.bell(), time, quiet)
            .unwrap_or_else(PoisonError::into_inner);
        bell.is_rung = false;
        !bell.stop
    }
}

fn domains() -> MutexGuard<'static, Vec<Weak<Watch>>> {
    // Changed by single pushes and a retain of its own: whole after any panic.
    DOMAINS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The guard's thread, stopped and joined on drop.
#[derive(Debug)]
pub(crate) struct Guard {
    watch: Arc<Watch>,
    thread: Option<JoinHandle<()>>,
}

impl Guard {
    /// Starts the thread `guard`.
    pub(crate) fn spawn(watch: &Arc<Watch>) -> io::Result<Guard> {
        let (theirs, gauge) = (watch.clone(), watch.gauge.twin()?);
        let thread = std::thread::Builder::new()
            .name("guard".to_owned())
            .spawn(move || stand(&theirs, gauge))?;
        domains().push(Arc::downgrade(watch));
        Ok(Guard {
            watch: watch.clone(),
            thread: Some(thread),
        })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        domains().retain(|domain| !std::ptr::eq(domain.as_ptr(), Arc::as_ptr(&self.watch)));
        self.watch.bell().stop = true;
        self.watch.rung.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the guard thread panicked");
        }
    }
}

/// Busy guests on all CPUs must not keep the guard from looking at what they take. Among threads of
/// the normal policy even the most urgent one waits for the next tick or two, 4 ms each at 250 Hz.
fn run_before_guests() {
    let fifo = ThreadSchedulePolicy::Realtime(RealtimeThreadSchedulePolicy::Fifo);
    let first = set_thread_priority_and_policy(thread_native_id(), ThreadPriority::Min, fifo);
    let Err(error) = first else {
        return;
    };
    log::debug!("the guard has no real-time priority: {error:?}");
    if let Err(error) = rustix::process::setpriority_process(None, NICE) {
        log::debug!("the guard runs no sooner than others: {error}");
    }
}

/// The thread: one look after the other.
fn stand(watch: &Arc<Watch>, gauge: Gauge) {
    run_before_guests();
    let mut round = Round::new(watch, gauge);
    loop {
        // A panic must neither leave guests held, which `Held` sees to, nor the domain unguarded.
        let looked = catch_unwind(AssertUnwindSafe(|| round.look()));
        let next = looked.unwrap_or_else(|payload| {
            log::error!("the guard panicked: {}", panics::text(&*payload));
            HELPLESS
        });
        if !watch.wait(next) {
            break;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guarded() -> Guard {
        let engine = Engine::new(&dedup::Settings::default()).unwrap();
        let watch = Watch::new(Arc::new(engine), Arc::default()).unwrap();
        Guard::spawn(&watch).unwrap()
    }

    #[test]
    fn victims_of_a_cgroups_limit_are_of_all_domains_and_those_of_a_budget_of_one() {
        let (one, other) = (guarded(), guarded());
        let has = |limit, watch: &Arc<Watch>| {
            let sharing = one.watch.sharing(limit);
            sharing.iter().any(|domain| Arc::ptr_eq(domain, watch))
        };
        assert!(has(Limit::Cgroup, &one.watch) && has(Limit::Cgroup, &other.watch));
        assert!(has(Limit::Budget, &one.watch) && !has(Limit::Budget, &other.watch));
        let gone = other.watch.clone();
        drop(other);
        assert!(!has(Limit::Cgroup, &gone));
    }
}
