//! `samepage monitor`: the process of one merge domain, started as a supervisor starts it.

use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};

use rustix::net::sockopt::socket_peercred;
use rustix::process::{Pid, Signal, kill_process};
use samepage_tests::http::{Connection, Reply};
use samepage_tests::tiny_kernel::{IDLE, KernelFile};
use samepage_tests::wait::{PATIENCE, wait_until};
use samepage_tests::{binary, kvm};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A monitor that ends with its test.
struct Monitor {
    child: Child,
    directory: TempDir,
}

impl Monitor {
    /// Starts one and waits until it is ready. What it is told then comes over its socket alone: the
    /// pipe that it said so on is closed.
    fn start(domain: &str) -> Monitor {
        let directory = tempfile::tempdir().expect("directory for the socket");
        let socket = UnixListener::bind(directory.path().join("s")).expect("bind");
        let mut child = Command::new(binary::samepage())
            .args(["monitor", "--domain", domain])
            .stdin(Stdio::from(OwnedFd::from(socket)))
            .stdout(Stdio::piped())
            .spawn()
            .expect("start the monitor");
        let mut line = String::new();
        let said = child.stdout.take().expect("its output");
        BufReader::new(said).read_line(&mut line).expect("a line");
        assert_eq!(line, "ready\n");
        Monitor { child, directory }
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("s")
    }

    fn pid(&self) -> Pid {
        let pid = i32::try_from(self.child.id()).expect("a pid");
        Pid::from_raw(pid).expect("a pid")
    }

    fn call(&self, method: &str, path: &str, body: &str) -> Reply {
        Connection::open(&self.socket()).call(method, path, body)
    }

    fn done(&self, method: &str, path: &str, body: &str) {
        let reply = self.call(method, path, body);
        let text = String::from_utf8_lossy(&reply.body).into_owned();
        assert_eq!(reply.status, 204, "{method} {path} {body}: {text}");
    }

    fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("signal the monitor");
    }

    fn wait_for_end(&mut self) -> ExitStatus {
        let mut ended = None;
        wait_until("the monitor ends", PATIENCE, || {
            ended = self.child.try_wait().expect("look at the monitor");
            ended.is_some()
        });
        ended.expect("a status")
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        // A no-op if it ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn config(kernel: &KernelFile, domain: Option<&str>) -> String {
    let mut config: Value = json!({
        "boot-source": { "kernel_image_path": kernel.argument() },
        "machine-config": { "vcpu_count": 1, "mem_size_mib": 32 },
    });
    if let Some(domain) = domain {
        config["samepage"] = json!({ "merge_domain": domain });
    }
    config.to_string()
}

#[test]
fn monitor_makes_vms_of_its_own_domain_and_of_no_other() {
    if !kvm::is_present() {
        return;
    }
    let monitor = Monitor::start("ci");
    let kernel = KernelFile::new(IDLE);
    monitor.done("PUT", "/vms/a", &config(&kernel, Some("ci")));
    for other in [Some("web"), None] {
        let refused = monitor.call("PUT", "/vms/b", &config(&kernel, other));
        assert_eq!(refused.status, 400);
        let fault = refused.fault();
        assert!(fault.contains("this monitor serves only ci"), "{fault}");
    }
    let vms = monitor.call("GET", "/vms", "").json();
    assert_eq!(vms.as_array().map(Vec::len), Some(1), "{vms}");
    // It stays when its last VM goes.
    monitor.done("DELETE", "/vms/a", "");
    let domains = monitor.call("GET", "/merge", "").json();
    let names: Vec<&String> = domains.as_object().expect("an object").keys().collect();
    assert_eq!(names, ["ci"]);
}

#[test]
fn monitor_of_a_vm_without_a_domain_makes_that_vm_alone() {
    if !kvm::is_present() {
        return;
    }
    let monitor = Monitor::start("vm:a");
    let kernel = KernelFile::new(IDLE);
    let refused = monitor.call("PUT", "/vms/b", &config(&kernel, None));
    assert_eq!(refused.status, 400, "{}", refused.fault());
    monitor.done("PUT", "/vms/a", &config(&kernel, None));
}

#[test]
fn monitor_names_itself_to_its_clients_though_another_process_bound_its_socket() {
    if !kvm::is_present() {
        return;
    }
    let monitor = Monitor::start("ci");
    let client = UnixStream::connect(monitor.socket()).expect("connect");
    let peer = socket_peercred(&client).expect("credentials");
    assert_eq!(peer.pid, monitor.pid());
}

#[test]
fn monitor_goes_on_without_its_parent_and_ends_in_order_when_it_is_told_to() {
    if !kvm::is_present() {
        return;
    }
    let mut monitor = Monitor::start("ci");
    let kernel = KernelFile::new(IDLE);
    monitor.done("PUT", "/vms/a", &config(&kernel, Some("ci")));
    let start = json!({ "action_type": "InstanceStart" }).to_string();
    monitor.done("PUT", "/vms/a/actions", &start);
    // What a terminal sends to all of its programs when it is interrupted, and closed.
    monitor.signal(Signal::INT);
    monitor.signal(Signal::HUP);
    let vm = monitor.call("GET", "/vms/a", "").json();
    assert_eq!(vm["state"], "Running");
    monitor.signal(Signal::TERM);
    assert_eq!(monitor.wait_for_end().code(), Some(0));
    let late = UnixStream::connect(monitor.socket()).expect_err("nobody listens");
    assert_eq!(late.kind(), std::io::ErrorKind::ConnectionRefused);
}

#[test]
fn monitor_without_a_socket_says_so() {
    let output = Command::new(binary::samepage())
        .args(["monitor", "--domain", "ci"])
        .stdin(Stdio::null())
        .output()
        .expect("run samepage");
    assert_eq!(output.status.code(), Some(1));
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(
        told,
        "samepage: error: standard input: is not a unix socket to listen on\n"
    );
    assert!(output.stdout.is_empty());
}
