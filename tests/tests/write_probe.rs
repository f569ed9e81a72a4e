//! Guests that time their writes while the engine merges, beside guests that keep the CPUs busy.

use pageload_workload::Workload;
use samepage_tests::guests::{eager_monitor, healthy_report, launch, pageload, wait_verified};
use samepage_tests::kvm;
use samepage_tests::wait::{PATIENCE, wait_until};
use vmm::config::MergeMode;
use vmm::{Monitor, VmId, WriteLatency, WriteProbe};

/// Time between two timed writes of a guest.
const PROBE_US: u64 = 500;
/// Memory of a busy guest in MiB: 2 are the image's, so fewer than 3 leave it none.
const BUSY_MIB: u64 = 3;

fn probe(monitor: &Monitor, id: &VmId) -> Option<WriteProbe> {
    healthy_report(monitor, id).and_then(|report| report.probe)
}

/// Waits until the guest is in this window and has timed this many writes there.
fn wait_probed(monitor: &Monitor, id: &VmId, window: u64, writes: u64) -> WriteProbe {
    let mut seen = WriteProbe::default();
    wait_until("writes are timed", PATIENCE, || {
        seen = probe(monitor, id).unwrap_or_default();
        assert!(seen.window <= window, "{seen:?} is ahead of {window}");
        seen.window == window && seen.shared.count >= writes
    });
    seen
}

fn assert_plausible(latency: &WriteLatency) {
    let WriteLatency {
        p50_ns,
        p99_ns,
        p99_9_ns,
        max_ns,
        ..
    } = *latency;
    assert!(p50_ns > 0, "{latency:?}");
    assert!(
        p50_ns <= p99_ns && p99_ns <= p99_9_ns && p99_9_ns <= max_ns,
        "{latency:?}"
    );
    assert!(u128::from(max_ns) < PATIENCE.as_nanos(), "{latency:?}");
}

fn send_byte(monitor: &Monitor, id: &VmId) {
    let console = monitor.console(id).expect("it is there");
    console.write_input(b"!").expect("it runs");
}

#[test]
fn guests_that_time_writes_to_merged_pages_report_each_window_and_no_wrong_page() {
    if !kvm::is_present() {
        return;
    }
    let monitor = eager_monitor("probe");
    let busy: Vec<VmId> = (0..2_u64)
        .map(|seed| {
            let mut config = pageload(&Workload::busy(seed), BUSY_MIB);
            config.samepage.merge = MergeMode::Off;
            launch(&monitor, &format!("busy{seed}"), config)
        })
        .collect();
    let ids = ["a", "b"].map(|id| {
        let workload = Workload::prober(u64::from(id.as_bytes()[0]), PROBE_US);
        launch(&monitor, id, pageload(&workload, 16))
    });
    wait_until("pages are merged", PATIENCE, || {
        let is_well = |id| healthy_report(&monitor, id).is_some();
        ids.iter().all(is_well) && monitor.engine().stats().pages_sharing > 1000
    });
    wait_verified(&monitor, &ids, 1);
    for id in &ids {
        assert_eq!(probe(&monitor, id), Some(WriteProbe::default()), "{id}");
        send_byte(&monitor, id);
    }
    for id in &ids {
        let first = wait_probed(&monitor, id, 1, 500);
        let later = wait_probed(&monitor, id, 1, first.shared.count + 1);
        assert!(later.shared.max_ns >= first.shared.max_ns);
        for probe in [first, later] {
            assert_plausible(&probe.shared);
            assert_plausible(&probe.control);
            assert_plausible(&probe.exit);
            assert_eq!(probe.shared.count, probe.control.count);
            assert_eq!(probe.shared.count, probe.exit.count);
        }
    }
    send_byte(&monitor, &ids[0]);
    wait_probed(&monitor, &ids[0], 2, 1);
    assert_eq!(
        probe(&monitor, &ids[1]).map(|probe| probe.window),
        Some(1),
        "a window is the guest's own"
    );
    wait_verified(&monitor, &ids, 1);
    wait_verified(&monitor, &busy, 100);
    assert_eq!(
        healthy_report(&monitor, &busy[0]).and_then(|report| report.probe),
        None
    );
}
