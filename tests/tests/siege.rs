//! The long attack: hostile clients and guests that misbehave, against one server in a memory cgroup.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pageload_workload::Workload;
use rustix::process::Signal;
use samepage_tests::cgroup::MemoryGroup;
use samepage_tests::http::Connection;
use samepage_tests::server::Server;
use samepage_tests::wait::{PATIENCE, wait_until};
use samepage_tests::{kvm, linux};
use serde_json::{Value, json};
use tempfile::TempDir;

/// What the run takes where `SAMEPAGE_SIEGE_SECONDS` does not say otherwise.
const SIEGE_SECONDS: u64 = 600;
const LIMIT_BYTES: u64 = 1 << 30;
const DOMAINS: [&str; 3] = ["one", "two", "three"];
const HOSTILE_CLIENTS: usize = 1000;
/// Each is some hundred clients, one after the other.
const HOSTILE_THREADS: usize = 8;
/// Between two looks for guests that have ended.
const LOOK_INTERVAL_MS: u64 = 1000;
const DISKS: usize = 6;
const DISK_BYTES: u64 = 1 << 30;
const START: &str = r#"{"action_type": "InstanceStart"}"#;

fn siege_time() -> Duration {
    let seconds = std::env::var("SAMEPAGE_SIEGE_SECONDS").ok();
    let seconds = seconds.map(|text| text.parse().expect("SAMEPAGE_SIEGE_SECONDS: a number"));
    Duration::from_secs(seconds.unwrap_or(SIEGE_SECONDS))
}

/// Guests that misbehave, by their name and what they are.
fn rude_guests(disks: &TempDir) -> Vec<(String, Value)> {
    // Of the first round only a little is waited for: to read a disk whole takes minutes here.
    let all_disks = "for d in /dev/vd?; do dd if=$d of=/dev/null bs=1M count=2; echo mischief; \
                     while dd if=$d of=/dev/null bs=16M; do :; done & done; wait";
    // Another name each time: the old one is taken for as long as somebody reads it.
    let resets = "while :; do for d in /dev/vd?; do dd if=$d of=/dev/null bs=1M & done; sleep 1; \
                  echo virtio0 > /sys/bus/virtio/drivers/virtio_blk/unbind; wait; \
                  echo virtio0 > /sys/bus/virtio/drivers/virtio_blk/bind && echo mischief; done";
    let mut guests = Vec::new();
    for number in 0..3 {
        let config = linux_guest(all_disks, disks, number, DISKS);
        guests.push((format!("disks-{number}"), config));
    }
    for number in 3..5 {
        guests.push((
            format!("resets-{number}"),
            linux_guest(resets, disks, number, 1),
        ));
    }
    guests.push(("flood".to_owned(), linux_guest("yes mischief", disks, 5, 0)));
    for number in 0..2 {
        let mut config = pageload(&Workload::busy(number), 256);
        config["machine-config"]["huge_pages"] = json!("Transparent");
        guests.push((format!("huge-{number}"), config));
    }
    guests
}

fn linux_guest(command: &str, disks: &TempDir, number: usize, count: usize) -> Value {
    let mut config = json!(linux::running(command));
    let drive = |disk: usize| {
        let path = disks.path().join(format!("{number}-{disk}"));
        std::fs::File::create(&path)
            .and_then(|file| file.set_len(DISK_BYTES))
            .expect("a sparse disk");
        json!({ "drive_id": format!("d{disk}"), "path_on_host": path, "is_root_device": false })
    };
    config["drives"] = (0..count).map(drive).collect();
    config
}

fn pageload(workload: &Workload, mem_mib: u64) -> Value {
    json!({
        "boot-source": {
            "kernel_image_path": "builtin:pageload",
            "boot_args": workload.to_string(),
        },
        "machine-config": { "vcpu_count": 1, "mem_size_mib": mem_mib },
    })
}

fn launch(server: &Server, id: &str, mut config: Value, (domain, oom_priority): (&str, i32)) {
    config["samepage"] = json!({ "merge_domain": domain, "oom_priority": oom_priority });
    server.done("PUT", &format!("/vms/{id}"), &config.to_string());
    server.done("PUT", &format!("/vms/{id}/actions"), START);
}

