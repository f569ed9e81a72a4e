//! Domains that run out of memory: some VMs end, the rest never notice.

use std::time::{Duration, Instant};

use dedup::Run;
use pageload_workload::{Workload, layout};
use samepage_tests::cgroup::MemoryGroup;
use samepage_tests::guests::{eager_monitor, healthy_report, launch, pageload, wait_verified};
use samepage_tests::http::Connection;
use samepage_tests::kvm;
use samepage_tests::server::Server;
use samepage_tests::wait::{PATIENCE, wait_until};
use serde_json::{Value, json};
use vmm::{EndReason, ErrorKind, Monitor, VmId, VmState};

const MIB: u64 = 1 << 20;
const VMS: u64 = 16;
const VM_MIB: u64 = 32;
/// All VMs merged need less than half of it, all VMs unshared nearly three times as much.
const LIMIT_MIB: u64 = 192;
/// Runs of the storm in a row, for the test that has the time.
const STORMS: usize = 20;
/// Longest that a storm may take, from the first write to the last end; only a hang is longer.
const STORM_TIME: Duration = Duration::from_secs(600);
/// Patience of an unmerge that starves: more than a test waits for anything else.
const STARVING_TIME: Duration = Duration::from_secs(600);

/// Mostly shared, so that little is left of it when it is merged.
fn workload(number: u64) -> Workload {
    Workload {
        shared: 80,
        zero: 10,
        private: 10,
        hot_pages: 0,
        pace_ms: 200,
        ..Workload::breaker(number)
    }
}

fn shared_pages() -> u64 {
    layout::page_count(VM_MIB * MIB) * 80 / 100
}

fn is_over(state: &Value) -> bool {
    state["state"] == "Ended"
}

/// A server with merged VMs, in a cgroup if there may be one, else with a budget.
struct Fleet {
    server: Server,
    consoles: Vec<Connection>,
    group: Option<MemoryGroup>,
}

impl Fleet {
    /// Starts VM after VM, each once the one before is merged: all of them unmerged do not fit.
    fn launch() -> Fleet {
        let server = Server::start(&[]);
        // Before the domain's monitor is there to look for its limit.
        let group = MemoryGroup::new(LIMIT_MIB * MIB);
        if let Some(group) = &group {
            group.adopt(server.pid());
        }
        let mut fleet = Fleet {
            server,
            consoles: Vec::new(),
            group,
        };
        for number in 0..VMS {
            fleet.launch_one(number);
        }
        fleet
    }

    fn launch_one(&mut self, number: u64) {
        let config = json!({
            "boot-source": {
                "kernel_image_path": "builtin:pageload",
                "boot_args": workload(number).to_string(),
            },
            "machine-config": {"vcpu_count": 1, "mem_size_mib": VM_MIB},
            "samepage": {"merge_domain": "storm", "oom_priority": number},
        });
        let vm = format!("/vms/vm{number}");
        self.server.done("PUT", &vm, &config.to_string());
        if number == 0 {
            let pace = r#"{"pages_to_scan": 8192, "sleep_millisecs": 1}"#;
            self.server.done("PATCH", "/merge/storm", pace);
            if self.group.is_none() {
                let budget = json!({"memory_budget": LIMIT_MIB * MIB});
                self.server
                    .done("PATCH", "/merge/storm", &budget.to_string());
            }
        }
        let start = r#"{"action_type": "InstanceStart"}"#;
        self.server.done("PUT", &format!("{vm}/actions"), start);
        self.consoles.push(self.console(&vm));
        wait_until("the VM is filled and merged", PATIENCE, || {
            let merge = self.get(&format!("{vm}/merge"));
            let merging = merge["pages_merging"].as_u64().expect("a counter");
            // The first one has nobody to share with yet.
            let is_merged = number == 0 || merging >= shared_pages() * 95 / 100;
            is_merged && self.get(&vm)["report"]["phase"] == 2
        });
    }

    fn console(&self, vm: &str) -> Connection {
        let mut console = self.server.connect();
        let request = format!(
            "GET {vm}/console HTTP/1.1\r\nHost: localhost\r\n\
             Connection: Upgrade\r\nUpgrade: samepage-console\r\n\r\n"
        );
        console.send(request.as_bytes()).expect("a request");
        assert_eq!(console.reply().status, 101);
        console
    }

    fn get(&self, path: &str) -> Value {
        let reply = self.server.call("GET", path, "");
        assert_eq!(reply.status, 200, "{path}");
        reply.json()
    }

    fn vms(&self) -> Vec<Value> {
        self.get("/vms").as_array().expect("an array").clone()
    }

