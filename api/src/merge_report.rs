//! What is told of merging: of a domain, of all domains, of one VM.
//!
//! Kernel KSM's figures are asked for once a reply, for all VMs in it, and not at all where no VM is
//! merged by it: the answer takes a walk through their memory.

use std::collections::BTreeMap;

use vmm::{KsmStats, Monitor, MonitorError, VmId};

use crate::domain_name::DomainName;
use crate::model::{Domain, DomainKsm, VmKsm, VmMerge};

/// All domains, by name.
pub fn domains<'a>(
    monitors: impl Iterator<Item = (&'a DomainName, &'a Monitor)> + Clone,
) -> BTreeMap<String, Domain> {
    let places: Vec<_> = monitors
        .clone()
        .flat_map(|(_, monitor)| monitor.ksm_places())
        .collect();
    let ksm = KsmStats::read(&places);
    monitors
        .map(|(name, monitor)| (name.to_string(), with_ksm(monitor, &ksm)))
        .collect()
}

/// One domain.
pub fn domain(monitor: &Monitor) -> Domain {
    with_ksm(monitor, &KsmStats::read(&monitor.ksm_places()))
}

/// One VM.
///
/// # Errors
/// [`MonitorError::NotFound`].
pub fn vm(monitor: &Monitor, id: &VmId) -> Result<VmMerge, MonitorError> {
    let place = monitor.ksm_place(id)?;
    let ksm = KsmStats::read(place.as_slice());
    Ok(VmMerge {
        stats: monitor.merge_stats(id)?,
        ksm: vm_ksm(&ksm, id),
    })
}

fn with_ksm(monitor: &Monitor, ksm: &KsmStats) -> Domain {
    let engine = monitor.engine();
    let vms: BTreeMap<String, VmMerge> = monitor
        .list()
        .into_iter()
        // A VM that was deleted since the list was made is left out.
        .filter_map(|info| {
            let merge = VmMerge {
                stats: monitor.merge_stats(&info.id).ok()?,
                ksm: vm_ksm(ksm, &info.id),
            };
            Some((info.id.to_string(), merge))
        })
        .collect();
    Domain {
        run: engine.run(),
        pace: engine.pace(),
        stats: engine.stats(),
        memory: monitor.memory(),
        ksm: domain_ksm(ksm, vms.values().filter_map(|vm| vm.ksm)),
        vms,
    }
}

fn vm_ksm(ksm: &KsmStats, id: &VmId) -> Option<VmKsm> {
    let pages_merging = *ksm.pages_merging.get(id)?;
    Some(VmKsm {
        run: ksm.run,
        pages_merging,
    })
}

/// Adds up the VMs; there is nothing to tell without any.
fn domain_ksm(ksm: &KsmStats, vms: impl Iterator<Item = VmKsm>) -> Option<DomainKsm> {
    let counts: Vec<Option<u64>> = vms.map(|vm| vm.pages_merging).collect();
    if counts.is_empty() {
        return None;
    }
    Some(DomainKsm {
        run: ksm.run,
        pages_merging: counts.into_iter().sum(),
        process: ksm.process,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(pages_merging: &[(&str, Option<u64>)]) -> KsmStats {
        let by_id = pages_merging
            .iter()
            .map(|(id, pages)| (id.parse().unwrap(), *pages));
        KsmStats {
            run: Some(dedup::Run::Merge),
            pages_merging: by_id.collect(),
            ..KsmStats::default()
        }
    }

    fn added_up(ksm: &KsmStats, ids: &[&str]) -> Option<DomainKsm> {
        let vms = ids.iter().map(|id| vm_ksm(ksm, &id.parse().unwrap()));
        domain_ksm(ksm, vms.flatten())
    }

    #[test]
    fn a_domain_has_its_own_vms_added_up_and_no_others() {
        let ksm = told(&[("a", Some(3)), ("b", Some(4)), ("other", Some(100))]);
        let sum = added_up(&ksm, &["a", "b", "not-for-ksm"]).unwrap();
        assert_eq!(sum.pages_merging, Some(7));
        assert_eq!(sum.run, Some(dedup::Run::Merge));
        assert_eq!(added_up(&ksm, &["not-for-ksm"]), None);
    }

    #[test]
    fn a_figure_that_the_kernel_does_not_tell_makes_no_sum() {
        let ksm = told(&[("a", Some(3)), ("b", None)]);
        assert_eq!(added_up(&ksm, &["a", "b"]).unwrap().pages_merging, None);
    }
}
