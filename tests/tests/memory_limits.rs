//! Limits that no guest gets past, by whatever it takes memory, and refusals that say why.

use std::path::PathBuf;

use pageload_workload::Workload;
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use samepage_tests::cgroup::MemoryGroup;
use samepage_tests::disk_storm::{Access, DiskStorm};
use samepage_tests::kvm;
use samepage_tests::server::Server;
use samepage_tests::tiny_kernel::{IDLE, KernelFile};
use samepage_tests::wait::{PATIENCE, wait_until};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// A pageload VM that fills its memory with pages that nobody shares.
fn filler(domain: &str, seed: u64, mem_size_mib: u64, oom_priority: i64) -> Value {
    let workload = Workload {
        shared: 0,
        zero: 0,
        private: 100,
        hot_pages: 0,
        pace_ms: 200,
        ..Workload::quiet(seed)
    };
    json!({
        "boot-source": {
            "kernel_image_path": "builtin:pageload",
            "boot_args": workload.to_string(),
        },
        "machine-config": {"vcpu_count": 1, "mem_size_mib": mem_size_mib},
        "samepage": {"merge_domain": domain, "oom_priority": oom_priority},
    })
}

const START: &str = r#"{"action_type": "InstanceStart"}"#;

fn start(server: &Server, id: &str, config: &Value) {
    create(server, id, config);
    server.done("PUT", &format!("/vms/{id}/actions"), START);
}

fn create(server: &Server, id: &str, config: &Value) {
    server.done("PUT", &format!("/vms/{id}"), &config.to_string());
}

fn get(server: &Server, path: &str) -> Value {
    let reply = server.call("GET", path, "");
    assert_eq!(reply.status, 200, "{path}");
    reply.json()
}

fn wait_filled(server: &Server, id: &str) {
    wait_until("the VM has filled its memory", PATIENCE, || {
        get(server, &format!("/vms/{id}"))["report"]["phase"] == 2
    });
}

/// Waits until a VM runs on and finds all of its memory as it wrote it.
fn assert_healthy(server: &Server, id: &str) {
    let path = format!("/vms/{id}");
    let passes = |vm: &Value| vm["report"]["verify_passes"].as_u64().expect("a counter");
    let before = passes(&get(server, &path));
    wait_until("the VM verifies its memory", PATIENCE, || {
        let vm = get(server, &path);
        assert_eq!(vm["state"], "Running", "{vm}");
        assert_eq!(vm["report"]["verify_errors"], 0, "{vm}");
        passes(&vm) > before + 1
    });
}

/// A guest with many disks reads them all into memory that it never touched, with the largest
/// requests there are: faster than vCPUs take memory, and on none of them.
fn disk_storm(storm: DiskStorm, limit_mib: u64) {
    let Some(group) = MemoryGroup::new(limit_mib * MIB) else {
        return;
    };
    let server = Server::start(&[]);
    // Before the domain's monitor is there to look for its limit.
    group.adopt(server.pid());
    start(&server, "bystander", &filler("storm", 1, 16, 1000));
    wait_filled(&server, "bystander");

    let kernel = KernelFile::new(&storm.code());
    let image = kernel.path().with_file_name("image");
    let file = std::fs::File::create(&image).expect("an image");
    file.set_len(u64::from(storm.request_bytes))
        .expect("a hole");
    let drive = |number: u32| {
        json!({
            "drive_id": format!("disk{number}"),
            "path_on_host": image,
            "is_root_device": false,
            "is_read_only": true,
        })
    };
    let config = json!({
        "boot-source": {"kernel_image_path": kernel.path()},
        "machine-config": {"vcpu_count": 1, "mem_size_mib": storm.mem_size_mib()},
        "drives": (0..storm.disks).map(drive).collect::<Vec<_>>(),
        // What its disks hold is all alike, and would be merged away.
        "samepage": {"merge_domain": "storm", "oom_priority": -1000, "merge": false},
    });
    start(&server, "greedy", &config);
    wait_until("the guest is ended for want of memory", PATIENCE, || {
        get(&server, "/vms/greedy")["end_reason"] == "oom_victim"
    });
    assert_healthy(&server, "bystander");
    assert_eq!(group.counters().oom_kills().expect("counters"), 0);
    let memory = &get(&server, "/merge/storm")["memory"];
    assert_eq!(
        (&memory["oom_victims"], &memory["limited_by"]),
        (&json!(1), &json!("cgroup"))
    );
    println!(
        "{storm:?}: peak {} of {limit_mib} MiB",
        group.counters().peak_bytes().expect("counters") / MIB
    );
}

