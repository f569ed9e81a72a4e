//! A server whose merge domains are processes, and what a test asks of it.

use std::collections::BTreeSet;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::net::sockopt::socket_peercred;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::http::Connection;
use crate::server::Server;
use crate::tiny_kernel::KernelFile;
use crate::wait::{PATIENCE, wait_until};

/// A state directory. Monitors that are left in it end with the test.
#[derive(Debug)]
pub struct State(TempDir);

impl State {
    /// An empty one.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn empty() -> State {
        State(tempfile::tempdir().expect("a directory"))
    }

    /// Its path.
    ///
    /// # Panics
    /// If it is not text.
    pub fn path(&self) -> &str {
        self.0.path().to_str().expect("text")
    }

    /// A front door that leaves its monitors when it ends.
    pub fn serve(&self) -> Server {
        Server::start(&["--state-dir", self.path()])
    }

    /// What is kept of a domain.
    pub fn directory_of(&self, domain: &str) -> PathBuf {
        self.0.path().join("domains").join(domain)
    }

    /// Whether `said` is all that is kept of what a VM's console showed.
    pub fn has_tail(&self, domain: &str, id: &str, said: &[u8]) -> bool {
        let path = self.directory_of(domain).join("consoles").join(id);
        std::fs::read(path).is_ok_and(|tail| tail == said)
    }

    /// The monitor that listens on a domain's socket, by the kernel's word.
    ///
    /// # Panics
    /// If there is none.
    pub fn monitor(&self, domain: &str) -> Pid {
        peer(&self.directory_of(domain)).expect("a monitor")
    }

    /// The domains that have a directory.
    ///
    /// # Panics
    /// If that cannot be read.
    pub fn domains(&self) -> BTreeSet<String> {
        let entries = std::fs::read_dir(self.0.path().join("domains")).expect("domains");
        let names = entries.map(|entry| entry.expect("an entry").file_name());
        names
            .map(|name| name.into_string().expect("text"))
            .collect()
    }
}

impl Drop for State {
    fn drop(&mut self) {
        let domains = self.0.path().join("domains");
        for entry in std::fs::read_dir(domains).into_iter().flatten().flatten() {
            if let Some(pid) = peer(&entry.path()) {
                // It may have ended meanwhile.
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    }
}

fn peer(directory: &Path) -> Option<Pid> {
    let client = UnixStream::connect(directory.join("api.sock")).ok()?;
    socket_peercred(&client).ok().map(|peer| peer.pid)
}

/// Whether the process lives. One that has ended may still be there, if nobody asks for its status.
pub fn is_alive(pid: Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()));
    let stat = stat.unwrap_or_default();
    // Behind the name, which may hold anything: the state (`proc_pid_stat(5)`).
    let state = stat
        .rsplit_once(") ")
        .and_then(|(_, rest)| rest.chars().next());
    state.is_some_and(|state| !['Z', 'X'].contains(&state))
}

/// Kills a process, and waits until it is gone.
///
/// # Panics
/// If it does not go.
pub fn kill(pid: Pid) {
    kill_process(pid, Signal::KILL).expect("kill");
    wait_until("it is gone", PATIENCE, || !is_alive(pid));
}

/// A VM of a tiny kernel, by its domain.
pub fn config(kernel: &KernelFile, domain: Option<&str>) -> Value {
    let mut config: Value = json!({
        "boot-source": { "kernel_image_path": kernel.argument() },
        "machine-config": { "vcpu_count": 1, "mem_size_mib": 32 },
    });
    if let Some(domain) = domain {
        config["samepage"] = json!({ "merge_domain": domain });
    }
    config
}

/// Creates a VM.
///
/// # Panics
/// If that is refused.
pub fn create(server: &Server, id: &str, kernel: &KernelFile, domain: Option<&str>) {
    let config = config(kernel, domain).to_string();
    server.done("PUT", &format!("/vms/{id}"), &config);
}

/// Creates and starts a VM.
///
/// # Panics
/// If that is refused.
pub fn launch(server: &Server, id: &str, kernel: &KernelFile, domain: Option<&str>) {
    create(server, id, kernel, domain);
    act(server, id, "InstanceStart");
}

/// Has a VM do something.
///
/// # Panics
/// If that is refused.
pub fn act(server: &Server, id: &str, action: &str) {
    let action = json!({ "action_type": action }).to_string();
    server.done("PUT", &format!("/vms/{id}/actions"), &action);
}

/// Stops a VM if it runs, and removes it.
///
/// # Panics
/// If that is refused.
pub fn remove(server: &Server, id: &str) {
    if describe(server, id)["state"] == "Running" {
        act(server, id, "InstanceStop");
    }
    server.done("DELETE", &format!("/vms/{id}"), "");
}

/// What is told of a VM.
pub fn describe(server: &Server, id: &str) -> Value {
    server.call("GET", &format!("/vms/{id}"), "").json()
}

/// Waits until a VM is told to have lost its monitor.
///
/// # Panics
/// If it is not.
pub fn wait_crashed(server: &Server, id: &str) {
    wait_until("the crash is told", PATIENCE, || {
        describe(server, id)["end_reason"] == "crashed"
    });
}

/// Waits until the listed VMs are in these states, by id.
///
/// # Panics
/// If they are not.
pub fn wait_states(server: &Server, wanted: &[(&str, &str)]) {
    let mut states = Vec::new();
    let text = |vm: &Value, key: &str| vm[key].as_str().expect("text").to_owned();
    // A monitor that a loaded host did not let answer in time is listed as unknown.
    wait_until(&format!("states are {wanted:?}"), PATIENCE, || {
        let vms = server.call("GET", "/vms", "").json();
        let vms = vms.as_array().expect("an array").iter();
        states = vms
            .map(|vm| (text(vm, "id"), text(vm, "state")))
            .collect::<Vec<_>>();
        let states = states.iter().map(|(id, state)| (&**id, &**state));
        states.eq(wanted.iter().copied())
    });
}

/// A stream of a VM's console.
///
/// # Panics
/// If that is refused.
pub fn open_stream(server: &Server, id: &str) -> Connection {
    let mut connection = server.connect();
    let request = format!(
        "GET /vms/{id}/console HTTP/1.1\r\nHost: localhost\r\n\
         Connection: Upgrade\r\nUpgrade: samepage-console\r\n\r\n"
    );
    connection.send(request.as_bytes()).expect("send a request");
    assert_eq!(connection.reply().status, 101);
    connection
}
