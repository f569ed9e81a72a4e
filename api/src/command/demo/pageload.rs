//! The embedded bare-metal guest: fills its memory from a seed, and verifies it for ever.

use pageload_workload::{Workload, expect, layout};

use super::guest::Account;
use crate::command::CommandError;
use crate::model::VmDescription;

/// `phase` of the guest's report from which on all its pages are written.
const PHASE_VERIFYING: u64 = 2;
const PHASE_FAILED: u64 = 4;

/// What VM `number` does: a fleet's usual mix of shared, private, zero and hot pages.
pub(super) fn workload(number: u16) -> Workload {
    Workload {
        seed: u64::from(number) + 1,
        ..Workload::default()
    }
}

/// By the guest's report port.
pub(super) fn account(vm: &VmDescription) -> Result<Account, CommandError> {
    let report = vm.report.clone().unwrap_or_default();
    if report.phase == PHASE_FAILED && report.verify_errors == 0 {
        return Err(CommandError::Other(format!(
            "vm {}: the guest failed",
            vm.id
        )));
    }
    Ok(Account {
        passes: (report.phase >= PHASE_VERIFYING).then_some(report.verify_passes),
        errors: report.verify_errors,
    })
}

/// Copies of a content beyond its first, and pages of zeros, by the workload's own oracle.
pub(super) fn duplicate_pages(vms: u16, mem_mib: u32) -> Result<u64, CommandError> {
    let pages = layout::page_count(u64::from(mem_mib) << 20);
    let workloads: Vec<_> = (0..vms).map(|number| (workload(number), pages)).collect();
    let expected = expect(&workloads)
        .map_err(|error| CommandError::Other(format!("pageload workload: {error}")))?;
    Ok(expected.pages_sharing + expected.pages_zero)
}
