//! The memory of a monitor's domain: what it may take, and what it may promise its VMs.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dedup::{EngineError, Run, Stats};

use super::Monitor;
use crate::admission::{Claims, Promise, UnmergeNoRoom};
use crate::error::MonitorError;
use crate::guard::gauge::Limit;
use crate::id::VmId;
use crate::info::{KsmProcess, MemoryInfo};
use crate::ksm::Ksm;
use crate::state::VmState;
use crate::vm::Vm;

impl Monitor {
    /// Claims a VM's memory for its start, against the domain's overcommit ratio.
    pub(super) fn claim(&self, vm: &Arc<Vm>) -> Result<Claim<'_>, MonitorError> {
        let mut claim = Claim {
            claims: &self.claims,
            id: None,
        };
        // A second start is refused as such.
        if vm.state() != VmState::NotStarted {
            return Ok(claim);
        }
        let promise = self.promise();
        let vms = self.vms.all();
        let started = vms
            .iter()
            .filter_map(|vm| Some((vm.id().clone(), vm.nominal_bytes()?)));
        let wanted_bytes = vm.config().mem_size_bytes();
        let mut claims = self.claims.lock().unwrap_or_else(PoisonError::into_inner);
        let claimed = claims.claim(vm.id(), wanted_bytes, started, promise);
        drop(claims);
        let id = vm.id().clone();
        match claimed {
            Ok(is_ours) => claim.id = is_ours.then_some(id),
            Err(error) => return Err(MonitorError::NoRoom { id, error }),
        }
        Ok(claim)
    }

    fn promise(&self) -> Option<Promise> {
        let budget_bytes = self.host.engine.memory_budget_bytes();
        Some(Promise {
            overcommit_ratio: self.overcommit_ratio()?,
            budget_bytes: self.watch.gauge.limit_bytes(budget_bytes)?,
        })
    }

    /// Changes the memory that the domain may take; `None` for no budget of its own. VMs are ended
    /// if they hold more; [`Monitor::try_set_memory_budget`] refuses such a budget.
    pub fn set_memory_budget(&self, budget_bytes: Option<u64>) {
        self.host.engine.set_memory_budget(budget_bytes);
        self.watch.ring();
    }

    /// As [`Monitor::set_memory_budget`], unless VMs would be ended for it at once: a budget in MiB
    /// where bytes are meant is one.
    ///
    /// # Errors
    /// [`MonitorError::BudgetBelowUse`].
    pub fn try_set_memory_budget(&self, budget_bytes: Option<u64>) -> Result<(), MonitorError> {
        if let Some(budget_bytes) = budget_bytes {
            let gauge = &self.watch.gauge;
            self.watch.count(gauge);
            let use_bytes = gauge.use_bytes();
            let least_bytes = gauge.policy().least_limit_bytes(use_bytes);
            if budget_bytes < least_bytes {
                return Err(MonitorError::BudgetBelowUse {
                    budget_bytes,
                    use_bytes,
                    least_bytes,
                });
            }
        }
        self.set_memory_budget(budget_bytes);
        Ok(())
    }

    /// Starts or stops merging, or stops and unmerges everything, as [`dedup::Engine::set_run`].
    ///
    /// An unmerge that does not fit is refused before anything is unmerged, unless VMs may be ended
    /// for it: half an unmerge would leave the domain at its limit, and a VM would be ended for the
    /// next pages that guests write. If it turns out in the middle, what was merged before is merged
    /// again.
    ///
    /// # Errors
    /// [`MonitorError::UnmergeNoRoom`], [`MonitorError::UnmergeSuperseded`], or
    /// [`MonitorError::Host`] when private copies cannot be had for another reason.
    pub fn set_run(&self, run: Run) -> Result<(), MonitorError> {
        let (engine, watch) = (&self.host.engine, &self.watch);
        let before = engine.run();
        if run == Run::Unmerge
            && !watch.unmerge_victims()
            && let Some(refusal) = self.unmerge_shortage()
            && refusal.missing_bytes() > 0
        {
            watch.set_unmerge_refusal(Some(refusal));
            return Err(MonitorError::UnmergeNoRoom(refusal));
        }
        let error = match engine.set_run(run) {
            Ok(()) => {
                watch.set_unmerge_refusal(None);
                return Ok(());
            }
            Err(error) => error,
        };
        match error {
            EngineError::UnmergeSuperseded => Err(MonitorError::UnmergeSuperseded),
            EngineError::UnmergeNoMemory(_) => {
                let refusal = self.unmerge_shortage();
                // What is unmerged stands at the limit; merging makes room again.
                if before == Run::Merge && engine.run() == Run::Stop {
                    engine.set_run(before).map_err(merge_engine)?;
                }
                watch.set_unmerge_refusal(refusal);
                Err(match refusal {
                    Some(refusal) => MonitorError::UnmergeNoRoom(refusal),
                    None => merge_engine(error),
                })
            }
            error => Err(merge_engine(error)),
        }
    }

    /// What an unmerge of all that is merged would take, and what is left; `None` where nothing
    /// limits.
    fn unmerge_shortage(&self) -> Option<UnmergeNoRoom> {
        let (engine, gauge) = (&self.host.engine, &self.watch.gauge);
        let budget_bytes = engine.memory_budget_bytes();
        if gauge.wants_count(budget_bytes) {
            self.watch.count(gauge);
        }
        let (limit, filled) = gauge.nearest(budget_bytes)?;
        let stats = engine.stats();
        // The pages of the pool come back as their last sharers leave.
        let copies = stats.pages_sharing + stats.pages_zero;
        Some(UnmergeNoRoom {
            needed_bytes: copies * dedup::PAGE_SIZE_BYTES as u64,
            room_bytes: gauge.room_for_engine(filled),
            limit,
            limit_bytes: filled.limit_bytes,
        })
    }

    /// Changes how many times the domain's limit may be promised to VMs; `None` for as often as one
    /// likes. Counts for starts from now on.
    pub fn set_overcommit_ratio(&self, ratio: Option<f64>) {
        *self.ratio() = ratio;
    }

    /// How many times the domain's limit may be promised to VMs.
    pub fn overcommit_ratio(&self) -> Option<f64> {
        *self.ratio()
    }

    fn ratio(&self) -> MutexGuard<'_, Option<f64>> {
        let ratio = self.overcommit_ratio.lock();
        ratio.unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes whether VMs are ended so that an unmerge fits (at first they are not).
    pub fn set_unmerge_victims(&self, allowed: bool) {
        self.watch.set_unmerge_victims(allowed);
    }

    /// The domain's memory: limits, use, and what it could come to.
    pub fn memory(&self) -> MemoryInfo {
        let (watch, engine) = (&self.watch, &self.host.engine);
        let budget_bytes = engine.memory_budget_bytes();
        if watch.gauge.wants_count(budget_bytes) {
            watch.count(&watch.gauge);
        }
        let nearest = watch.gauge.nearest(budget_bytes);
        let use_bytes = match nearest {
            Some((_, filled)) => filled.use_bytes,
            None => watch.gauge.use_bytes(),
        };
        let vms = self.vms.all();
        let limited_by = nearest.map(|(limit, _)| limit);
        let is_for_ksm = vms.iter().any(|vm| vm.ksm_place().is_some());
        let ksm = is_for_ksm.then(|| Ksm::default().process()).flatten();
        let shared_pages = shared_pages(&engine.stats(), ksm.unwrap_or_default(), limited_by);
        MemoryInfo {
            budget_bytes,
            limit_bytes: nearest.map(|(_, filled)| filled.limit_bytes),
            limited_by,
            use_bytes,
            headroom_bytes: nearest.map(|(_, filled)| filled.headroom_bytes()),
            worst_case_bytes: use_bytes + shared_pages * dedup::PAGE_SIZE_BYTES as u64,
            pressure_percent: watch.gauge.pressure_percent(),
            nominal_bytes: vms.iter().filter_map(|vm| vm.nominal_bytes()).sum(),
            overcommit_ratio: self.overcommit_ratio(),
            unmerge_victims: watch.unmerge_victims(),
            unmerge_missing_bytes: watch
                .unmerge_refusal()
                .map(|refusal| refusal.missing_bytes()),
            oom_victims: watch.victims(),
        }
    }
}

