//! How much memory is in use, and of which limit: the domain's budget, or that of a cgroup.
//!
//! A cgroup's figure is the kernel's own account, and the one that its OOM killer acts on. Where a
//! budget is set, the figure for it is what the domain holds: all private memory of the process
//! and the pool, if this is the only domain of the process. Pages of the pool count once, where
//! the resident set counts each mapping of them. With several domains in one process the kernel has
//! no cheap figure for one of them. Then the guard adds up the VMs' pages from time to time
//! ([`Gauge::calibrate`]), and in between all growth of the process counts as this domain's: too
//! much, and the guard adds up again before it acts on that.
//!
//! What the kernel holds for a process (page tables, VMAs) is in a cgroup's figure alone.
//!
//! # Locks
//! `Gauge::counted` is a leaf: the merge engine asks the gauge with its own locks held.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use dedup::{MemoryGauge, ProcessMemory};

use super::cgroup::{Cgroups, Places};
use super::policy::{Filled, Policy};

/// Monitors in this process.
static MONITORS: AtomicUsize = AtomicUsize::new(0);

/// Time between two counts of the VMs' pages, at least.
const COUNT_INTERVAL: Duration = Duration::from_millis(100);
/// And as many times as long as the count takes: some percent of a core at most.
const COUNT_COST: u32 = 30;

/// The gauge of one domain.
#[derive(Debug)]
pub(crate) struct Gauge {
    process: Arc<ProcessMemory>,
    cgroups: Option<Cgroups>,
    counted: Mutex<Option<Counted>>,
    /// Tells the line, which only depends on the number of CPUs.
    policy: Policy,
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

impl Gauge {
    pub(crate) fn new(process: Arc<ProcessMemory>, cpus: usize) -> Gauge {
        MONITORS.fetch_add(1, Ordering::Relaxed);
        let cgroups = Cgroups::find(&Places::default());
        if let Err(error) = &cgroups {
            log::warn!("cannot tell the memory limits of this process's cgroups: {error}");
        }
        Gauge {
            process,
            cgroups: cgroups.ok(),
            counted: Mutex::default(),
            policy: Policy::new(cpus),
        }
    }

    fn counted(&self) -> std::sync::MutexGuard<'_, Option<Counted>> {
        self.counted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether [`Gauge::calibrate`] is due.
    pub(crate) fn wants_count(&self) -> bool {
        if MONITORS.load(Ordering::Relaxed) == 1 {
            return false;
        }
        let due = |counted: Counted| {
            let interval = COUNT_INTERVAL.max(counted.cost * COUNT_COST);
            counted.at.elapsed() >= interval
        };
        self.counted().is_none_or(due)
    }

    /// Takes `count_vms`'s word for what the domain's VMs hold, if the process has other domains.
    pub(crate) fn calibrate(&self, count_vms: impl FnOnce() -> u64) {
        if MONITORS.load(Ordering::Relaxed) == 1 {
            *self.counted() = None;
            return;
        }
        let at = Instant::now();
        // Before the count: what comes in between is counted twice, not missed.
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
        let process_bytes = self.process_bytes();
        let counted = *self.counted();
        let private_bytes = match counted {
            None => process_bytes,
            Some(counted) => {
                counted.vms_bytes + process_bytes.saturating_sub(counted.process_bytes)
            }
        };
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

impl Drop for Gauge {
    fn drop(&mut self) {
        MONITORS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A figure that cannot be had counts as nothing: better no guard than one that ends VMs blindly.
fn or_logged(bytes: std::io::Result<u64>) -> u64 {
    bytes.unwrap_or_else(|error| {
        log::warn!("cannot tell how much memory is in use: {error}");
        0
    })
}

/// For the merge engine's reservations: they end well before the guard's line, so that an unmerge
/// runs out of its own budget before it makes the guard end a VM.
impl MemoryGauge for Gauge {
    fn headroom_bytes(&self, budget_bytes: Option<u64>) -> Option<u64> {
        let (_, filled) = self.nearest(budget_bytes)?;
        let reserve_bytes = self.policy.reserve_bytes(filled.limit_bytes);
        Some(filled.headroom_bytes().saturating_sub(2 * reserve_bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_engine_is_told_of_less_room_than_the_guard_allows() {
        let engine = dedup::Engine::new(&dedup::Settings::default()).expect("userfaultfd");
        let gauge = Gauge::new(engine.process_memory(), 2);
        let used = gauge.use_bytes();
        assert!(used > 0);
        let budget = used + (1 << 30);
        let room = gauge.headroom_bytes(Some(budget)).expect("a budget");
        let line = gauge.policy.line_bytes(budget);
        assert!(
            room < line.saturating_sub(used),
            "{room} of {line} - {used}"
        );
        assert_eq!(gauge.headroom_bytes(Some(1)), Some(0));
    }

    #[test]
    fn with_other_domains_in_the_process_the_count_of_the_vms_is_taken() {
        let engine = dedup::Engine::new(&dedup::Settings::default()).expect("userfaultfd");
        let gauge = Gauge::new(engine.process_memory(), 2);
        let _other = Gauge::new(engine.process_memory(), 2);
        assert!(gauge.wants_count());
        gauge.calibrate(|| 7 << 40);
        assert!(!gauge.wants_count());
        assert!(gauge.use_bytes() >= 7 << 40);
    }
}
