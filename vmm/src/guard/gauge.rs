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
//! `Gauge::counted` is a leaf: the merge engine asks the gauge with its own locks held.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use dedup::{Headroom, MemoryGauge, ProcessMemory};

use super::cgroup::{Cgroups, Places};
use super::policy::{Filled, Policy};

/// Monitors in this process.
static MONITORS: AtomicUsize = AtomicUsize::new(0);

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
    cgroups: Option<Cgroups>,
    counted: Arc<Mutex<Option<Counted>>>,
    /// Tells the line, which only depends on the number of CPUs.
    policy: Policy,
    monitor: Arc<CountedMonitor>,
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

/// Which limit is the nearest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Limit {
    /// The domain's `memory_budget`.
    Budget,
    /// A cgroup of the process.
    Cgroup,
}

fn is_only_monitor() -> bool {
    MONITORS.load(Ordering::Relaxed) == 1
}

impl Gauge {
    pub(crate) fn new(process: Arc<ProcessMemory>, cpus: usize) -> Gauge {
        Gauge {
            process,
            cgroups: cgroups(),
            counted: Arc::default(),
            policy: Policy::new(cpus),
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
            cgroups: self.cgroups.as_ref().and_then(|_| cgroups()),
            counted: Arc::clone(&self.counted),
            policy: self.policy.clone(),
            monitor: Arc::clone(&self.monitor),
        })
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

    fn process_bytes(&self) -> u64 {
        or_logged(self.process.private_bytes())
    }

    /// What the domain holds.
    pub(crate) fn use_bytes(&self) -> u64 {
        let counted = *self.counted();
        let private_bytes = counted.map_or_else(|| self.process_bytes(), |it| it.vms_bytes);
        private_bytes + or_logged(self.process.pool_bytes())
    }

    /// The nearest limit, and how full it is; `None` where nothing limits.
    pub(crate) fn nearest(&self, budget_bytes: Option<u64>) -> Option<(Limit, Filled)> {
        let of_budget = budget_bytes.map(|limit_bytes| {
            let use_bytes = self.use_bytes();
            let filled = Filled {
                use_bytes,
                limit_bytes,
            };
            (Limit::Budget, filled)
        });
        let of_cgroup = self.cgroups.as_ref().and_then(Cgroups::filled);
        let both = [of_budget, of_cgroup.map(|filled| (Limit::Cgroup, filled))];
        let nearest = both.into_iter().flatten();
        nearest.min_by_key(|(_, filled)| filled.headroom_bytes())
    }

    /// The limit that a domain's VMs are promised memory of.
    pub(crate) fn limit_bytes(&self, budget_bytes: Option<u64>) -> Option<u64> {
        let of_cgroup = self.cgroups.as_ref().and_then(Cgroups::filled);
        let both = [budget_bytes, of_cgroup.map(|filled| filled.limit_bytes)];
        both.into_iter().flatten().min()
    }

    /// See [`Cgroups::pressure_percent`].
    pub(crate) fn pressure_percent(&self) -> f64 {
        let cgroups = self.cgroups.as_ref();
        cgroups.map_or(0.0, Cgroups::pressure_percent)
    }

    /// See [`Cgroups::is_out`].
    pub(crate) fn is_out(&self) -> bool {
        self.cgroups.as_ref().is_some_and(Cgroups::is_out)
    }
}

fn cgroups() -> Option<Cgroups> {
    let cgroups = Cgroups::find(&Places::default());
    if let Err(error) = &cgroups {
        log::warn!("cannot tell the memory limits of this process's cgroups: {error}");
    }
    cgroups.ok()
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
        let margin_bytes = self.policy.margin_bytes(filled.limit_bytes);
        Some(Headroom {
            bytes: filled.headroom_bytes().saturating_sub(margin_bytes),
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
        let line = gauge.policy.line_bytes(budget);
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
