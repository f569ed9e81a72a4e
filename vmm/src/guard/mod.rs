//! The guard: sees to it that a domain never takes more memory than it may.
//!
//! Guests take memory by writing to pages they share, without asking anybody, and the kernel's own
//! answer to a full cgroup is to kill the monitor with all its VMs. So one thread looks at the real
//! figure ([`gauge`]), judges it ([`policy`]), and acts before the kernel does: it has the worker
//! hurry, and past the line it holds all guests of the domain still, ends one VM after the other
//! until there is room, and lets the rest go on. While it works nobody takes memory, so the limit
//! is not overrun however long a VM takes to end.
//!
//! Taking back free guest pages would be a step between; it needs a balloon or free page reporting,
//! which there is none of yet.
//!
//! A look must come when it is due, or guests overrun the reserve meanwhile. So it waits for
//! nothing that the worker, a guest or a reply holds, each of which may be off the CPU for tens of
//! milliseconds where guests keep all CPUs busy: it takes no lock of theirs, reads by open files
//! of its own (the kernel has a lock for each), allocates nothing that the full cgroup would have to
//! be charged for, and its thread runs before theirs.
//!
//! # Locks
//! The guard holds none but [`ACTING`] while it waits for a VM's end. Until guests are held it takes
//! but the bell and the roster, which nobody holds for longer than a copy.

pub(crate) mod cgroup;
pub(crate) mod gauge;
pub(crate) mod policy;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dedup::Engine;
use thread_priority::ThreadPriority;
use thread_priority::unix::{
    RealtimeThreadSchedulePolicy, ThreadSchedulePolicy, set_thread_priority_and_policy,
    thread_native_id,
};

use self::gauge::Gauge;
use self::policy::{Action, Candidate, Policy, Sight, victim};
use crate::id::VmId;
use crate::panics;
use crate::roster::Roster;
use crate::state::EndReason;
use crate::vm::Vm;

/// One guard of the process acts at a time: two that see the same full cgroup would end a VM each.
static ACTING: Mutex<()> = Mutex::new(());

/// How long the end of a VM is waited for before the next one is chosen.
const END_PATIENCE: Duration = Duration::from_secs(10);
/// Time until the next look when nothing is left to end.
const HELPLESS: Duration = Duration::from_millis(500);
/// How long an unmerge waits where the guard gives it the memory of VMs.
const UNMERGE_PATIENCE_WITH_VICTIMS: Duration = Duration::from_secs(60);
/// Time between two questions for the pressure.
const PRESSURE_INTERVAL: Duration = Duration::from_secs(1);
/// The most urgent that a thread can be without being real-time, for who may not be that.
const NICE: i32 = -20;