    /// Every VM writes to all its shared pages at once; returns when each has ended or has
    /// verified what it wrote.
    fn storm(&mut self) {
        for console in &mut self.consoles {
            console.send(b"!").expect("the VM's input");
        }
        wait_until("each VM has ended or written", STORM_TIME, || {
            self.vms().iter().all(|vm| {
                let report = &vm["report"];
                assert_eq!(report["verify_errors"], 0, "{vm}");
                let written = report["pages_written"].as_u64().expect("a counter");
                is_over(vm) || written >= shared_pages()
            })
        });
        let passes = |vm: &Value| vm["report"]["verify_passes"].as_u64().expect("a counter");
        let before = self.vms();
        wait_until("the survivors verified their memory", STORM_TIME, || {
            let mut pairs = self.vms().into_iter().zip(&before);
            pairs.all(|(now, then)| is_over(&now) || passes(&now) > passes(then))
        });
    }

    /// Checks who ended and why, and what the domain says. Returns how many ended.
    fn judge(&self) -> usize {
        let vms = self.vms();
        let (ended, alive): (Vec<&Value>, Vec<&Value>) = vms.iter().partition(|vm| is_over(vm));
        assert!(!ended.is_empty() && !alive.is_empty(), "{vms:?}");
        let priority = |vm: &&Value| vm["oom_priority"].as_i64();
        let most_important_victim = ended.iter().map(priority).max();
        let least_important_survivor = alive.iter().map(priority).min();
        assert!(
            most_important_victim < least_important_survivor,
            "the least important end first"
        );
        for vm in &ended {
            assert_eq!(vm["end_reason"], "oom_victim", "{vm}");
        }
        for vm in &alive {
            assert_eq!(vm["state"], "Running", "{vm}");
            assert_eq!(vm["report"]["verify_errors"], 0, "{vm}");
        }
        let memory = &self.get("/merge/storm")["memory"];
        assert_eq!(memory["oom_victims"], ended.len(), "{memory}");
        let bytes = |name: &str| memory[name].as_u64().expect("a figure");
        assert_eq!(bytes("limit_bytes"), LIMIT_MIB * MIB);
        assert!(bytes("use_bytes") < LIMIT_MIB * MIB, "{memory}");
        if let Some(group) = &self.group {
            assert_eq!(memory["limited_by"], "cgroup");
            assert_eq!(
                group.counters().oom_kills().expect("counters"),
                0,
                "the kernel was not the one to act"
            );
            println!(
                "{} of {VMS} ended; peak {} of {LIMIT_MIB} MiB",
                ended.len(),
                group.counters().peak_bytes().expect("counters") / MIB
            );
        }
        ended.len()
    }
}

fn unshare_storm() {
    let mut fleet = Fleet::launch();
    let memory = fleet.get("/merge/storm")["memory"].clone();
    let bytes = |name: &str| memory[name].as_u64().expect("a figure");
    assert_eq!(bytes("oom_victims"), 0, "{memory}");
    assert!(
        bytes("nominal_bytes") > 2 * bytes("limit_bytes"),
        "{memory}"
    );
    assert!(bytes("worst_case_bytes") > bytes("limit_bytes"), "{memory}");
    fleet.storm();
    fleet.judge();
}

#[test]
fn guests_that_unshare_everything_at_once_end_one_by_one_until_the_rest_fit() {
    if kvm::is_present() {
        unshare_storm();
    }
}

#[test]
#[ignore = "takes a quarter of an hour"]
fn twenty_storms_in_a_row_never_make_the_kernel_act() {
    if !kvm::is_present() {
        return;
    }
    for number in 1..=STORMS {
        println!("storm {number} of {STORMS}");
        unshare_storm();
    }
}

/// Merged VMs in a monitor of this process.
fn merged(monitor: &Monitor, count: u64) -> Vec<VmId> {
    let ids = (0..count).map(|number| {
        let config = pageload(&workload(number), VM_MIB);
        let id = launch(monitor, &format!("vm{number}"), config);
        wait_verified(monitor, std::slice::from_ref(&id), 1);
        id
    });
    let ids: Vec<VmId> = ids.collect();
    wait_until("all VMs are merged", PATIENCE, || {
        let merging = |id: &VmId| {
            monitor
                .merge_stats(id)
                .map_or(0, |stats| stats.pages_merging)
        };
        ids.iter()
            .all(|id| merging(id) >= shared_pages() * 95 / 100)
    });
    ids
}

fn alive(monitor: &Monitor) -> Vec<VmId> {
    let vms = monitor.list().into_iter();
    let alive = vms.filter(|vm| vm.state.is_alive());
    alive.map(|vm| vm.id).collect()
}

