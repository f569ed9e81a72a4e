//! Real VMs under the merge engine: what it gives back, and that no guest notices.

mod guest;

use std::time::{Duration, Instant};

use guest::{LONG, Lab, skip};
use vmm::config::{HugePages, MergeMode};
use vmm::{EndReason, GuestReport, VmConfig, VmId};

fn pageload(args: &str, merge: MergeMode) -> VmConfig {
    let mut config = VmConfig::new(vmm::config::BUILTIN_PAGELOAD);
    config.boot_source.boot_args = Some(format!("pageload {args}"));
    config.machine_config.mem_size_mib = 16;
    config.samepage.merge = merge;
    config
}

fn report(lab: &Lab, vm: &VmId) -> GuestReport {
    lab.monitor
        .info(vm)
        .expect("info")
        .report
        .unwrap_or_default()
}

/// Polls until `done`, at a pace that leaves the machine to the guests.
fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + LONG;
    while !done() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn pages_are_merged_under_running_guests_and_stay_what_they_are() {
    if skip() {
        return;
    }
    let lab = Lab::new();
    let engine = lab.monitor.engine();
    engine.set_pace(dedup::Pace {
        pages_to_scan: 4000,
        sleep_millisecs: 1,
        ..dedup::Pace::default()
    });
    engine.set_run(dedup::Run::Merge).unwrap();
    let args = |seed| format!("seed={seed} shared=80 zero=10 private=10 passes=0 pace_ms=5");
    let merged: Vec<VmId> = (0..3)
        .map(|i| lab.start(&format!("vm{i}"), pageload(&args(i), MergeMode::On)))
        .collect();
    let alone = lab.start("alone", pageload(&args(9), MergeMode::Off));
    let merging = |vm: &VmId| lab.monitor.merge_stats(vm).unwrap().pages_merging;
    wait_until("all are merged", || {
        merged.iter().all(|vm| merging(vm) > 1000)
    });
    assert_eq!(merging(&alone), 0, "merge: false keeps a VM out");
    lab.monitor.stop(&merged[0]).unwrap();
    assert_eq!(merging(&merged[0]), 0);
    engine.set_run(dedup::Run::Unmerge).unwrap();
    let passes = |vm: &VmId| report(&lab, vm).verify_passes;
    let before: Vec<u64> = merged[1..].iter().map(&passes).collect();
    wait_until("two more passes", || {
        merged[1..]
            .iter()
            .zip(&before)
            .all(|(vm, before)| passes(vm) >= before + 2)
    });
    for vm in &merged[1..] {
        assert_eq!(report(&lab, vm).verify_errors, 0, "{vm}");
        assert_eq!(merging(vm), 0, "{vm} after unmerge");
        lab.monitor.stop(vm).unwrap();
        assert_eq!(lab.end(vm), EndReason::Stopped);
    }
}

#[test]
fn huge_pages_are_merged_under_running_guests_too() {
    if skip() {
        return;
    }
    let lab = Lab::new();
    let engine = lab.monitor.engine();
    engine.set_run(dedup::Run::Merge).unwrap();
    let vms: Vec<VmId> = (0..2)
        .map(|seed| {
            let args = format!("seed={seed} shared=80 zero=10 private=10 passes=0 pace_ms=5");
            let mut config = pageload(&args, MergeMode::On);
            config.machine_config.huge_pages = HugePages::Transparent;
            lab.start(&format!("huge{seed}"), config)
        })
        .collect();
    let merging = |vm: &VmId| lab.monitor.merge_stats(vm).unwrap().pages_merging;
    wait_until("both are merged", || {
        vms.iter().all(|vm| merging(vm) > 1000)
    });
    let passes = |vm: &VmId| report(&lab, vm).verify_passes;
    let before: Vec<u64> = vms.iter().map(&passes).collect();
    wait_until("two more passes", || {
        vms.iter()
            .zip(&before)
            .all(|(vm, before)| passes(vm) >= before + 2)
    });
    for vm in &vms {
        assert_eq!(report(&lab, vm).verify_errors, 0, "{vm}");
        lab.monitor.stop(vm).unwrap();
    }
}