/// What the guard works on, shared with its monitor.
#[derive(Debug)]
pub(crate) struct Watch {
    pub(crate) engine: Arc<Engine>,
    /// For replies and the merge engine; the guard looks by a twin of it.
    pub(crate) gauge: Arc<Gauge>,
    pub(crate) vms: Arc<Roster>,
    unmerge_victims: AtomicBool,
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
    pub(crate) fn new(engine: Arc<Engine>, vms: Arc<Roster>) -> Arc<Watch> {
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let gauge = Arc::new(Gauge::new(engine.process_memory(), cpus));
        engine.set_memory_gauge(gauge.clone());
        Arc::new(Watch {
            engine,
            gauge,
            vms,
            unmerge_victims: AtomicBool::new(false),
            victims: AtomicU64::new(0),
            bell: Mutex::default(),
            rung: Condvar::new(),
        })
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

    /// VMs that the guard ended so far.
    pub(crate) fn victims(&self) -> u64 {
        self.victims.load(Ordering::Relaxed)
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
        gauge.calibrate(|| vms.iter().filter_map(|vm| vm.private_bytes()).sum());
    }

    fn bell(&self) -> std::sync::MutexGuard<'_, Bell> {
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

/// The guard's thread, stopped and joined on drop.
#[derive(Debug)]
pub(crate) struct Guard {
    watch: Arc<Watch>,
    thread: Option<JoinHandle<()>>,
}

impl Guard {
    /// Starts the thread `guard`.
    pub(crate) fn spawn(watch: &Arc<Watch>) -> std::io::Result<Guard> {
        let (theirs, gauge) = (watch.clone(), watch.gauge.twin()?);
        let thread = std::thread::Builder::new()
            .name("guard".to_owned())
            .spawn(move || stand(&theirs, gauge))?;
        Ok(Guard {
            watch: watch.clone(),
            thread: Some(thread),
        })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
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
fn stand(watch: &Watch, gauge: Gauge) {
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

struct Round<'a> {
    watch: &'a Watch,
    gauge: Gauge,
    policy: Policy,
    begun: Instant,
    /// What the worker was told last.
    hurries: bool,
    /// PSI, and when it was asked for.
    pressure: Option<(Instant, f64)>,
}

impl<'a> Round<'a> {
    fn new(watch: &'a Watch, gauge: Gauge) -> Round<'a> {
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Round {
            watch,
            gauge,
            policy: Policy::new(cpus),
            begun: Instant::now(),
            hurries: false,
            pressure: None,
        }
    }

    /// One look, and what it asks for. Returns the time until the next.
    fn look(&mut self) -> Duration {
        let budget_bytes = self.watch.engine.memory_budget_bytes();
        if budget_bytes.is_some() && self.gauge.wants_count(budget_bytes) {
            self.watch.count(&self.gauge);
        }
        self.ask_pressure();
        let mut sight = self.sight();
        self.policy.note(self.begun.elapsed(), &sight);
        let action = self.policy.action(self.begun.elapsed(), &sight);
        let mut is_helpless = false;
        if action == Action::StopVictim {
            is_helpless = !self.make_room(sight.is_starving);
            self.policy.begin_anew();
            sight = self.sight();
            self.policy.note(self.begun.elapsed(), &sight);
        }
        self.tell_worker(action != Action::Rest);
        let next = self.policy.next_look(&sight);
        if is_helpless {
            next.max(HELPLESS)
        } else {
            next
        }
    }

    /// Has the worker hurry, or not any more. If its orders are in use the next look tells it.
    fn tell_worker(&mut self, hurry: bool) {
        if hurry != self.hurries && self.watch.engine.try_set_hurry(hurry) {
            self.hurries = hurry;
        }
    }

    /// Asks for the pressure if the answer is old: the kernel averages it over 10 s.
    fn ask_pressure(&mut self) {
        let is_fresh = |(at, _): (Instant, f64)| at.elapsed() < PRESSURE_INTERVAL;
        if !self.pressure.is_some_and(is_fresh) {
            let percent = self.gauge.pressure_percent();
            self.pressure = Some((Instant::now(), percent));
        }
    }

    fn sight(&self) -> Sight {
        let watch = self.watch;
        let nearest = self.gauge.nearest(watch.engine.memory_budget_bytes());
        let filled = nearest.map(|(_, filled)| filled);
        let is_short = filled.is_some_and(policy::Filled::is_short);
        Sight {
            filled,
            pressure_percent: self.pressure.map_or(0.0, |(_, percent)| percent),
            is_out: is_short && self.gauge.is_out(),
            is_starving: watch.unmerge_victims() && watch.engine.memory_waited_for_bytes() > 0,
        }
    }

    /// Holds the guests and ends VMs until use is below the line, and one at least for an unmerge
    /// that starves. False if there is nothing left to end.
    fn make_room(&mut self, for_unmerge: bool) -> bool {
        let mut held = Held::default();
        held.hold(&self.watch.vms.all());
        let _acting = ACTING.lock().unwrap_or_else(PoisonError::into_inner);
        let mut ended = 0;
        loop {
            self.watch.count(&self.gauge);
            let sight = self.sight();
            // What was growing stands still.
            self.policy.begin_anew();
            let is_over = self.policy.action(Duration::ZERO, &sight) == Action::StopVictim;
            let is_owed = for_unmerge && sight.is_starving && ended == 0;
            if !is_over && !is_owed {
                return true;
            }
            let vms = self.watch.vms.all();
            // Some may have been started meanwhile.
            held.hold(&vms);
            if has_ended(&vms) {
                continue;
            }
            let Some(vm) = Self::next_end(&vms) else {
                log::error!("memory is over its limit, and there is no vm left to end: {sight:?}");
                return false;
            };
            log::warn!("vm {} is ended for want of memory: {sight:?}", vm.id());
            vm.end(EndReason::OomVictim);
            match vm.wait_ended(Instant::now() + END_PATIENCE) {
                Some(EndReason::OomVictim) => {
                    self.watch.victims.fetch_add(1, Ordering::Relaxed);
                }
                // Somebody else was quicker.
                Some(_) => {}
                None => log::error!("vm {} has not ended within {END_PATIENCE:?}", vm.id()),
            }
            ended += 1;
            self.watch.engine.memory_given_back();
        }
    }

    /// The VM to end next. Only those of the lowest priority are asked how much they hold: the
    /// answer takes a walk through their page tables, and all guests stand still meanwhile.
    fn next_end(vms: &[Arc<Vm>]) -> Option<Arc<Vm>> {
        let endable = || vms.iter().filter(|vm| vm.has_machine());
        let lowest = endable().map(|vm| vm.oom_priority()).min()?;
        let least_important = endable().filter(|vm| vm.oom_priority() == lowest);
        let candidates: Vec<Candidate> = least_important.filter_map(|vm| vm.candidate()).collect();
        let chosen = &victim(&candidates)?.id;
        vms.iter().find(|vm| vm.id() == chosen).cloned()
    }
}

/// Waits for a VM that is ending anyway, if there is one. True if it has ended: that may do.
fn has_ended(vms: &[Arc<Vm>]) -> bool {
    let ending = vms.iter().find(|vm| vm.is_ending());
    ending.is_some_and(|vm| vm.wait_ended(Instant::now() + END_PATIENCE).is_some())
}

/// VMs whose guests stand still until this is dropped.
#[derive(Default)]
struct Held(BTreeMap<VmId, Arc<Vm>>);

impl Held {
    fn hold(&mut self, vms: &[Arc<Vm>]) {
        for vm in vms {
            vm.set_held(true);
            self.0.insert(vm.id().clone(), vm.clone());
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.values().for_each(|vm| vm.set_held(false));
    }
}
