//! Linux and its host have streams between them: virtio-vsock.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;
use std::time::Duration;

use rustix::io::ioctl_fionread;
use rustix::process::Signal;
use samepage_tests::domains::State;
use samepage_tests::refusal::assert_refused;
use samepage_tests::server::Server;
use samepage_tests::wait::wait_until;
use samepage_tests::{debian, kvm};
use serde_json::{Value, json};

/// Bytes of each direction. A host that emulates the guest's kernel mode moves some 200 KB in a second.
const SOME_BYTES: usize = 2 << 20;
const MANY_BYTES: usize = 100 << 20;
/// Unread bytes after which a reader has stalled.
const STALLED_BYTES: u64 = 64 << 10;
const START: &str = r#"{"action_type": "InstanceStart"}"#;

/// Serves one connection to port 1234, which gets all that it sends. Then sends as many bytes of its
/// own to the host's port 5000, and gets them back.
const GUEST: &str = "
import hashlib, os, socket, threading
listener = socket.socket(socket.AF_VSOCK)
listener.bind((socket.VMADDR_CID_ANY, 1234))
listener.listen()
echo, _ = listener.accept()
length = 0
while data := echo.recv(65536):
    length += len(data)
    echo.sendall(data)
echo.close()
host = socket.socket(socket.AF_VSOCK)
host.connect((socket.VMADDR_CID_HOST, 5000))
own = os.urandom(length)
sender = threading.Thread(target=lambda: (host.sendall(own), host.shutdown(socket.SHUT_WR)))
sender.start()
back = hashlib.sha256()
while data := host.recv(65536):
    back.update(data)
sender.join()
same = back.digest() == hashlib.sha256(own).digest()
print('own bytes came back:', same, length)
";

/// A Debian guest that runs [`GUEST`], as a configuration with its files in `directory`.
fn config(directory: &Path) -> Value {
    let script = directory.join("script");
    // Whole sectors of text.
    let length = GUEST.len().next_multiple_of(512);
    std::fs::write(&script, format!("{GUEST:\n<length$}")).expect("a file");
    let guest = debian::guest();
    json!({
        "boot-source": {
            "kernel_image_path": guest.vmlinux,
            "boot_args": "console=ttyS0 quiet init=/usr/sbin/samepage-init \
                samepage.run=\"python3 /dev/vdb\"",
        },
        "drives": [
            {"drive_id": "rootfs", "path_on_host": guest.rootfs,
                "is_root_device": true, "is_read_only": true},
            {"drive_id": "script", "path_on_host": script,
                "is_root_device": false, "is_read_only": true},
        ],
        "machine-config": {"vcpu_count": 1, "mem_size_mib": debian::MEM_SIZE_MIB},
    })
}

fn vsock(directory: &Path) -> Value {
    json!({"guest_cid": 3, "uds_path": directory.join("v")})
}

fn small(vsock: &Value) -> String {
    let config = json!({
        "boot-source": {"kernel_image_path": "builtin:pageload"},
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 32},
        "vsock": vsock,
    });
    config.to_string()
}

fn console(server: &Server) -> String {
    let console = server.call("GET", "/vms/a/console", "").body;
    String::from_utf8_lossy(&console).replace('\r', "")
}

fn set_state(server: &Server, state: &str) {
    let body = json!({"state": state}).to_string();
    server.done("PATCH", "/vms/a/vm", &body);
}

/// A connection to the guest's port 1234, as soon as somebody listens there.
fn connect(server: &Server, path: &Path) -> UnixStream {
    let mut connected = None;
    wait_until("the guest takes a connection", debian::PATIENCE, || {
        let state = server.call("GET", "/vms/a", "").json()["state"].clone();
        assert_eq!(state, "Running", "{}", console(server));
        let mut stream = UnixStream::connect(path).expect("the socket is there");
        stream.write_all(b"CONNECT 1234\n").expect("a line");
        let mut answer = String::new();
        let mut reader = BufReader::with_capacity(1, stream);
        let heard = reader.read_line(&mut answer);
        if heard.is_ok() && answer.starts_with("OK ") {
            connected = Some(reader.into_inner());
        }
        connected.is_some()
    });
    connected.expect("connected")
}

