//! Files that the server writes for itself or its clients: logs, metrics, standard error, the ends of
//! consoles.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, symlink};
use std::path::Path;

use rustix::process::Signal;
use samepage_tests::domains::State;
use samepage_tests::kvm;
use samepage_tests::server::Server;
use samepage_tests::wait::{PATIENCE, wait_until};
use serde_json::json;

use crate::held_file::{self, HeldFile, Reads, Silence};
use crate::{Host, plain_disk};

const FLUSH: &str = r#"{"action_type": "FlushMetrics"}"#;
/// More than a domain has places for.
const MANY: usize = 100;

fn empty_file() -> HeldFile {
    HeldFile::mount(Vec::new(), Reads::Direct)
}

fn log_to(host: &Host, id: &str, path: &Path) -> u16 {
    let body = json!({"log_path": path}).to_string();
    host.server
        .call("PUT", &format!("/vms/{id}/logger"), &body)
        .status
}

#[test]
fn a_log_and_metrics_that_cannot_be_written_hold_up_no_request_and_are_written_later() {
    if !kvm::is_present() {
        return;
    }
    let mut host = Host::start();
    let (log, metrics) = (empty_file(), empty_file());
    let disk = plain_disk();
    host.launch("hung", &host.reader_of(disk.path()));
    host.wait_done("hung");
    assert_eq!(log_to(&host, "hung", log.path()), 204);
    let body = json!({"metrics_path": metrics.path()}).to_string();
    host.server.done("PUT", "/vms/hung/metrics", &body);
    for file in [&log, &metrics] {
        file.hold(Silence::Writes);
    }
    for _ in 0..MANY {
        host.server.done("PUT", "/vms/hung/actions", FLUSH);
        assert_eq!(host.server.call("GET", "/vms/hung", "").status, 200);
    }
    assert!(log.is_waited_for() && metrics.is_waited_for());
    host.assert_neighbours_are_well("well");
    host.stop_vm("hung");
    host.server.done("DELETE", "/vms/hung", "");

    let lines = |file: &HeldFile| String::from_utf8_lossy(&file.content()).lines().count();
    for file in [&log, &metrics] {
        file.let_go();
        wait_until("all is written", PATIENCE, || lines(file) > MANY - 1);
    }
    host.create("again", &host.reader_of(host.plain.path()));
    assert_eq!(log_to(&host, "again", log.path()), 204);
    log.hold(Silence::Writes);
    host.server.call("GET", "/vms/again", "");
    wait_until("its log is written", PATIENCE, || log.is_waited_for());
    host.server.signal(Signal::TERM);
    let socket = host.server.socket();
    wait_until("the server's socket is gone", PATIENCE, || !socket.exists());
    log.let_go();
    assert_eq!(host.server.stop(Signal::TERM).code(), Some(0));
}

#[test]
fn logs_that_cannot_be_closed_hold_up_nobody_and_are_few() {
    if !kvm::is_present() {
        return;
    }
    let host = Host::start();
    for id in ["a", "b"] {
        host.create(id, &host.reader_of(host.plain.path()));
    }
    let log = empty_file();
    log.hold(Silence::Closing);
    let given = (0..MANY).take_while(|_| log_to(&host, "a", log.path()) == 204);
    assert_eq!(given.count(), 8);
    let refused = json!({"log_path": log.path()}).to_string();
    let refused = host.server.call("PUT", "/vms/a/logger", &refused);
    assert!(refused.fault().contains("8 files"), "{}", refused.fault());
    assert_eq!(log_to(&host, "b", log.path()), 204);
    host.server.done("DELETE", "/vms/b", "");
    host.assert_neighbours_are_well("well");
    log.let_go();
    wait_until("logs are taken again", PATIENCE, || {
        log_to(&host, "a", log.path()) == 204
    });
}

/// A named pipe that is a server's standard error, and that nobody reads.
fn fill(pipe: &Path) -> File {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK);
    let mut file = options.open(pipe).expect("the pipe");
    while file.write(&[b'x'; 4096]).is_ok() {}
    while file.write(b"x").is_ok() {}
    file
}

#[test]
fn a_standard_error_that_nobody_reads_holds_up_neither_requests_nor_the_end_of_the_server() {
    if !kvm::is_present() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let pipe = directory.path().join("stderr");
    let fifo = rustix::fs::FileType::Fifo;
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, fifo, mode, 0).unwrap();
    let preparation = format!("export RUST_LOG=debug\nexec 2<>{}", pipe.display());
    let mut host = Host::of(Server::start_after(&preparation, &["--domain", "ci"]));
    let _full = fill(&pipe);
    for _ in 0..MANY {
        assert_eq!(host.server.call("GET", "/vms", "").status, 200);
    }
    host.assert_neighbours_are_well("well");
    assert_eq!(host.server.stop(Signal::TERM).code(), Some(0));
}

#[test]
fn the_end_of_a_console_that_cannot_be_kept_holds_up_neither_its_vm_nor_others() {
    if !kvm::is_present() {
        return;
    }
    held_file::own_mounts();
    let state = State::empty();
    let consoles = state.directory_of("ci").join("consoles");
    let mut private = std::fs::DirBuilder::new();
    private
        .recursive(true)
        .mode(0o700)
        .create(&consoles)
        .unwrap();
    let arguments = [
        "--state-dir",
        state.path(),
        "--domain",
        "ci",
        "--stop-all-on-exit",
    ];
    let host = Host::of(Server::start(&arguments));
    let tail = empty_file();
    symlink(tail.path(), consoles.join("hung")).unwrap();
    tail.hold(Silence::Writes);
    let disk = plain_disk();
    host.launch("hung", &host.reader_of(disk.path()));
    wait_until("its tail is written", PATIENCE, || tail.is_waited_for());
    host.wait_done("hung");
    host.assert_neighbours_are_well("well");
    host.stop_vm("hung");
    tail.let_go();
    wait_until("its tail is kept", PATIENCE, || {
        String::from_utf8_lossy(&tail.content()).contains("done")
    });
    host.server.done("DELETE", "/vms/hung", "");
}
