//! How much memory is in use, and of which limit: the domain's budget, or that of a cgroup.
//!
//! A cgroup's figure is the kernel's own account, and the one that its OOM killer acts on. Where a
//! budget is set, the figure for it is what the domain holds: all private memory of the process
//! and the pool, if this is the only domain of the process. Pages of the pool count once, where
//! the resident set counts each mapping of them. With several domains in one process the kernel has
//! no cheap figure for one of them. Then the guard adds up the VMs' pages ([`Gauge::calibrate`]),
//! the sooner again the less is left, and as soon as the process has taken what could have been this
//! domain's. That is coarser: guests may overrun such a budget by what they take between two counts.
//!
//! What the kernel holds for a process (page tables, VMAs) is in a cgroup's figure alone.
//!
//! # Locks
//! `Gauge::counted` and `Gauge::found` are leaves: the merge engine asks the gauge with its own locks
//! held. The latter is a gauge's own; a twin waits for nobody.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use dedup::{Headroom, MemoryGauge, ProcessMemory};

use super::cgroup::{Cgroups, Places};
use super::policy::{Filled, Policy};

/// Monitors in this process.
static MONITORS: AtomicUsize = AtomicUsize::new(0);
/// Whether a VM with huge pages was ever created in this process: it may fill whatever limit the
/// process has.
static HUGE_PAGES: AtomicBool = AtomicBool::new(false);

/// Time between two counts of the VMs' pages.
const COUNT_INTERVAL: Duration = Duration::from_millis(100);
/// The same where little is left.
const COUNT_INTERVAL_SHORT: Duration = Duration::from_millis(5);
/// And at least so many times as long as the count takes.
const COUNT_COST: u32 = 4;

/// The gauge of one domain.
#[derive(Debug)]
pub(crate) struct Gauge {
    process: Arc<ProcessMemory>,
    found: Mutex<Found>,
    /// Goes up when the groups are to be found anew; shared with twins.
    generation: Arc<AtomicU64>,
    counted: Arc<Mutex<Option<Counted>>>,
    cpus: usize,
    monitor: Arc<CountedMonitor>,
}

/// The process's groups as they were found.
#[derive(Debug)]
struct Found {
    cgroups: Option<Arc<Cgroups>>,
    generation: u64,
}

/// Counts in [`MONITORS`] while it lives.
#[derive(Debug)]
struct CountedMonitor;

impl CountedMonitor {
    fn new() -> CountedMonitor {
        MONITORS.fetch_add(1, Ordering::Relaxed);
        CountedMonitor
    }
}

impl Drop for CountedMonitor {
    fn drop(&mut self) {
        MONITORS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A count of the VMs' own pages.
#[derive(Debug, Clone, Copy)]
struct Counted {
    vms_bytes: u64,
    process_bytes: u64,
    at: Instant,
    cost: Duration,
}

/// From now on guests may take huge pages.
pub(crate) fn expect_huge_pages() {
    HUGE_PAGES.store(true, Ordering::Relaxed);
}

/// Whether guests may take huge pages.
pub(super) fn expects_huge_pages() -> bool {
    HUGE_PAGES.load(Ordering::Relaxed)
}

/// Domains of this process.
pub(super) fn domains() -> u64 {
    MONITORS.load(Ordering::Relaxed) as u64
}

/// Which limit is the nearest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Limit {
    /// The domain's `memory_budget`.
    Budget,
    /// A cgroup of the process.
    Cgroup,
}

impl fmt::Display for Limit {
    /// As the API names what sets it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Limit::Budget => "memory_budget",
            Limit::Cgroup => "cgroup's limit",
        })
    }
}

fn is_only_monitor() -> bool {
    MONITORS.load(Ordering::Relaxed) == 1
}

impl Gauge {
    pub(crate) fn new(process: Arc<ProcessMemory>, cpus: usize) -> Gauge {
        Gauge {
            process,
            found: Mutex::new(Found {
                cgroups: cgroups(),
                generation: 0,
            }),
            generation: Arc::default(),
            counted: Arc::default(),
            cpus,
            monitor: Arc::new(CountedMonitor::new()),
        }
    }

    /// The same gauge, with open files of its own: for the guard, which must not wait behind the
    /// worker or a reply in the middle of reading one (`fs/seq_file.c` has a lock for each).
    ///
    /// # Errors
    /// If `/proc` cannot be read.
    pub(crate) fn twin(&self) -> io::Result<Gauge> {
        Ok(Gauge {
            process: Arc::new(self.process.reopen()?),
            found: Mutex::new(Found {
                cgroups: cgroups(),
                generation: self.generation.load(Ordering::Relaxed),
            }),
            generation: Arc::clone(&self.generation),
            counted: Arc::clone(&self.counted),
            cpus: self.cpus,
            monitor: Arc::clone(&self.monitor),
        })
    }

