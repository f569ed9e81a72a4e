//! What a VM leaves behind: nothing. Alone in its process, as it counts the process's threads,
//! descriptors and mappings.

mod guest;

use std::time::Instant;

use guest::{Code, Lab, skip};
use vmm::config::MergeMode;

fn entries(directory: &str) -> usize {
    std::fs::read_dir(directory).expect(directory).count()
}

/// Threads, descriptors, and bytes of address space in mappings of about a guest's size, 24 MiB,
/// which nothing else in the process has (an arena of malloc has 64 MiB, a stack 2 MiB).
fn held() -> (usize, usize, u64) {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
    let sizes = maps.lines().filter_map(|line| {
        let (start, end) = line.split_whitespace().next()?.split_once('-')?;
        Some(u64::from_str_radix(end, 16).ok()? - u64::from_str_radix(start, 16).ok()?)
    });
    let guests = sizes
        .filter(|size| (20 << 20..32 << 20).contains(size))
        .sum();
    (entries("/proc/self/task"), entries("/proc/self/fd"), guests)
}

/// Waits until what is held is `expected`: memory that was handed over to the merge worker is
/// unmapped by it a little later.
fn settles_at(expected: (usize, usize, u64), when: &str) {
    let deadline = Instant::now() + guest::LONG;
    while held() != expected {
        assert!(
            Instant::now() < deadline,
            "{when}: {:?} held, {expected:?} before",
            held()
        );
        std::thread::yield_now();
    }
}

#[test]
fn twenty_lives_leave_no_thread_descriptor_or_memory_behind() {
    if skip() {
        return;
    }
    let before_monitor = held();
    let lab = Lab::new();
    let disk = lab.file("disk", &[0; 4096]);
    let has_ksm = std::path::Path::new("/sys/kernel/mm/ksm").is_dir();
    let ksm = has_ksm.then_some(MergeMode::Ksm);
    for merge in [MergeMode::On, MergeMode::Off].into_iter().chain(ksm) {
        let before = held();
        for round in 0..20 {
            let code = Code::new().print("up").halt();
            let mut config = lab.config(&code);
            config.machine_config.mem_size_mib = 24;
            config.samepage.merge = merge;
            config.machine_config.vcpu_count = 2;
            let drive =
                format!(r#"{{"drive_id": "d", "path_on_host": {disk:?}, "is_root_device": true}}"#);
            config.drives = vec![serde_json::from_str(&drive).unwrap()];
            let vm = lab.start("vm", config);
            guest::wait_for(&mut lab.console(&vm).subscribe(), "up");
            lab.monitor.stop(&vm).unwrap();
            lab.monitor.delete(&vm).unwrap();
            settles_at(before, &format!("after round {round}, merge {merge:?}"));
        }
    }
    // A start that fails leaves nothing either.
    let before = held();
    let mut config = lab.config(&Code::new().halt());
    config.boot_source.initrd_path = Some(lab.file("initrd", &vec![0; 23 << 20]));
    config.machine_config.mem_size_mib = 24;
    let vm: vmm::VmId = "vm".parse().unwrap();
    lab.monitor.create(vm.clone(), config).unwrap();
    for _ in 0..20 {
        lab.monitor.start(&vm).unwrap_err();
    }
    settles_at(before, "after starts that failed");
    drop(lab);
    settles_at(before_monitor, "after the monitor");
}
