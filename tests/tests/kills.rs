//! The front door, monitors and both are killed again and again, under load and in the middle of
//! requests: what must remain remains, and what must go is gone.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use samepage_tests::domains::{State, config, describe, kill, launch, remove, wait_states};
use samepage_tests::kvm;
use samepage_tests::server::Server;
use samepage_tests::tiny_kernel::{KernelFile, say_and_rest};
use samepage_tests::wait::{PATIENCE, wait_until};
use serde_json::{Value, json};

const ROUNDS: u64 = 100;
/// Domains of five VMs each, and VMs with a domain to themselves.
const SHARED_DOMAINS: u64 = 8;
const LONE_VMS: u64 = 10;

/// The VMs that are followed: their domains' directories by their ids.
fn followed() -> BTreeMap<String, String> {
    let shared = (0..SHARED_DOMAINS * 5).map(|n| (format!("vm{n:02}"), format!("d{}", n / 5)));
    let lone = (0..LONE_VMS).map(|n| (format!("lone{n}"), format!("vm:lone{n}")));
    shared.chain(lone).collect()
}

fn launch_followed(state: &State, server: &Server, id: &str, domain: &str) {
    let kernel = KernelFile::new(&say_and_rest(id));
    let named = (!domain.starts_with("vm:")).then_some(domain);
    launch(server, id, &kernel, named);
    let console = format!("/vms/{id}/console");
    wait_until("the guest has said its name", PATIENCE, || {
        server.call("GET", &console, "").body == id.as_bytes()
            && state.has_tail(domain, id, id.as_bytes())
    });
}

/// Numbers without order, the same in each run (xorshift64).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 33).expect("31 bits") % below
    }
}

/// Creates, starts, lists and removes VMs until `done`, whoever is killed meanwhile. The ids it used.
fn churn(socket: &Path, kernel: &KernelFile, round: u64, done: &AtomicBool) -> BTreeSet<String> {
    let mut ids = BTreeSet::new();
    let mut number = 0;
    while !done.load(Ordering::Relaxed) {
        let id = format!("churn-{round}-{number}");
        let domain = ["d0", "d1", "extra"].get(number % 4).copied();
        let start = json!({ "action_type": "InstanceStart" }).to_string();
        let (vm, actions) = (format!("/vms/{id}"), format!("/vms/{id}/actions"));
        try_call(socket, "PUT", &vm, &config(kernel, domain).to_string());
        try_call(socket, "PUT", &actions, &start);
        try_call(socket, "GET", "/vms", "");
        if number.is_multiple_of(2) {
            let stop = json!({ "action_type": "InstanceStop" }).to_string();
            try_call(socket, "PUT", &actions, &stop);
            try_call(socket, "DELETE", &vm, "");
        }
        ids.insert(id);
        number += 1;
    }
    ids
}

/// A request whose server may die before, under or after it.
fn try_call(socket: &Path, method: &str, path: &str, body: &str) {
    let length = body.len();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
    );
    if let Ok(mut stream) = UnixStream::connect(socket)
        && stream.set_read_timeout(Some(PATIENCE)).is_ok()
        && stream.write_all(request.as_bytes()).is_ok()
    {
        // What came until then is of no interest.
        let _ = stream.read_to_end(&mut Vec::new());
    }
}

/// The processes that are monitors of this state directory.
fn monitors_of(state: &State) -> BTreeSet<i32> {
    let mut monitors = BTreeSet::new();
    for entry in std::fs::read_dir("/proc").expect("/proc").flatten() {
        let pid: Option<i32> = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        let line = std::fs::read_to_string(entry.path().join("cmdline")).unwrap_or_default();
        if line.contains("\0monitor\0") && line.contains(state.path()) {
            monitors.extend(pid);
        }
    }
    monitors
}

/// As [`wait_states`], where there may be other VMs too.
fn wait_states_among(server: &Server, expected: &[(&str, &str)]) {
    wait_until("all vms are known", PATIENCE, || {
        let vms = server.call("GET", "/vms", "").json();
        let vms = vms.as_array().expect("an array");
        let listed: BTreeMap<&str, &Value> = vms
            .iter()
            .filter_map(|vm| Some((vm["id"].as_str()?, vm)))
            .collect();
        expected
            .iter()
            .all(|(id, state)| listed.get(id).is_some_and(|vm| vm["state"] == *state))
    });
}

/// Removes what the churn left.
fn sweep(server: &Server, ids: &BTreeSet<String>) {
    for id in ids {
        let vm = server.call("GET", &format!("/vms/{id}"), "");
        if vm.status == 200 {
            remove(server, id);
        }
        assert_eq!(server.call("DELETE", &format!("/vms/{id}"), "").status, 404);
    }
}

/// Who is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victims {
    FrontDoor,
    Monitor,
    FrontDoorThenMonitor,
    MonitorThenFrontDoor,
}

impl Victims {
    fn have_monitor(self) -> bool {
        self != Victims::FrontDoor
    }
}