    /// The process's groups, found anew if [`Gauge::follow_moves`] said so since. If they cannot be,
    /// for want of a descriptor say, those that were found before count until they can.
    fn cgroups(&self) -> Option<Arc<Cgroups>> {
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        let generation = self.generation.load(Ordering::Relaxed);
        if found.generation != generation {
            found.generation = generation;
            if let Some(anew) = cgroups() {
                found.cgroups = Some(anew);
            }
        }
        found.cgroups.clone()
    }

    /// Has the groups found anew, by this gauge and its twins, if the process was moved, or a
    /// controller enabled. True if so.
    pub(crate) fn follow_moves(&self) -> bool {
        let have_changed = self.cgroups().is_none_or(|cgroups| cgroups.have_changed());
        if have_changed {
            self.generation.fetch_add(1, Ordering::Relaxed);
        }
        have_changed
    }

    /// What the kernel tells of this process's memory.
    pub(crate) fn process(&self) -> &ProcessMemory {
        &self.process
    }

    /// A policy that has seen nothing yet: it tells the line, and how much is kept free.
    pub(crate) fn policy(&self) -> Policy {
        let mut policy = Policy::new(self.cpus);
        if expects_huge_pages() {
            policy.expect_huge_pages();
        }
        policy
    }

    /// What the engine may take of a limit.
    pub(crate) fn room_for_engine(&self, filled: Filled) -> u64 {
        let margin_bytes = self.policy().margin_bytes(filled.limit_bytes);
        filled.headroom_bytes().saturating_sub(margin_bytes)
    }

    /// Use of a limit above which VMs are ended.
    pub(crate) fn line_bytes(&self, limit_bytes: u64) -> u64 {
        self.policy().line_bytes(limit_bytes)
    }

    fn counted(&self) -> std::sync::MutexGuard<'_, Option<Counted>> {
        self.counted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether [`Gauge::calibrate`] is due: for a figure that is old, sooner if little is left, and
    /// at once if what the process has taken since could have been all the domain's.
    pub(crate) fn wants_count(&self, budget_bytes: Option<u64>) -> bool {
        if is_only_monitor() {
            return false;
        }
        let Some(counted) = *self.counted() else {
            return true;
        };
        let age = counted.at.elapsed();
        if age < counted.cost * COUNT_COST {
            return false;
        }
        let grown_bytes = self.process_bytes().saturating_sub(counted.process_bytes);
        let bound = budget_bytes.map(|limit_bytes| Filled {
            use_bytes: self.use_bytes() + grown_bytes,
            limit_bytes,
        });
        let is_short = bound.is_some_and(Filled::is_short);
        age >= if is_short {
            COUNT_INTERVAL_SHORT
        } else {
            COUNT_INTERVAL
        }
    }

    /// Takes `count_vms`'s word for what the domain's VMs hold, if the process has other domains.
    pub(crate) fn calibrate(&self, count_vms: impl FnOnce() -> u64) {
        if is_only_monitor() {
            *self.counted() = None;
            return;
        }
        let at = Instant::now();
        let process_bytes = self.process_bytes();
        let vms_bytes = count_vms();
        *self.counted() = Some(Counted {
            vms_bytes,
            process_bytes,
            at,
            cost: at.elapsed(),
        });
    }

    /// What the process has taken since the VMs' pages were counted: some of it may be this domain's.
    /// 0 where nothing has to be counted.
    pub(crate) fn uncounted_bytes(&self) -> u64 {
        let counted = *self.counted();
        counted.map_or(0, |counted| {
            self.process_bytes().saturating_sub(counted.process_bytes)
        })
    }

    fn process_bytes(&self) -> u64 {
        or_logged(self.process.private_bytes())
    }

    /// What the domain holds.
    pub(crate) fn use_bytes(&self) -> u64 {
        let counted = *self.counted();
        let private_bytes = counted.map_or_else(|| self.process_bytes(), |it| it.vms_bytes);
        private_bytes + or_logged(self.process.pool_bytes())
    }

    /// All limits, and how full they are.
    pub(crate) fn limits(&self, budget_bytes: Option<u64>) -> [Option<(Limit, Filled)>; 2] {
        let of_budget = budget_bytes.map(|limit_bytes| {
            let use_bytes = self.use_bytes();
            let filled = Filled {
                use_bytes,
                limit_bytes,
            };
            (Limit::Budget, filled)
        });
        let of_cgroup = self.cgroups().and_then(|cgroups| cgroups.filled());
        [of_budget, of_cgroup.map(|filled| (Limit::Cgroup, filled))]
    }