fn merge_engine(error: EngineError) -> MonitorError {
    MonitorError::Host {
        what: "merge engine",
        error: Box::new(error),
    }
}

/// Pages that would take memory if they were written to, and take none in the figure that
/// `limited_by` counts. Only a cgroup counts a page of kernel KSM once; in all other figures it
/// counts for each guest that it is mapped by.
fn shared_pages(stats: &Stats, ksm: KsmProcess, limited_by: Option<Limit>) -> u64 {
    let by_engine = stats.pages_shared + stats.pages_sharing + stats.pages_zero;
    let merging = match limited_by {
        Some(Limit::Cgroup) => ksm.merging_pages.unwrap_or(0),
        Some(Limit::Budget) | None => 0,
    };
    by_engine + merging + ksm.zero_pages.unwrap_or(0)
}

/// A start under way; settled when dropped, however it went.
pub(super) struct Claim<'a> {
    claims: &'a Mutex<Claims>,
    id: Option<VmId>,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        if let Some(id) = &self.id {
            let mut claims = self.claims.lock().unwrap_or_else(PoisonError::into_inner);
            claims.settle(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_case_has_each_page_that_the_limits_figure_leaves_out() {
        let stats = Stats {
            pages_shared: 1,
            pages_sharing: 2,
            pages_zero: 3,
            ..Stats::default()
        };
        let ksm = KsmProcess {
            merging_pages: Some(100),
            zero_pages: Some(10),
            ..KsmProcess::default()
        };
        for (limited_by, pages) in [
            (Some(Limit::Cgroup), 116),
            (Some(Limit::Budget), 16),
            (None, 16),
        ] {
            assert_eq!(shared_pages(&stats, ksm, limited_by), pages);
        }
        let none = KsmProcess::default();
        assert_eq!(shared_pages(&stats, none, Some(Limit::Cgroup)), 6);
    }
}