#[test]
fn disks_that_fill_untouched_memory_never_pass_the_limit() {
    if !kvm::is_present() {
        return;
    }
    for (disks, requests, limit_mib) in [(16, 4, 256), (6, 16, 1024), (9, 16, 2048)] {
        let storm = DiskStorm {
            access: Access::Read,
            disks,
            requests,
            request_bytes: 16 << 20,
        };
        assert!(storm.data_bytes() > limit_mib * MIB);
        disk_storm(storm, limit_mib);
    }
}

#[test]
fn huge_pages_are_never_taken_past_the_limit() {
    if !kvm::is_present() {
        return;
    }
    let limit_mib = 512;
    let Some(group) = MemoryGroup::new(limit_mib * MIB) else {
        return;
    };
    let server = Server::start(&[]);
    group.adopt(server.pid());
    for (number, priority) in [(1, 1), (2, 2)] {
        let mut config = filler("huge", number, 400, priority);
        config["machine-config"]["huge_pages"] = json!("Transparent");
        start(&server, &format!("vm{number}"), &config);
    }
    wait_until("one of them is ended", PATIENCE, || {
        get(&server, "/vms/vm1")["end_reason"] == "oom_victim"
    });
    wait_filled(&server, "vm2");
    assert_healthy(&server, "vm2");
    assert_eq!(group.counters().oom_kills().expect("counters"), 0);
}

#[test]
fn a_server_without_a_descriptor_left_still_ends_vms_for_memory() {
    if !kvm::is_present() {
        return;
    }
    let server = Server::start(&["--domain", "full", "--memory-budget-mib", "1024"]);
    // Of two that are as important the one goes that holds more, which the size of neither tells.
    let kernel = KernelFile::new(IDLE);
    let large = json!({
        "boot-source": {"kernel_image_path": kernel.path()},
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 512},
        "samepage": {"merge_domain": "full"},
    });
    start(&server, "empty", &large);
    start(&server, "full", &filler("full", 1, 96, 0));
    wait_filled(&server, "full");
    let mut open = server.connect();
    let mut call = |method: &str, path: &str, body: &str| open.call(method, path, body);
    let memory = call("GET", "/merge/full", "").json()["memory"].clone();
    let used = memory["use_bytes"].as_u64().expect("a figure");

    let before = without_descriptors(&server);
    let patch = json!({"memory_budget": used - 32 * MIB, "force": true}).to_string();
    assert_eq!(call("PATCH", "/merge/full", &patch).status, 204);
    wait_until("one of them is ended", PATIENCE, || {
        call("GET", "/vms/full", "").json()["end_reason"] == "oom_victim"
    });
    assert_eq!(call("GET", "/vms/empty", "").json()["state"], "Running");
    set_descriptors(&server, before);
}

/// Keeps the server from opening any more file. Returns how many it might have.
fn without_descriptors(server: &Server) -> Rlimit {
    let before = getrlimit(Resource::Nofile);
    let none = Rlimit {
        current: Some(3),
        ..before
    };
    set_descriptors(server, none);
    before
}

fn set_descriptors(server: &Server, limit: Rlimit) {
    let pid = i32::try_from(server.pid()).ok().and_then(Pid::from_raw);
    prlimit(pid, Resource::Nofile, limit).expect("set the server's limit");
}