/// Starts those again that have ended: of old age, of an error, or for want of memory. Only the
/// server's own death fails the test here.
fn restart_ended(server: &Server, guests: &[(String, Value)]) -> usize {
    let mut restarted = 0;
    for (number, (id, config)) in guests.iter().enumerate() {
        let path = format!("/vms/{id}");
        let vm = server.call("GET", &path, "");
        if vm.status == 200 && vm.json()["state"] != "Ended" {
            continue;
        }
        server.call("DELETE", &path, "");
        let mut config = config.clone();
        config["samepage"] = json!({ "merge_domain": DOMAINS[number % 3], "oom_priority": -1000 });
        server.call("PUT", &path, &config.to_string());
        // Refused where there is no room for it now.
        server.call("PUT", &format!("{path}/actions"), START);
        restarted += 1;
    }
    restarted
}

/// One hostile client, of one of five kinds. Whatever the server does to it is right.
fn be_hostile(socket: &Path, kind: usize, keep: &mut Vec<UnixStream>) -> std::io::Result<()> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_write_timeout(Some(Duration::from_secs(5)))?;
    stream.set_read_timeout(Some(Duration::from_millis(20)))?;
    match kind % 5 {
        // A head that never ends; the client stays.
        0 => stream.write_all(b"GET /vms HTTP/1.1\r\nX-Slow: ")?,
        // Half a body; the client stays.
        1 => stream.write_all(b"PUT /vms/x HTTP/1.1\r\nContent-Length: 50000\r\n\r\n{")?,
        // Gone in the middle of a request.
        2 => return stream.write_all(b"PUT /vms/x/actions HTTP/1.1\r\nContent-Le"),
        // A megabyte of body.
        3 => {
            stream.write_all(b"PUT /vms/x HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n")?;
            stream.write_all(&vec![b' '; 1_000_000])?;
        }
        // Many requests, whose replies nobody reads.
        _ => stream.write_all(&b"GET /openapi.json HTTP/1.1\r\n\r\n".repeat(200))?,
    }
    keep.push(stream);
    Ok(())
}

fn attack(socket: &Path, number: usize, is_over: &AtomicBool, clients: &AtomicU64) {
    let mut keep = Vec::new();
    let mut kind = number;
    while !is_over.load(Ordering::Relaxed) {
        // The server hangs up on most.
        let _ = be_hostile(socket, kind, &mut keep);
        kind += 1;
        clients.fetch_add(1, Ordering::Relaxed);
        if keep.len() >= HOSTILE_CLIENTS / HOSTILE_THREADS {
            let mut scrap = [0; 4096];
            let _ = keep[0].read(&mut scrap);
            keep.drain(..1);
        }
    }
}

/// Asks for the list of VMs until the end; how long each answer took.
fn ask(socket: &Path, is_over: &AtomicBool) -> Vec<Duration> {
    let mut times = Vec::new();
    while !is_over.load(Ordering::Relaxed) {
        let begun = Instant::now();
        let reply = Connection::open(socket).call("GET", "/vms", "");
        times.push(begun.elapsed());
        assert_eq!(reply.status, 200);
        std::thread::park_timeout(Duration::from_millis(20));
    }
    times
}

fn errors_and_passes(server: &Server, id: &str) -> (u64, u64) {
    let vm = server.call("GET", &format!("/vms/{id}"), "").json();
    assert_eq!(vm["state"], "Running", "{vm}");
    let figure = |name: &str| vm["report"][name].as_u64().expect("a figure");
    (figure("verify_errors"), figure("verify_passes"))
}

fn open_descriptors(server: &Server) -> usize {
    let directory = PathBuf::from(format!("/proc/{}/fd", server.pid()));
    std::fs::read_dir(directory).expect("descriptors").count()
}

/// VMs that do nothing wrong, spread over the domains; their names.
fn start_quiet_vms(server: &Server) -> Vec<String> {
    let quiet: Vec<String> = (0..6).map(|number| format!("quiet-{number}")).collect();
    for ((number, id), domain) in (0..).zip(&quiet).zip(DOMAINS.iter().cycle()) {
        let config = pageload(&Workload::quiet(number), 32);
        launch(server, id, config, (domain, 1000));
    }
    wait_until("the quiet ones are filled", PATIENCE, || {
        quiet.iter().all(|id| {
            let vm = server.call("GET", &format!("/vms/{id}"), "").json();
            let passes = vm["report"]["verify_passes"].as_u64();
            passes.is_some_and(|passes| passes > 0)
        })
    });
    quiet
}

