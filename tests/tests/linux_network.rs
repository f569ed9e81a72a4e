//! Linux on a network: a tap device in a network namespace of the test's own.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use samepage_tests::refusal::assert_refused;
use samepage_tests::server::Server;
use samepage_tests::wait::wait_until;
use samepage_tests::{kvm, linux};
use serde_json::json;

/// Bytes of each direction. A host that emulates the guest's kernel mode moves some 200 KB in a second.
const SOME_BYTES: usize = 2 << 20;
const MANY_BYTES: usize = 100 << 20;
const START: &str = r#"{"action_type": "InstanceStart"}"#;

/// Fetches a file as soon as the host's end is up, says what it is, then serves its disk.
const GUEST: &str = "ip addr add 192.0.2.2/24 dev eth0; ip link set eth0 up; \
     cat /sys/class/net/eth0/address /sys/class/net/eth0/mtu; \
     until wget -q -O /dev/null http://192.0.2.1:8080/small; do sleep 1; done; \
     wget -q -O - http://192.0.2.1:8080/data | sha256sum; \
     nc -l -p 9000 < /dev/vda; echo served: $?";

/// A server in a network namespace that has nothing but a loopback device.
fn server_in_a_namespace() -> Server {
    assert!(
        rustix::process::geteuid().is_root(),
        "this test makes a network namespace and a tap device, which needs root"
    );
    Server::start_after("exec unshare --net \"$@\"", &[])
}

/// A command in the namespace of the server.
fn beside(server: &Server, arguments: &[&str]) -> Command {
    let mut command = Command::new("nsenter");
    let pid = server.pid().to_string();
    command.args(["--target", &pid, "--net", "busybox"]);
    command.args(arguments);
    command
}

fn succeeds(mut command: Command) {
    let output = command.output().expect("run a command");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{command:?}: {text}");
}

/// A process that ends with the test.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _gone = self.0.kill();
        let _status = self.0.wait();
    }
}

/// Fetches what the guest serves, as far as it does now.
fn fetch(server: &Server, to: &Path, patience: Duration) -> u64 {
    let file = File::create(to).expect("a file");
    let seconds = patience.as_secs().to_string();
    let mut client = beside(server, &["timeout", &seconds, "nc", "192.0.2.2", "9000"])
        .stdin(Stdio::piped())
        .stdout(file)
        .stderr(Stdio::null())
        .spawn()
        .expect("run busybox nc");
    // Open until the guest has sent all: at its end busybox would close its half.
    let stdin = client.stdin.take();
    client.wait().expect("the client ends");
    drop(stdin);
    to.metadata().expect("the file is there").len()
}

/// Bytes of which no page is like another.
fn data(length_bytes: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    });
    words
        .take(length_bytes / 8)
        .flat_map(u64::to_le_bytes)
        .collect()
}

#[test]
fn linux_fetches_and_serves_data_over_its_network_interface() {
    if kvm::is_present() {
        fetch_and_serve(SOME_BYTES, linux::PATIENCE);
    }
}

#[test]
#[ignore = "half an hour where the guest's kernel mode is emulated"]
fn linux_fetches_and_serves_100_mib_over_its_network_interface() {
    if kvm::is_present() {
        fetch_and_serve(MANY_BYTES, 12 * linux::PATIENCE);
    }
}

/// A guest whose memory is merged fetches so many bytes by TCP, and serves as many.
fn fetch_and_serve(length_bytes: usize, patience: Duration) {
    let directory = tempfile::tempdir().expect("a directory");
    let path = |name: &str| directory.path().join(name);
    let data = data(length_bytes);
    std::fs::write(path("data"), &data).expect("a file");
    std::fs::write(path("small"), "small").expect("a file");
    let server = server_in_a_namespace();

    let mut config = linux::running(GUEST);
    let drive = json!([{"drive_id": "data", "path_on_host": path("data"),
        "is_root_device": false, "is_read_only": true}]);
    config.drives = serde_json::from_value(drive).expect("a drive");
    let config = serde_json::to_string(&config).expect("a configuration");
    server.done("PUT", "/vms/a", &config);
    let interface = json!({"iface_id": "eth0", "host_dev_name": "tap0", "mtu": 1400,
        "guest_mac": "06:00:ac:10:00:02"});
    server.done(
        "PUT",
        "/vms/a/network-interfaces/eth0",
        &interface.to_string(),
    );
    server.done("PUT", "/vms/a/actions", START);

    succeeds(beside(
        &server,
        &["ip", "addr", "add", "192.0.2.1/24", "dev", "tap0"],
    ));
    succeeds(beside(
        &server,
        &["ip", "link", "set", "tap0", "mtu", "1400", "up"],
    ));
    let files = directory.path().to_str().expect("a path of text");
    let serve = ["httpd", "-f", "-p", "192.0.2.1:8080", "-h", files];
    let _httpd = Ended(beside(&server, &serve).spawn().expect("run busybox httpd"));

    let console = || {
        let console = server.call("GET", "/vms/a/console", "").body;
        String::from_utf8_lossy(&console).replace('\r', "")
    };
    let fetched = path("fetched");
    wait_until("the guest serves its disk", patience, || {
        let state = server.call("GET", "/vms/a", "").json()["state"].clone();
        assert_eq!(state, "Running", "{}", console());
        fetch(&server, &fetched, patience) == length_bytes as u64
    });
    assert!(
        std::fs::read(&fetched).expect("a file") == data,
        "other bytes"
    );
    wait_until("the guest ends", linux::PATIENCE, || {
        let state = server.call("GET", "/vms/a", "").json()["state"].clone();
        state != "Running"
    });
    let sum = beside(&server, &["sha256sum"])
        .stdin(File::open(path("data")).expect("a file"))
        .output()
        .expect("run busybox sha256sum");
    let sum = String::from_utf8(sum.stdout).expect("text");
    let console = console();
    for expected in ["\n06:00:ac:10:00:02\n1400\n", &sum, "\nserved: 0\n"] {
        assert!(console.contains(expected), "no {expected:?} in: {console}");
    }
}