fn sparse(kernel: &KernelFile, mib: u64) -> PathBuf {
    let path = kernel.path().with_file_name("initrd");
    let file = std::fs::File::create(&path).expect("an initrd");
    file.set_len(mib * MIB).expect("a hole");
    path
}

#[test]
fn a_start_that_does_not_fit_is_refused_and_ends_nobody() {
    if !kvm::is_present() {
        return;
    }
    let server = Server::start(&["--domain", "ci", "--memory-budget-mib", "512"]);
    for number in 1..=3 {
        start(
            &server,
            &format!("vm{number}"),
            &filler("ci", number, 32, 1000),
        );
        wait_filled(&server, &format!("vm{number}"));
    }
    let kernel = KernelFile::new(IDLE);
    let config = |mib: u64| {
        json!({
            "boot-source": {
                "kernel_image_path": kernel.path(),
                "initrd_path": sparse(&kernel, mib),
            },
            "machine-config": {"vcpu_count": 1, "mem_size_mib": 1024},
            "samepage": {"merge_domain": "ci", "oom_priority": -1000},
        })
    };
    create(&server, "large", &config(700));
    let refused = server.call("PUT", "/vms/large/actions", START);
    let fault = refused.fault();
    assert_eq!(refused.status, 409, "{fault}");
    let limit = format!("memory_budget of {}", 512 * MIB);
    assert!(
        fault.contains(&limit) && fault.contains("more are needed"),
        "{fault}"
    );
    let memory = get(&server, "/merge/ci")["memory"].clone();
    assert_eq!(memory["oom_victims"], 0, "{memory}");
    assert!(memory["use_bytes"].as_u64().expect("a figure") < 256 * MIB);

    start(&server, "small", &config(100));
    assert_eq!(get(&server, "/vms/small")["state"], "Running");
    for number in 1..=3 {
        assert_healthy(&server, &format!("vm{number}"));
    }
}

#[test]
fn of_domains_that_share_a_limit_the_least_important_vm_of_all_is_ended() {
    if !kvm::is_present() {
        return;
    }
    let limit_mib = 320;
    let Some(group) = MemoryGroup::new(limit_mib * MIB) else {
        return;
    };
    let server = Server::start(&[]);
    group.adopt(server.pid());
    start(&server, "give", &filler("shared", 1, 96, -1000));
    wait_filled(&server, "give");
    // Guards of their own, whose domains do the growing.
    for number in 2..=4 {
        let id = format!("keep{number}");
        start(&server, &id, &filler(&id, number, 80, 1000));
    }
    wait_until("the least important one is ended", PATIENCE, || {
        get(&server, "/vms/give")["end_reason"] == "oom_victim"
    });
    for number in 2..=4 {
        wait_filled(&server, &format!("keep{number}"));
        assert_healthy(&server, &format!("keep{number}"));
    }
    assert_eq!(group.counters().oom_kills().expect("counters"), 0);
    assert_eq!(get(&server, "/merge/shared")["memory"]["oom_victims"], 1);
}

#[test]
fn a_server_that_is_moved_into_another_cgroup_is_guarded_there() {
    if !kvm::is_present() {
        return;
    }
    let limit_mib = 256;
    let Some(group) = MemoryGroup::new(limit_mib * MIB) else {
        return;
    };
    let server = Server::start(&["--domain", "moved"]);
    start(&server, "first", &filler("moved", 1, 16, 0));
    wait_filled(&server, "first");
    group.adopt(server.pid());
    wait_until("the limit is known", PATIENCE, || {
        get(&server, "/merge/moved")["memory"]["limit_bytes"] == limit_mib * MIB
    });
    // What was taken before stays with the group before; this one is filled by these.
    for number in 2..=4 {
        start(
            &server,
            &format!("vm{number}"),
            &filler("moved", number, 100, -5),
        );
    }
    wait_until("one of them is ended", PATIENCE, || {
        get(&server, "/merge/moved")["memory"]["oom_victims"] != 0
    });
    assert_healthy(&server, "first");
    assert_eq!(group.counters().oom_kills().expect("counters"), 0);
}