/// Those of the running VMs that go on. One that was just chosen to end is seen as running until
/// its memory was given back and a little longer, but it verifies nothing any more.
fn survivors(monitor: &Monitor, ids: &[VmId]) -> Vec<VmId> {
    let passes = |id: &VmId| {
        let info = monitor.info(id).expect("it is there");
        let report = info.report.expect("a report");
        assert_eq!(report.verify_errors, 0, "{id}: {report:?}");
        info.state.is_alive().then_some(report.verify_passes)
    };
    let before: Vec<Option<u64>> = ids.iter().map(passes).collect();
    wait_until("each VM has ended or goes on", PATIENCE, || {
        let mut pairs = ids.iter().zip(&before);
        pairs.all(|(id, before)| passes(id).is_none_or(|now| Some(now) > *before))
    });
    alive(monitor)
}

#[test]
fn a_budget_is_kept_by_a_domain_beside_others_in_its_process() {
    if !kvm::is_present() {
        return;
    }
    let beside = eager_monitor("beside");
    let bystander = merged_bystander(&beside);
    let monitor = eager_monitor("budget");
    let ids = merged(&monitor, 4);
    let merged_bytes = monitor.memory().use_bytes;
    // Two of four can hold all their memory.
    monitor.set_memory_budget(Some(merged_bytes + 2 * VM_MIB * MIB));
    for id in &ids {
        let console = monitor.console(id).expect("it is there");
        console.write_input(b"!").expect("it runs");
    }
    wait_until(
        "some VM has ended, and the rest have written",
        PATIENCE,
        || {
            let written = |id: &VmId| {
                monitor
                    .info(id)
                    .ok()?
                    .report
                    .map(|report| report.pages_written)
            };
            let alive = alive(&monitor);
            alive.len() < ids.len() && alive.iter().all(|id| written(id) >= Some(shared_pages()))
        },
    );
    let alive = survivors(&monitor, &ids);
    assert!(!alive.is_empty());
    wait_verified(&monitor, &alive, 1);
    for id in ids.iter().filter(|id| !alive.contains(id)) {
        let state = monitor.info(id).expect("it is there").state;
        assert_eq!(state, VmState::Ended(EndReason::OomVictim));
    }
    let memory = monitor.memory();
    assert!(
        memory.use_bytes < memory.limit_bytes.expect("a budget"),
        "{memory:?}"
    );
    assert_eq!(beside.memory().oom_victims, 0);
    healthy_report(&beside, &bystander);
}

fn merged_bystander(monitor: &Monitor) -> VmId {
    let id = launch(monitor, "bystander", pageload(&Workload::quiet(99), VM_MIB));
    wait_verified(monitor, std::slice::from_ref(&id), 1);
    id
}

#[test]
fn an_unmerge_that_does_not_fit_fails_and_hurts_no_vm() {
    if !kvm::is_present() {
        return;
    }
    let monitor = eager_monitor("nofit");
    let ids = merged(&monitor, 4);
    let before = monitor.memory();
    assert!(
        before.worst_case_bytes > before.use_bytes + 64 * MIB,
        "{before:?}"
    );
    monitor.set_memory_budget(Some(before.use_bytes + 48 * MIB));
    let error = monitor.engine().set_run(Run::Unmerge).expect_err("no room");
    assert!(
        error.to_string().contains("memory budget is short of"),
        "{error}"
    );
    assert_eq!(monitor.engine().run(), Run::Stop);
    let stats = monitor.engine().stats();
    assert!(stats.pages_sharing > 0, "some are still merged: {stats:?}");
    assert_eq!(alive(&monitor), ids);
    assert_eq!(monitor.memory().oom_victims, 0);
    wait_verified(&monitor, &ids, 1);
}

#[test]
fn an_unmerge_that_another_order_takes_back_is_a_conflict_and_not_a_failure() {
    if !kvm::is_present() {
        return;
    }
    let monitor = eager_monitor("back");
    let ids = merged(&monitor, 4);
    let engine = monitor.engine();
    monitor.set_memory_budget(Some(monitor.memory().use_bytes + 40 * MIB));
    // One that may have victims is not refused before it begins.
    monitor.set_unmerge_victims(true);
    let unmerged = std::thread::scope(|scope| {
        let unmerge = scope.spawn(|| monitor.set_run(Run::Unmerge));
        wait_until("the unmerge starves, or is done", PATIENCE, || {
            engine.memory_waited_for_bytes() > 0 || unmerge.is_finished()
        });
        monitor.set_run(Run::Merge).expect("nothing forbids it");
        unmerge.join().expect("no panic")
    });
    let error = unmerged.expect_err("it was taken back");
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
    assert_eq!(engine.run(), Run::Merge);
    assert_eq!(monitor.memory().unmerge_missing_bytes, None);
    // The guard may have ended one before the other order came.
    wait_verified(&monitor, &survivors(&monitor, &ids), 1);
}