#[test]
fn limits_are_changed_while_the_vm_runs_and_only_then() {
    if !kvm::is_present() {
        return;
    }
    let server = server_in_a_namespace();
    let bucket = json!({"size": 1000, "refill_time": 100});
    let config = json!({
        "boot-source": {"kernel_image_path": "builtin:pageload"},
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 32},
        "network-interfaces": [{"iface_id": "eth0", "host_dev_name": "tap0",
            "rx_rate_limiter": {"bandwidth": bucket}}],
    });
    server.done("PUT", "/vms/a", &config.to_string());
    let path = "/vms/a/network-interfaces/eth0";
    let patch = json!({"iface_id": "eth0", "rx_rate_limiter": {"ops": bucket}}).to_string();
    assert_refused(&server, ("PATCH", path, &patch, 400, "not running"));
    server.done("PUT", "/vms/a/actions", START);
    server.done("PATCH", path, &patch);
    let config = server.call("GET", "/vms/a/config", "").json();
    let limiter = &config["network-interfaces"][0]["rx_rate_limiter"];
    assert_eq!(limiter, &json!({"bandwidth": bucket, "ops": bucket}));
    let other = json!({"iface_id": "eth1"}).to_string();
    let beside = "/vms/a/network-interfaces/eth1";
    assert_refused(&server, ("PATCH", beside, &other, 400, "eth1"));
    assert_refused(&server, ("PATCH", path, &other, 400, "eth1"));
}

#[test]
fn a_network_device_that_is_no_tap_is_refused_before_the_start() {
    if !kvm::is_present() {
        return;
    }
    let server = server_in_a_namespace();
    let interface = json!({"iface_id": "eth0", "host_dev_name": "lo"});
    let mut config = json!({
        "boot-source": {"kernel_image_path": "builtin:pageload"},
        "network-interfaces": [interface],
    });
    let named = "network-interfaces[eth0].host_dev_name lo";
    assert_refused(&server, ("PUT", "/vms/a", &config.to_string(), 400, named));
    config["network-interfaces"] = json!([]);
    server.done("PUT", "/vms/a", &config.to_string());
    let path = "/vms/a/network-interfaces/eth0";
    assert_refused(&server, ("PUT", path, &interface.to_string(), 400, named));
    let kept = server.call("GET", "/vms/a/config", "").json();
    assert!(kept.get("network-interfaces").is_none(), "{kept}");
}

#[test]
fn a_tap_device_of_another_vm_is_refused_by_its_name() {
    if !kvm::is_present() {
        return;
    }
    let server = server_in_a_namespace();
    let config = json!({
        "boot-source": {"kernel_image_path": "builtin:pageload"},
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 32},
        "network-interfaces": [{"iface_id": "eth0", "host_dev_name": "tap0"}],
    });
    for id in ["a", "b"] {
        server.done("PUT", &format!("/vms/{id}"), &config.to_string());
    }
    server.done("PUT", "/vms/a/actions", START);
    let reply = server.call("PUT", "/vms/b/actions", START);
    let fault = reply.fault();
    assert_eq!(reply.status, 409, "{fault}");
    let named = "network-interfaces[eth0].host_dev_name tap0";
    assert!(fault.contains(named), "{fault}");
    // With its VM the device is gone, or free again.
    server.done(
        "PUT",
        "/vms/a/actions",
        r#"{"action_type": "InstanceStop"}"#,
    );
    server.done("PUT", "/vms/b/actions", START);
}