/// Bytes of which no page is like another.
fn data(length_bytes: usize) -> Vec<u8> {
    let words = (1..).map(|word: u64| word.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    words
        .take(length_bytes / 8)
        .flat_map(u64::to_le_bytes)
        .collect()
}

#[test]
fn linux_echoes_and_is_echoed_while_readers_stall_and_the_vm_is_paused() {
    if kvm::is_present() {
        echo_both_ways(SOME_BYTES, debian::PATIENCE);
    }
}

#[test]
#[ignore = "half an hour where the guest's kernel mode is emulated"]
fn linux_echoes_and_is_echoed_100_mib() {
    if kvm::is_present() {
        echo_both_ways(MANY_BYTES, 12 * debian::PATIENCE);
    }
}

fn echo_both_ways(length_bytes: usize, patience: Duration) {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("v");
    let servers = UnixListener::bind(directory.path().join("v_5000")).expect("a socket");
    let server = Server::start(&[]);
    server.done("PUT", "/vms/a", &config(directory.path()).to_string());
    let device = vsock(directory.path()).to_string();
    server.done("PUT", "/vms/a/vsock", &device);
    server.done("PUT", "/vms/a/actions", START);

    let mut stream = connect(&server, &path);
    stream.set_read_timeout(Some(patience)).expect("a socket");
    let sent = data(length_bytes);
    let mut writer = stream.try_clone().expect("a descriptor");
    let bytes = sent.clone();
    let writer = thread::spawn(move || {
        writer.write_all(&bytes)?;
        writer.shutdown(std::net::Shutdown::Write)
    });
    stall(&server, &stream);
    let mut got = Vec::new();
    stream.read_to_end(&mut got).expect("the guest echoes");
    assert!(got == sent, "{} other bytes of {length_bytes}", got.len());
    writer.join().expect("no panic").expect("all was taken");

    // The other way round.
    let (mut peer, _) = servers.accept().expect("the guest connects");
    peer.set_read_timeout(Some(patience)).expect("a socket");
    stall(&server, &peer);
    let mut writer = peer.try_clone().expect("a descriptor");
    io::copy(&mut peer, &mut writer).expect("the guest sends and receives");
    peer.shutdown(std::net::Shutdown::Write).expect("a socket");
    wait_until("the guest ends", patience, || {
        let state = server.call("GET", "/vms/a", "").json()["state"].clone();
        state != "Running"
    });
    let console = console(&server);
    let expected = format!("own bytes came back: True {length_bytes}");
    assert!(console.contains(&expected), "{console}");
    assert!(!path.exists(), "the socket goes with its VM");
}

/// Reads nothing until there is much to be read, and over a pause and a resume.
fn stall(server: &Server, stream: &UnixStream) {
    wait_until("the guest fills a socket", debian::PATIENCE, || {
        ioctl_fionread(stream).expect("a socket") >= STALLED_BYTES
    });
    set_state(server, "Paused");
    set_state(server, "Resumed");
}

#[test]
fn a_path_where_something_is_and_one_of_another_vm_are_refused_by_name() {
    if !kvm::is_present() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let mut server = Server::start(&[]);
    let mut config = small(&vsock(directory.path()));
    let path = directory.path().join("v");
    let named = format!("vsock.uds_path {path:?}: exists already");
    std::fs::write(&path, "of somebody else").expect("a file");
    assert_refused(&server, ("PUT", "/vms/a", &config, 400, &named));
    assert!(path.exists());
    std::fs::remove_file(&path).expect("a file");
    for id in ["a", "b"] {
        server.done("PUT", &format!("/vms/{id}"), &config);
    }
    assert!(!path.exists(), "before the start it is not there");
    server.done("PUT", "/vms/a/actions", START);
    assert_refused(&server, ("PUT", "/vms/b/actions", START, 400, &named));
    config = vsock(&directory.path().join("nowhere")).to_string();
    assert_refused(&server, ("PUT", "/vms/b/vsock", &config, 400, "nowhere"));
    let stop = r#"{"action_type": "InstanceStop"}"#;
    server.done("PUT", "/vms/a/actions", stop);
    assert!(!path.exists(), "it goes with its VM");
    server.done("PUT", "/vms/b/actions", START);
    assert!(server.stop(Signal::TERM).success());
    assert!(!path.exists(), "or with the server");
}

#[test]
fn a_server_that_locks_its_monitors_down_refuses_vsock() {
    if !kvm::is_present() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let state = State::empty();
    let server = state.serve();
    let device = vsock(directory.path());
    let refused = "vsock: not supported with --state-dir";
    let config = small(&device);
    assert_refused(&server, ("PUT", "/vms/a", &config, 400, refused));
    server.done("PUT", "/vms/a", &small(&Value::Null));
    let device = device.to_string();
    assert_refused(&server, ("PUT", "/vms/a/vsock", &device, 400, refused));
}