/// What all rounds have in common.
struct Host {
    state: State,
    vms: BTreeMap<String, String>,
    domains: BTreeSet<String>,
    churned: KernelFile,
}

impl Host {
    fn new() -> Host {
        let vms = followed();
        Host {
            state: State::empty(),
            domains: vms.values().cloned().collect(),
            vms,
            churned: KernelFile::new(&say_and_rest("churn")),
        }
    }

    fn monitors(&self) -> BTreeMap<&str, Pid> {
        let names = self.domains.iter();
        names
            .map(|name| (&**name, self.state.monitor(name)))
            .collect()
    }

    /// The followed VMs' states once the monitor of `victim` has died, if it does.
    fn expected(&self, victims: Victims, victim: &str) -> Vec<(&str, &str)> {
        let state = |domain: &str| match victims.have_monitor() && domain == victim {
            true => "Ended",
            false => "Running",
        };
        let vms = self.vms.iter();
        vms.map(|(id, domain)| (&**id, state(domain))).collect()
    }

    /// Kills somebody in the middle of other requests, `after` so many lists. What the front door is
    /// then, how long a new one took, and the ids of the other requests.
    fn strike(
        &self,
        mut server: Server,
        victims: Victims,
        (victim, after): (&str, u64),
        round: u64,
    ) -> (Server, Option<Duration>, BTreeSet<String>) {
        let monitor = self.state.monitor(victim);
        let expected = self.expected(victims, victim);
        let (socket, done) = (server.socket(), AtomicBool::new(false));
        thread::scope(|scope| {
            let churning = scope.spawn(|| churn(&socket, &self.churned, round, &done));
            let _done = SetOnDrop(&done);
            for _ in 0..after {
                assert_eq!(server.call("GET", "/vms", "").status, 200);
            }
            if matches!(victims, Victims::Monitor | Victims::MonitorThenFrontDoor) {
                kill(monitor);
            }
            let mut time = None;
            if victims == Victims::Monitor {
                wait_states_among(&server, &expected);
            } else {
                server.stop(Signal::KILL);
                if victims == Victims::FrontDoorThenMonitor {
                    kill(monitor);
                }
                let begun = Instant::now();
                server = self.state.serve();
                wait_states_among(&server, &expected);
                time = Some(begun.elapsed());
            }
            done.store(true, Ordering::Relaxed);
            (server, time, churning.join().expect("churn"))
        })
    }

    /// Looks at what a dead monitor left of a VM, and has the VM start anew.
    fn replace(&self, server: &Server, id: &str) {
        assert_eq!(describe(server, id)["end_reason"], "crashed");
        let tail = server.call("GET", &format!("/vms/{id}/console"), "").body;
        assert_eq!(tail, id.as_bytes());
        remove(server, id);
        launch_followed(&self.state, server, id, &self.vms[id]);
    }
}

#[test]
#[ignore = "takes minutes, and all cores"]
fn what_must_remain_remains_and_what_must_go_is_gone_after_100_kills() {
    if !kvm::is_present() {
        return;
    }
    let host = Host::new();
    let mut server = host.state.serve();
    for (id, domain) in &host.vms {
        launch_followed(&host.state, &server, id, domain);
    }
    let names: Vec<&String> = host.domains.iter().collect();
    let mut dice = Dice(0x5eed);
    let (mut times, mut crashes, is_over) = (Vec::new(), 0, AtomicBool::new(false));
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        // Dropped also when an assertion fails: else the load would go on for ever.
        let _end = SetOnDrop(&is_over);
        for round in 0..ROUNDS {
            let monitors = host.monitors();
            let victims = [
                Victims::FrontDoor,
                Victims::Monitor,
                Victims::FrontDoorThenMonitor,
                Victims::MonitorThenFrontDoor,
            ][dice.roll(4)];
            let victim = names[dice.roll(names.len())].as_str();
            let after = dice.roll(40) as u64;
            let (next, time, ids) = host.strike(server, victims, (victim, after), round);
            server = next;
            times.extend(time);
            sweep(&server, &ids);
            let expected = host.expected(victims, victim);
            wait_states(&server, &expected);
            for (id, _) in expected.iter().filter(|(_, state)| *state == "Ended") {
                crashes += 1;
                host.replace(&server, id);
            }
            for (name, pid) in monitors {
                let is_new = victims.have_monitor() && name == victim;
                assert_eq!(host.state.monitor(name) != pid, is_new, "{name}");
            }
            // No monitor is left over, and no directory.
            assert_eq!(host.state.domains(), host.domains);
            let known = host.monitors().into_values();
            let known = known.map(|pid| pid.as_raw_nonzero().get()).collect();
            assert_eq!(monitors_of(&host.state), known);
        }
    });
    times.sort();
    let (median, most) = (times[times.len() / 2], times[times.len() - 1]);
    println!(
        "{ROUNDS} rounds, {} of them with a new front door: it knew all {} vms after {median:?} \
         (median), {most:?} (most); {crashes} vms crashed with their monitors",
        times.len(),
        host.vms.len()
    );
}

/// Sets a flag when it goes.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
