//! Each VM's own socket, on which it has Firecracker's API for itself.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use samepage_tests::domains::State;
use samepage_tests::http::{Connection, Reply};
use samepage_tests::kvm;
use samepage_tests::server::Server;
use samepage_tests::tiny_kernel::{self, KernelFile};
use samepage_tests::wait::{PATIENCE, wait_until};
use serde_json::{Value, json};
use tempfile::TempDir;

const START: &str = r#"{"action_type": "InstanceStart"}"#;
const STOP: &str = r#"{"action_type": "InstanceStop"}"#;

/// A server with a socket for each VM.
struct Host {
    server: Server,
    directory: TempDir,
}

impl Host {
    fn start() -> Host {
        let directory = tempfile::tempdir().expect("a directory");
        let sockets = directory.path().to_str().expect("text");
        let server = Server::start(&["--vm-sockets", sockets]);
        Host { server, directory }
    }

    fn socket(&self, id: &str) -> PathBuf {
        self.directory.path().join(format!("{id}.sock"))
    }

    /// A VM without anything, and its socket.
    fn empty_vm(&self, id: &str) -> VmSocket {
        self.server.done("PUT", &format!("/vms/{id}"), "{}");
        VmSocket(self.socket(id))
    }
}

struct VmSocket(PathBuf);

impl VmSocket {
    fn call(&self, method: &str, path: &str, body: &str) -> Reply {
        Connection::open(&self.0).call(method, path, body)
    }

    fn get(&self, path: &str) -> Value {
        let reply = self.call("GET", path, "");
        assert_eq!(reply.status, 200, "{path}: {}", reply.json());
        reply.json()
    }

    fn done(&self, method: &str, path: &str, body: &Value) {
        let reply = self.call(method, path, &body.to_string());
        let text = String::from_utf8_lossy(&reply.body).into_owned();
        assert_eq!(reply.status, 204, "{method} {path} {body}: {text}");
    }

    /// As Firecracker refuses everything.
    fn refused(&self, method: &str, path: &str, body: &str) -> String {
        let reply = self.call(method, path, body);
        assert_eq!(reply.status, 400, "{method} {path} {body}");
        reply.fault()
    }
}

fn fields(value: &Value) -> Vec<&str> {
    let object = value.as_object().expect("an object");
    object.keys().map(String::as_str).collect()
}

#[test]
fn a_vm_is_configured_piece_by_piece_and_driven_over_its_own_socket() {
    if !kvm::is_present() {
        return;
    }
    let host = Host::start();
    let kernel = KernelFile::new(tiny_kernel::IDLE);
    let vm = host.empty_vm("a");
    let mode = std::fs::metadata(&vm.0).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let instance = vm.get("/");
    assert_eq!(
        fields(&instance),
        ["app_name", "id", "state", "vmm_version"]
    );
    assert_eq!(instance["state"], "Not started");
    assert_eq!(fields(&vm.get("/version")), ["firecracker_version"]);

    let fault = vm.refused("PUT", "/actions", START);
    assert!(fault.contains("boot-source"), "{fault}");
    let machine = json!({"vcpu_count": 1, "mem_size_mib": 32});
    vm.done("PUT", "/machine-config", &machine);
    vm.done("PATCH", "/machine-config", &json!({"mem_size_mib": 48}));
    let boot = json!({"kernel_image_path": kernel.argument(), "boot_args": "quiet"});
    vm.done("PUT", "/boot-source", &boot);
    let disk = host.directory.path().join("disk");
    std::fs::write(&disk, vec![0; 4096]).unwrap();
    let drive = json!({"drive_id": "data", "path_on_host": disk, "is_root_device": false});
    vm.done("PUT", "/drives/data", &drive);
    vm.done("PUT", "/entropy", &json!({}));

    vm.done("PUT", "/actions", &json!({"action_type": "InstanceStart"}));
    assert_eq!(vm.get("/")["state"], "Running");
    vm.done("PATCH", "/vm", &json!({"state": "Paused"}));
    assert_eq!(vm.get("/")["state"], "Paused");
    vm.done("PATCH", "/vm", &json!({"state": "Resumed"}));
    let machine = vm.get("/machine-config");
    assert_eq!(machine["mem_size_mib"], 48);
    let config = vm.get("/vm/config");
    assert_eq!(config["boot-source"], boot);
    assert_eq!(config["drives"][0]["drive_id"], "data");
    assert_eq!(config["machine-config"], machine);
    assert!(config.get("samepage").is_none(), "{config}");
    for (path, body) in [("/machine-config", &machine), ("/boot-source", &boot)] {
        let fault = vm.refused("PUT", path, &body.to_string());
        assert!(fault.contains("already started"), "{fault}");
    }

    host.server.done("PUT", "/vms/a/actions", STOP);
    let fault = vm.refused("GET", "/", "");
    assert!(fault.contains("Ended"), "{fault}");
    host.server.done("DELETE", "/vms/a", "");
    assert!(!vm.0.exists());
}