    /// The limit whose line is nearest, and how full it is; `None` where nothing limits.
    ///
    /// By the line and not by the limit: of a larger limit more is kept free.
    pub(crate) fn nearest(&self, budget_bytes: Option<u64>) -> Option<(Limit, Filled)> {
        let policy = self.policy();
        let room = |filled: &Filled| {
            let line_bytes = policy.line_bytes(filled.limit_bytes);
            i128::from(line_bytes) - i128::from(filled.use_bytes)
        };
        let limits = self.limits(budget_bytes).into_iter().flatten();
        limits.min_by_key(|(_, filled)| room(filled))
    }

    /// The limit that a domain's VMs are promised memory of.
    pub(crate) fn limit_bytes(&self, budget_bytes: Option<u64>) -> Option<u64> {
        let of_cgroup = self.cgroups().and_then(|cgroups| cgroups.filled());
        let both = [budget_bytes, of_cgroup.map(|filled| filled.limit_bytes)];
        both.into_iter().flatten().min()
    }

    /// See [`Cgroups::pressure_percent`].
    pub(crate) fn pressure_percent(&self) -> f64 {
        let cgroups = self.cgroups();
        cgroups.map_or(0.0, |cgroups| cgroups.pressure_percent())
    }

    /// See [`Cgroups::is_out`].
    pub(crate) fn is_out(&self) -> bool {
        self.cgroups().is_some_and(|cgroups| cgroups.is_out())
    }
}

fn cgroups() -> Option<Arc<Cgroups>> {
    let cgroups = Cgroups::find(&Places::default());
    if let Err(error) = &cgroups {
        log::warn!("cannot tell the memory limits of this process's cgroups: {error}");
    }
    cgroups.ok().map(Arc::new)
}

/// A figure that cannot be had counts as nothing: better no guard than one that ends VMs blindly.
fn or_logged(bytes: io::Result<u64>) -> u64 {
    bytes.unwrap_or_else(|error| {
        log::warn!("cannot tell how much memory is in use: {error}");
        0
    })
}

/// For the merge engine's reservations: they end well before the guard's line, so that an unmerge
/// runs out of its own budget before it makes the guard end a VM.
impl MemoryGauge for Gauge {
    fn headroom(&self, budget_bytes: Option<u64>) -> Option<Headroom> {
        let now = Instant::now();
        let counted_at = self.counted().map(|counted| counted.at);
        let (limit, filled) = self.nearest(budget_bytes)?;
        Some(Headroom {
            bytes: self.room_for_engine(filled),
            as_of: counted_at.filter(|_| limit == Limit::Budget).unwrap_or(now),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_engine_is_told_of_less_room_than_the_guard_allows() {
        let engine = dedup::Engine::new(&dedup::Settings::default()).expect("userfaultfd");
        let gauge = Gauge::new(engine.process_memory(), 2);
        assert!(gauge.use_bytes() > 0);
        // A figure that stands still, where the process's changes with the tests beside this one.
        let _other = Gauge::new(engine.process_memory(), 2);
        gauge.calibrate(|| 1 << 30);
        let used = gauge.use_bytes();
        let budget = used + (1 << 30);
        let room = gauge.headroom(Some(budget)).expect("a budget").bytes;
        let line = gauge.line_bytes(budget);
        assert!(
            room < line.saturating_sub(used),
            "{room} of {line} - {used}"
        );
        assert_eq!(gauge.headroom(Some(1)).expect("a budget").bytes, 0);
    }

    #[test]
    fn with_other_domains_in_the_process_the_count_of_the_vms_is_taken() {
        let engine = dedup::Engine::new(&dedup::Settings::default()).expect("userfaultfd");
        let gauge = Gauge::new(engine.process_memory(), 2);
        let _other = Gauge::new(engine.process_memory(), 2);
        assert!(gauge.wants_count(None));
        let before = Instant::now();
        gauge.calibrate(|| 7 << 40);
        assert_eq!(gauge.use_bytes(), 7 << 40);
        let headroom = gauge.headroom(Some(8 << 40)).expect("a budget");
        assert!((before..=Instant::now()).contains(&headroom.as_of));
    }

    #[test]
    fn a_twin_knows_what_was_counted_and_is_no_other_monitor() {
        let engine = dedup::Engine::new(&dedup::Settings::default()).expect("userfaultfd");
        let gauge = Gauge::new(engine.process_memory(), 2);
        let other = Gauge::new(engine.process_memory(), 2);
        let twin = gauge.twin().expect("its files");
        gauge.calibrate(|| 7 << 40);
        assert_eq!(twin.use_bytes(), 7 << 40);
        twin.calibrate(|| 8 << 40);
        assert_eq!(gauge.use_bytes(), 8 << 40);
        assert!(Arc::ptr_eq(&gauge.monitor, &twin.monitor));
        assert!(!Arc::ptr_eq(&gauge.monitor, &other.monitor));
    }
}