#[test]
fn an_unmerge_that_may_have_victims_ends_vms_until_it_fits() {
    if !kvm::is_present() {
        return;
    }
    let monitor = eager_monitor("victims");
    let ids = merged(&monitor, 4);
    monitor.set_memory_budget(Some(monitor.memory().use_bytes + 48 * MIB));
    monitor.set_unmerge_victims(true);
    monitor
        .engine()
        .set_run(Run::Unmerge)
        .expect("it fits in the end");
    let stats = monitor.engine().stats();
    assert_eq!((stats.pages_shared, stats.pages_zero), (0, 0), "{stats:?}");
    let alive = survivors(&monitor, &ids);
    assert!((1..ids.len()).contains(&alive.len()), "{alive:?}");
    wait_verified(&monitor, &alive, 1);
}

/// The seed of the engine's shutdown order: whoever waits for memory holds a lock that the exit
/// needs, and the exit is what feeds it. An exit that waited for the lock would wait until the
/// unmerge gives up.
#[test]
fn a_vm_ends_while_an_unmerge_starves_inside_of_it() {
    if !kvm::is_present() {
        return;
    }
    let monitor = eager_monitor("starving");
    let ids = merged(&monitor, 4);
    let engine = monitor.engine();
    monitor.set_memory_budget(Some(monitor.memory().use_bytes + 40 * MIB));
    engine.set_unmerge_patience(Some(STARVING_TIME));
    std::thread::scope(|scope| {
        let unmerge = scope.spawn(|| engine.set_run(Run::Unmerge));
        // The last one first: that is the one the unmerge comes to when memory runs out.
        for id in ids[1..].iter().rev() {
            wait_until("the unmerge starves, or is done", PATIENCE, || {
                engine.memory_waited_for_bytes() > 0 || unmerge.is_finished()
            });
            let deadline = Instant::now() + PATIENCE;
            monitor.stop(id).expect("it stops");
            assert!(Instant::now() < deadline, "it waited for the unmerge");
        }
        let unmerged = unmerge.join().expect("no panic");
        unmerged.expect("what is left fits");
    });
    // What was left in the middle is the worker's to finish.
    wait_until("nothing is merged any more", PATIENCE, || {
        let stats = engine.stats();
        (stats.slots, stats.pages_shared, stats.pages_zero) == (1, 0, 0)
    });
    assert_eq!(monitor.memory().oom_victims, 0);
    wait_verified(&monitor, &ids[..1], 1);
}

#[test]
fn a_start_beyond_the_overcommit_ratio_is_refused_with_what_is_missing() {
    if !kvm::is_present() {
        return;
    }
    let server = Server::start(&["--domain", "ci", "--memory-budget-mib", "300"]);
    let ratio = json!({"overcommit_ratio": 0.25});
    server.done("PATCH", "/merge/ci", &ratio.to_string());
    let launch = |id: &str| {
        let config = json!({
            "boot-source": {"kernel_image_path": "builtin:pageload"},
            "machine-config": {"vcpu_count": 1, "mem_size_mib": VM_MIB},
            "samepage": {"merge_domain": "ci"},
        });
        server.done("PUT", &format!("/vms/{id}"), &config.to_string());
        let start = r#"{"action_type": "InstanceStart"}"#;
        server.call("PUT", &format!("/vms/{id}/actions"), start)
    };
    assert_eq!(launch("a").status, 204);
    assert_eq!(launch("b").status, 204);
    let refused = launch("c");
    assert_eq!(refused.status, 409);
    // 96 MiB of 75.
    let fault = refused.fault();
    assert!(
        fault.contains(&format!("{} bytes more", 21 * MIB)),
        "{fault}"
    );
    let stats = server.cli(&["stats"]).stdout;
    let stats = String::from_utf8(stats).expect("text");
    assert!(
        stats.contains("LIMIT") && stats.contains("300.0 MiB"),
        "{stats}"
    );
    server.done(
        "PUT",
        "/vms/a/actions",
        r#"{"action_type": "InstanceStop"}"#,
    );
    let start = r#"{"action_type": "InstanceStart"}"#;
    server.done("PUT", "/vms/c/actions", start);
}

#[test]
fn what_a_start_is_refused_for_is_a_kind_of_its_own() {
    if !kvm::is_present() {
        return;
    }
    let monitor = eager_monitor("ratio");
    monitor.set_memory_budget(Some(1 << 30));
    monitor.set_overcommit_ratio(Some(0.01));
    let id: VmId = "vm".parse().expect("an id");
    let config = pageload(&workload(1), VM_MIB);
    monitor.create(id.clone(), config).expect("created");
    let refused = monitor.start(&id).expect_err("32 of 10 MiB");
    assert_eq!(refused.kind(), ErrorKind::NoRoom, "{refused}");
    assert_eq!(alive(&monitor), []);
    monitor.set_overcommit_ratio(None);
    monitor.start(&id).expect("nothing forbids it now");
}
