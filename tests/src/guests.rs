//! VMs in a monitor of the test's own process.

use pageload_workload::Workload;
use vmm::{GuestReport, Monitor, VmConfig, VmId, VmState};

use crate::wait::{PATIENCE, wait_until};

/// A monitor whose worker does not pause.
///
/// # Panics
/// If the machine can't run one.
pub fn eager_monitor(domain: &str) -> Monitor {
    let pace = dedup::Pace {
        pages_to_scan: 4096,
        sleep_millisecs: 1,
        ..dedup::Pace::default()
    };
    let settings = dedup::Settings {
        pace,
        ..dedup::Settings::default()
    };
    let domain = domain.parse().expect("a name");
    Monitor::new(domain, settings).expect("a monitor")
}

/// The configuration of a pageload guest.
///
/// # Panics
/// If there is no such workload.
pub fn pageload(workload: &Workload, mem_size_mib: u64) -> VmConfig {
    workload.validate().expect("a workload");
    let mut config = VmConfig::new("builtin:pageload");
    config.boot_source.boot_args = Some(workload.to_string());
    config.machine_config.mem_size_mib = mem_size_mib;
    config
}

/// Creates and starts a VM.
///
/// # Panics
/// If it does not start.
pub fn launch(monitor: &Monitor, id: &str, config: VmConfig) -> VmId {
    let id: VmId = id.parse().expect("an id");
    monitor.create(id.clone(), config).expect("created");
    monitor.start(&id).expect("started");
    id
}

/// What the guest reported last. Fails the test if the VM is not running any more or found a page
/// that does not hold what it wrote.
///
/// # Panics
/// In those two cases.
pub fn healthy_report(monitor: &Monitor, id: &VmId) -> Option<GuestReport> {
    let info = monitor.info(id).expect("the VM is there");
    assert_eq!(info.state, VmState::Running, "{id}: {:?}", info.report);
    if let Some(report) = &info.report {
        assert_eq!(report.verify_errors, 0, "{id}: {report:?}");
    }
    info.report
}

/// Waits until every guest has verified all of its memory `more` times from now on.
///
/// # Panics
/// If one finds an error, ends, or takes too long.
pub fn wait_verified(monitor: &Monitor, ids: &[VmId], more: u64) {
    let passes = |id: &VmId| healthy_report(monitor, id).map_or(0, |report| report.verify_passes);
    let targets: Vec<u64> = ids.iter().map(|id| passes(id) + more).collect();
    wait_until("all guests verified their memory", PATIENCE, || {
        ids.iter()
            .zip(&targets)
            .all(|(id, target)| passes(id) >= *target)
    });
}