/// Waits until each Linux guest has done once what it is for: later ones make the siege.
fn wait_for_mischief(server: &Server, guests: &[(String, Value)]) {
    let mut waiting: Vec<&str> = guests.iter().map(|(id, _)| id.as_str()).collect();
    waiting.retain(|id| !id.starts_with("huge-"));
    wait_until("all guests misbehave", linux::PATIENCE, || {
        restart_ended(server, guests);
        waiting.retain(|id| {
            let console = server.call("GET", &format!("/vms/{id}/console"), "");
            !String::from_utf8_lossy(&console.body).contains("\nmischief")
        });
        waiting.is_empty()
    });
}

/// What came of a siege.
struct Siege {
    clients: u64,
    restarts: usize,
    /// How long each list of VMs took, in ascending order.
    answers: Vec<Duration>,
}

fn besiege(server: &Server, guests: &[(String, Value)]) -> Siege {
    let (is_over, clients) = (AtomicBool::new(false), AtomicU64::new(0));
    let socket = server.socket();
    let begun = Instant::now();
    let mut restarts = 0;
    let mut answers = std::thread::scope(|scope| {
        let (socket, is_over, clients) = (&socket, &is_over, &clients);
        for number in 0..HOSTILE_THREADS {
            scope.spawn(move || attack(socket, number, is_over, clients));
        }
        let asking = scope.spawn(move || ask(socket, is_over));
        while begun.elapsed() < siege_time() {
            restarts += restart_ended(server, guests);
            std::thread::park_timeout(Duration::from_millis(LOOK_INTERVAL_MS));
        }
        is_over.store(true, Ordering::Relaxed);
        asking.join().expect("every list is answered")
    });
    answers.sort();
    Siege {
        clients: clients.into_inner(),
        restarts,
        answers,
    }
}

fn stop_guests(server: &Server, guests: &[(String, Value)]) {
    for (id, _) in guests {
        let path = format!("/vms/{id}");
        // Some have ended.
        let stop = r#"{"action_type": "InstanceStop"}"#;
        server.call("PUT", &format!("{path}/actions"), stop);
        server.call("DELETE", &path, "");
    }
}

#[test]
#[ignore = "takes a quarter of an hour; `make siege`"]
fn hostile_clients_and_guests_neither_end_the_server_nor_disturb_quiet_vms() {
    if !kvm::is_present() {
        return;
    }
    samepage::limits::raise().expect("descriptors for a thousand clients");
    let mut server = Server::start(&[]);
    let group = MemoryGroup::new(LIMIT_BYTES).expect("a memory cgroup");
    group.adopt(server.pid());
    let disks = tempfile::tempdir().expect("room for disks");
    let quiet = start_quiet_vms(&server);
    let descriptors = open_descriptors(&server);

    let guests = rude_guests(&disks);
    wait_for_mischief(&server, &guests);
    let siege = besiege(&server, &guests);

    for id in &quiet {
        let (_, before) = errors_and_passes(&server, id);
        wait_until("it has verified once more", PATIENCE, || {
            let (errors, passes) = errors_and_passes(&server, id);
            assert_eq!(errors, 0, "{id}");
            passes > before
        });
    }
    stop_guests(&server, &guests);
    wait_until("nothing of them is left", PATIENCE, || {
        open_descriptors(&server) <= descriptors
    });
    let counters = group.counters();
    assert_eq!(counters.oom_kills().expect("counters"), 0);
    let answers = &siege.answers;
    println!(
        "{} clients, {} starts of rude guests, peak {} MiB; GET /vms {} times: p50 {:?}, p99 {:?}, \
         most {:?}",
        siege.clients,
        siege.restarts,
        counters.peak_bytes().expect("counters") >> 20,
        answers.len(),
        answers[answers.len() / 2],
        answers[answers.len() * 99 / 100],
        answers[answers.len() - 1],
    );
    assert_eq!(server.stop(Signal::TERM).code(), Some(0));
}
