//! Real VMs under the merge engine: what it gives back, and that no guest notices.

mod guest;

use std::time::{Duration, Instant};

use guest::{LONG, Lab, skip};
use vmm::config::{HugePages, MergeMode};
use vmm::{EndReason, GuestReport, Limit, MonitorError, VmConfig, VmId};

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

#[test]
fn an_unmerge_that_does_not_fit_is_refused_before_a_page_is_unmerged() {
    if skip() {
        return;
    }
    let lab = Lab::new();
    let engine = lab.monitor.engine();
    engine.set_run(dedup::Run::Merge).unwrap();
    for seed in 0..2 {
        let args = format!("seed={seed} shared=90 zero=0 private=10 passes=0 pace_ms=50");
        let mut config = pageload(&args, MergeMode::On);
        config.machine_config.mem_size_mib = 64;
        lab.start(&format!("vm{seed}"), config);
    }
    wait_until("they are merged", || engine.stats().pages_sharing > 12_000);
    // What is merged stays as it is, but for what guests write.
    engine.set_run(dedup::Run::Stop).unwrap();
    let before = engine.stats().pages_sharing;
    let use_bytes = lab.monitor.memory().use_bytes;
    // The first budget that ends nobody and leaves room for a part of the copies.
    let mut refusals = (1..).filter_map(|step| {
        let budget_bytes = use_bytes + (step << 22);
        lab.monitor.try_set_memory_budget(Some(budget_bytes)).ok()?;
        match lab.monitor.set_run(dedup::Run::Unmerge).unwrap_err() {
            MonitorError::UnmergeNoRoom(refusal) => Some((budget_bytes, refusal)),
            error => panic!("{error}"),
        }
    });
    let found = refusals.find(|(_, refusal)| refusal.room_bytes > 8 << 20);
    let (budget_bytes, refusal) = found.unwrap();
    assert_eq!(refusal.limit, Limit::Budget);
    assert_eq!(refusal.limit_bytes, budget_bytes);
    let (copied, missing) = (refusal.needed_bytes, refusal.missing_bytes());
    assert!(copied >= 12_000 * 4096 && missing > 0, "{refusal:?}");
    assert_eq!(engine.stats().pages_sharing, before);
    assert_eq!(lab.monitor.memory().oom_victims, 0);
}