/// Starts two VMs and waits until they are merged.
fn merged_pair(server: &Server) {
    let pace = r#"{"pages_to_scan": 8192, "sleep_millisecs": 1}"#;
    server.done("PATCH", "/merge/ci", pace);
    for number in 1..=2 {
        let mut config = filler("ci", number, 64, 0);
        let workload = Workload {
            shared: 90,
            zero: 0,
            private: 10,
            hot_pages: 0,
            pace_ms: 200,
            ..Workload::quiet(number)
        };
        config["boot-source"]["boot_args"] = json!(workload.to_string());
        start(server, &format!("vm{number}"), &config);
    }
    wait_until("they are merged", PATIENCE, || {
        let sharing = get(server, "/merge/ci")["pages_sharing"].as_u64();
        sharing.expect("a counter") > 12_000
    });
}

#[test]
fn an_unmerge_that_does_not_fit_is_refused_with_what_is_missing_and_costs_nobody() {
    if !kvm::is_present() {
        return;
    }
    let server = Server::start(&["--domain", "ci"]);
    merged_pair(&server);
    let memory = get(&server, "/merge/ci")["memory"].clone();
    assert_eq!(memory["unmerge_missing_bytes"], Value::Null);
    let used = memory["use_bytes"].as_u64().expect("a figure");
    let budget = json!({"memory_budget": used + 24 * MIB}).to_string();
    server.done("PATCH", "/merge/ci", &budget);

    let refused = server.call("PATCH", "/merge/ci", r#"{"run": "unmerge"}"#);
    let fault = refused.fault();
    assert_eq!(refused.status, 409, "{fault}");
    let limit = format!("memory_budget of {}", used + 24 * MIB);
    assert!(fault.contains(&limit), "{fault}");
    let domain = get(&server, "/merge/ci");
    let missing = domain["memory"]["unmerge_missing_bytes"].as_u64();
    let missing = missing.expect("what was missing");
    assert!(missing > 20 * MIB, "{missing}");
    assert!(fault.contains(&format!(": {missing} more")), "{fault}");
    assert_eq!(domain["run"], "merge", "nothing was begun");
    let stats = String::from_utf8(server.cli(&["stats"]).stdout).expect("text");
    assert!(
        stats.contains("ci: the last unmerge was short of"),
        "{stats}"
    );
    for number in 1..=2 {
        assert_healthy(&server, &format!("vm{number}"));
    }
    assert_eq!(get(&server, "/merge/ci")["memory"]["oom_victims"], 0);

    server.done(
        "PATCH",
        "/merge/ci",
        r#"{"memory_budget": null, "run": "unmerge"}"#,
    );
    let memory = get(&server, "/merge/ci")["memory"].clone();
    assert_eq!(memory["unmerge_missing_bytes"], Value::Null, "{memory}");
}

#[test]
fn a_budget_below_what_the_domain_holds_is_refused_unless_it_is_forced() {
    if !kvm::is_present() {
        return;
    }
    let server = Server::start(&["--domain", "ci"]);
    start(&server, "vm", &filler("ci", 1, 64, 0));
    wait_filled(&server, "vm");
    // MiB where bytes are meant.
    let refused = server.call(
        "PATCH",
        "/merge/ci",
        r#"{"memory_budget": 4096, "run": "stop"}"#,
    );
    let fault = refused.fault();
    assert_eq!(refused.status, 409, "{fault}");
    assert!(
        fault.starts_with("merge domain ci: memory_budget 4096: ") && fault.contains("force"),
        "{fault}"
    );
    let domain = get(&server, "/merge/ci");
    assert_eq!(
        (&domain["run"], &domain["memory"]["budget_bytes"]),
        (&json!("merge"), &Value::Null)
    );
    assert_healthy(&server, "vm");
    server.done(
        "PATCH",
        "/merge/ci",
        r#"{"memory_budget": 4096, "force": true}"#,
    );
    wait_until("the VM is ended", PATIENCE, || {
        get(&server, "/vms/vm")["end_reason"] == "oom_victim"
    });
}
