//! The memory of a monitor's domain: what it may take, and what it may promise its VMs.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dedup::Stats;

use super::Monitor;
use crate::admission::{Claims, Promise};
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
    /// if they hold more.
    pub fn set_memory_budget(&self, budget_bytes: Option<u64>) {
        self.host.engine.set_memory_budget(budget_bytes);
        self.watch.ring();
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
            oom_victims: watch.victims(),
        }
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
