//! Merge domains as processes: what is apart, and what goes through to a monitor.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::process::Pid;
use samepage_tests::domains::{
    State, act, create, describe, is_alive, launch, open_stream, remove, wait_states,
};
use samepage_tests::kvm;
use samepage_tests::proc::Holdings;
use samepage_tests::server::Server;
use samepage_tests::tiny_kernel::{ECHO_UNTIL_Q, IDLE, KernelFile, SAY_HI_AND_RESET};
use samepage_tests::wait::{PATIENCE, wait_until};
use serde_json::json;

#[test]
fn each_domain_has_a_process_and_the_front_door_has_no_vm() {
    if !kvm::is_present() {
        return;
    }
    let (state, kernel) = (State::empty(), KernelFile::new(IDLE));
    let server = state.serve();
    launch(&server, "a1", &kernel, Some("a"));
    launch(&server, "a2", &kernel, Some("a"));
    launch(&server, "lone", &kernel, None);
    let running = [("a1", "Running"), ("a2", "Running"), ("lone", "Running")];
    wait_states(&server, &running);
    let names: BTreeSet<String> = ["a", "vm:lone"].map(str::to_owned).into();
    assert_eq!(state.domains(), names);
    let (a, lone) = (state.monitor("a"), state.monitor("vm:lone"));
    assert_ne!(a, lone);

    let front_door = Holdings::of(server.pid()).expect("its holdings");
    assert_eq!(front_door.mapped.memfd_mappings, 0);
    let mut descriptors = front_door.descriptors.keys();
    let of_kvm = descriptors.find(|name| name.contains("/dev/kvm") || name.contains("kvm-v"));
    assert_eq!(of_kvm, None);

    // Two tenants have no file in memory in common, mapped or open; each has one of its own at least.
    let (files_a, files_lone) = (memory_files(a), memory_files(lone));
    assert!(!files_a.is_empty() && !files_lone.is_empty());
    assert_eq!(files_a.intersection(&files_lone).count(), 0);

    // A domain goes with its last VM.
    remove(&server, "lone");
    wait_until("the monitor ends", PATIENCE, || !is_alive(lone));
    assert!(is_alive(a));
    assert!(!state.directory_of("vm:lone").exists());
}

/// The memfds that a process has open or mapped, by inode.
fn memory_files(pid: Pid) -> BTreeSet<(u64, u64)> {
    let process = Path::new("/proc").join(pid.as_raw_nonzero().to_string());
    let mut files = BTreeSet::new();
    for kind in ["fd", "map_files"] {
        for entry in std::fs::read_dir(process.join(kind)).expect("its files") {
            let path = entry.expect("an entry").path();
            let Ok(target) = std::fs::read_link(&path) else {
                continue;
            };
            if target.to_string_lossy().starts_with("/memfd:")
                && let Ok(file) = std::fs::metadata(&path)
            {
                files.insert((file.dev(), file.ino()));
            }
        }
    }
    files
}

#[test]
fn a_console_stream_goes_through_to_the_monitor_both_ways() {
    if !kvm::is_present() {
        return;
    }
    let (state, kernel) = (State::empty(), KernelFile::new(ECHO_UNTIL_Q));
    let server = state.serve();
    launch(&server, "a", &kernel, None);
    let mut stream = open_stream(&server, "a");
    stream.send(b"through and backq").expect("type");
    assert_eq!(stream.read_to_end(), b"through and back");
}

#[test]
fn what_a_guest_said_last_comes_through_before_its_stream_ends() {
    if !kvm::is_present() {
        return;
    }
    let (state, kernel) = (State::empty(), KernelFile::new(SAY_HI_AND_RESET));
    let server = state.serve();
    create(&server, "a", &kernel, None);
    let mut stream = open_stream(&server, "a");
    act(&server, "a", "InstanceStart");
    assert_eq!(stream.read_to_end(), b"hi\n");
    assert_eq!(server.call("GET", "/vms/a/console", "").body, b"hi\n");
}