#[test]
fn a_part_that_is_refused_leaves_what_was_set_before() {
    if !kvm::is_present() {
        return;
    }
    let host = Host::start();
    let kernel = KernelFile::new(tiny_kernel::IDLE);
    let vm = host.empty_vm("a");
    let boot = json!({"kernel_image_path": kernel.argument()});
    vm.done("PUT", "/boot-source", &boot);
    let machine = json!({"vcpu_count": 1, "mem_size_mib": 32});
    vm.done("PUT", "/machine-config", &machine);
    let before = vm.get("/vm/config");
    for (method, path, body, named) in [
        (
            "PUT",
            "/boot-source",
            r#"{"kernel_image_path": "/nowhere"}"#,
            "/nowhere",
        ),
        (
            "PUT",
            "/boot-source",
            r#"{"kernel_image_path": ""}"#,
            "empty",
        ),
        (
            "PUT",
            "/machine-config",
            r#"{"vcpu_count": 0, "mem_size_mib": 32}"#,
            "vcpu_count",
        ),
        (
            "PATCH",
            "/machine-config",
            r#"{"vcpu_count": 3, "smt": true}"#,
            "vcpu_count",
        ),
        ("PATCH", "/machine-config", "{}", "nothing"),
        (
            "PUT",
            "/drives/d",
            r#"{"drive_id": "d", "path_on_host": "/nowhere", "is_root_device": false}"#,
            "/nowhere",
        ),
        (
            "PUT",
            "/vsock",
            r#"{"guest_cid": 2, "uds_path": "v"}"#,
            "vsock.guest_cid: 2",
        ),
        ("PUT", "/machine-config", "{", "malformed"),
        ("PUT", "/colour", "{}", "/colour"),
        ("POST", "/vm", "{}", "method"),
    ] {
        let fault = vm.refused(method, path, body);
        assert!(fault.contains(named), "{method} {path}: {fault}");
    }
    assert_eq!(vm.get("/vm/config"), before);
    vm.done("PUT", "/actions", &json!({"action_type": "InstanceStart"}));
}

#[test]
fn a_vms_socket_reaches_no_other_vm_and_removes_none() {
    if !kvm::is_present() {
        return;
    }
    let host = Host::start();
    let vm = host.empty_vm("a");
    let _other = host.empty_vm("b");
    vm.refused("DELETE", "/", "");
    vm.refused("PUT", "/", "{}");
    for path in ["/vms", "/vms/b", "/merge/vm:b", "/../b", "/%2e%2e/b"] {
        vm.refused("GET", path, "");
    }
    vm.refused("PUT", "/../b/actions", START);
    let vms = host.server.call("GET", "/vms", "").json();
    assert_eq!(vms.as_array().unwrap().len(), 2);
}

/// What `firecracker-rs-sdk` does: one connection, HTTP/1.0, and each reply read in pieces of 64 bytes
/// until one is short.
#[test]
fn a_client_that_reads_pieces_of_64_bytes_over_http_1_0_gets_its_replies() {
    if !kvm::is_present() {
        return;
    }
    let host = Host::start();
    let vm = host.empty_vm("a");
    let mut stream = UnixStream::connect(&vm.0).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let body = r#"{"vcpu_count": 1, "mem_size_mib": 32}"#;
    for _ in 0..3 {
        let length = body.len();
        let head = format!("PUT /machine-config HTTP/1.0\r\nContent-Length: {length}\r\n\r\n");
        stream.write_all((head + body).as_bytes()).unwrap();
        let mut reply = Vec::new();
        loop {
            let mut piece = [0; 64];
            let length = stream.read(&mut piece).unwrap();
            reply.extend(&piece[..length]);
            if length < piece.len() {
                break;
            }
        }
        let reply = String::from_utf8(reply).unwrap();
        assert!(reply.starts_with("HTTP/1.1 204 "), "{reply}");
        assert!(!reply.to_lowercase().contains("date:"), "{reply}");
    }
}

#[test]
fn sockets_come_back_with_the_front_door_and_what_was_set_stays() {
    if !kvm::is_present() {
        return;
    }
    let state = State::empty();
    let server = state.serve();
    server.done("PUT", "/vms/a", "{}");
    let vm = VmSocket(Path::new(state.path()).join("vms/a.sock"));
    let machine = json!({"vcpu_count": 1, "mem_size_mib": 48});
    vm.done("PUT", "/machine-config", &machine);
    drop(server);
    UnixStream::connect(&vm.0).unwrap_err();
    let server = state.serve();
    wait_until("the socket is back", PATIENCE, || {
        UnixStream::connect(&vm.0).is_ok()
    });
    assert_eq!(vm.get("/machine-config")["mem_size_mib"], 48);
    server.done("DELETE", "/vms/a", "");
    assert!(!vm.0.exists());
}