#[test]
fn a_refused_vm_leaves_no_monitor_and_no_id_behind() {
    if !kvm::is_present() {
        return;
    }
    let state = State::empty();
    let server = state.serve();
    let config = json!({ "boot-source": { "kernel_image_path": "/dev/null" } }).to_string();
    for _ in 0..2 {
        let refused = server.call("PUT", "/vms/a", &config);
        assert_eq!(refused.status, 400, "{}", refused.fault());
    }
    wait_states(&server, &[]);
    assert!(state.domains().is_empty());
}

#[test]
fn a_domain_has_a_cgroup_whose_limit_follows_its_budget() {
    if !kvm::is_present() {
        return;
    }
    // Of version 1, which this test can have in any group; the unit tests have version 2.
    let parent = Path::new("/sys/fs/cgroup/memory");
    if !parent.join("memory.limit_in_bytes").exists() {
        eprintln!("skipped: no memory cgroup of version 1");
        return;
    }
    let parent = parent.join(format!("samepage-test-domains-{}", std::process::id()));
    let (state, kernel) = (State::empty(), KernelFile::new(IDLE));
    let server = Server::start(&[
        "--state-dir",
        state.path(),
        "--cgroup",
        parent.to_str().expect("text"),
        "--memory-budget-mib",
        "256",
    ]);
    launch(&server, "a", &kernel, Some("ci"));
    let group = parent.join("domain-ci");
    let read = |file: &str| std::fs::read_to_string(group.join(file)).expect("read");
    let number = |file: &str| read(file).trim().parse::<u64>().expect("a number");
    let pid = state.monitor("ci").as_raw_nonzero().to_string();
    assert_eq!(read("cgroup.procs").trim(), pid);
    assert_eq!(number("memory.limit_in_bytes"), 256 << 20);
    for budget_mib in [512_u64, 384] {
        let patch = json!({ "memory_budget": budget_mib << 20 }).to_string();
        server.done("PATCH", "/merge/ci", &patch);
        assert_eq!(number("memory.limit_in_bytes"), budget_mib << 20);
    }
    remove(&server, "a");
    assert!(!group.exists());
    std::fs::remove_dir(&parent).expect("nothing is left in it");
}

#[test]
fn a_domain_may_have_any_name_that_is_allowed() {
    if !kvm::is_present() {
        return;
    }
    let (state, kernel) = (State::empty(), KernelFile::new(IDLE));
    let server = state.serve();
    launch(&server, "-a", &kernel, Some("--help"));
    launch(&server, "-b", &kernel, None);
    wait_states(&server, &[("-a", "Running"), ("-b", "Running")]);
    assert_eq!(describe(&server, "-a")["merge_domain"], "--help");
}

#[test]
fn all_threads_of_a_monitor_are_locked_down() {
    if !kvm::is_present() {
        return;
    }
    let (state, kernel) = (State::empty(), KernelFile::new(IDLE));
    let server = state.serve();
    launch(&server, "a", &kernel, Some("ci"));
    let process = Path::new("/proc").join(state.monitor("ci").as_raw_nonzero().to_string());
    let threads = std::fs::read_dir(process.join("task")).expect("its threads");
    for thread in threads {
        let status = thread.expect("a thread").path().join("status");
        let status = std::fs::read_to_string(status).expect("its status");
        assert!(status.contains("NoNewPrivs:\t1"), "{status}");
    }
    let limits = std::fs::read_to_string(process.join("limits")).expect("its limits");
    let core = limits
        .lines()
        .find(|line| line.starts_with("Max core file size"));
    let words: Vec<&str> = core.expect("a limit").split_whitespace().collect();
    assert_eq!(words[4..6], ["0", "0"]);
    // What could not be had is told, and the front door itself is as it was.
    let version = server.call("GET", "/version", "").json();
    assert!(version["lock_down_missing"].is_array(), "{version}");
    let own = std::fs::read_to_string(format!("/proc/{}/status", server.pid())).expect("status");
    assert!(own.contains("NoNewPrivs:\t0"), "{own}");
}
