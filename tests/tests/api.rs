//! The REST API, against a real server process.

use std::os::unix::fs::PermissionsExt;

use rustix::process::Signal;
use samepage_tests::kvm;
use samepage_tests::refusal::assert_refused;
use samepage_tests::server::Server;
use samepage_tests::wait::{PATIENCE, wait_until};
use serde_json::json;

const START: &str = r#"{"action_type": "InstanceStart"}"#;
const STOP: &str = r#"{"action_type": "InstanceStop"}"#;

/// A config of the embedded guest, with or without a merge domain.
fn pageload(merge_domain: Option<&str>) -> String {
    let config = json!({
        "boot-source": {"kernel_image_path": "builtin:pageload"},
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 32},
        "samepage": {"merge_domain": merge_domain},
    });
    config.to_string()
}

#[test]
fn wrong_requests_are_refused_with_a_fitting_status() {
    if !kvm::is_present() {
        return;
    }
    let server = Server::start(&["--domain", "ci"]);
    let config = pageload(None);
    let unknown = r#"{"boot-source": {"kernel_image_path": "k"}, "colour": 1}"#;
    let no_kernel = r#"{"boot-source": {"kernel_image_path": "/nowhere/vmlinux"}}"#;
    let bad_merge = r#"{"boot-source": {"kernel_image_path": "builtin:pageload"},
        "samepage": {"merge": "fast"}}"#;
    let no_vcpu = r#"{"boot-source": {"kernel_image_path": "builtin:pageload"},
        "machine-config": {"vcpu_count": 0, "mem_size_mib": 32}}"#;
    let refusals = [
        (
            "PUT",
            "/vms/new",
            "{\"boot-source\": ",
            400,
            "malformed JSON",
        ),
        ("PUT", "/vms/new", "", 400, "JSON"),
        ("PUT", "/vms/new", unknown, 400, "colour"),
        ("PUT", "/vms/new", no_vcpu, 400, "vcpu_count"),
        (
            "PUT",
            "/vms/new",
            bad_merge,
            400,
            r#""fast", expected merge to be true, false or "ksm""#,
        ),
        ("PUT", "/vms/new", no_kernel, 400, "/nowhere/vmlinux"),
        ("PUT", "/vms/n.w", &config, 400, "n.w"),
        ("GET", "/nothing", "", 404, "/nothing"),
        ("POST", "/vms", "{}", 405, "GET"),
        ("DELETE", "/merge", "", 405, "GET"),
        ("GET", "/vms", "{}", 400, "body"),
        (
            "PUT",
            "/vms/new/actions",
            r#"{"action_type": "Dance"}"#,
            400,
            "Dance",
        ),
        ("PATCH", "/merge/ci", r#"{"run": "walk"}"#, 400, "walk"),
        ("PATCH", "/merge/ci", r#"{"speed": 1}"#, 400, "speed"),
        (
            "PATCH",
            "/merge/ci",
            r#"{"pages_to_scan": 0}"#,
            400,
            "pages_to_scan",
        ),
    ];
    for refusal in refusals {
        assert_refused(&server, refusal);
    }
    assert_eq!(server.call("GET", "/vms", "").json(), json!([]));
}

#[test]
fn requests_for_what_is_not_there_are_404() {
    if !kvm::is_present() {
        return;
    }
    let server = Server::start(&[]);
    let refusals = [
        ("GET", "/vms/new", "", 404, "new"),
        ("GET", "/vms/new/merge", "", 404, "new"),
        ("GET", "/vms/new/config", "", 404, "new"),
        ("GET", "/vms/new/console", "", 404, "new"),
        ("DELETE", "/vms/new", "", 404, "new"),
        ("PUT", "/vms/new/actions", START, 404, "new"),
        ("PATCH", "/vms/new/vm", r#"{"state": "Paused"}"#, 404, "new"),
        ("GET", "/merge/new", "", 404, "new"),
        ("GET", "/merge/vm:new", "", 404, "vm:new"),
        ("PATCH", "/merge/new", r#"{"run": "stop"}"#, 404, "new"),
    ];
    for refusal in refusals {
        assert_refused(&server, refusal);
    }
}

#[test]
fn requests_that_the_state_does_not_allow_are_refused_and_change_nothing() {
    if !kvm::is_present() {
        return;
    }
    let server = Server::start(&[]);
    let config = pageload(None);
    server.done("PUT", "/vms/idle", &config);
    server.done("PUT", "/vms/busy", &config);
    server.done("PUT", "/vms/busy/actions", START);
    let refusals = [
        ("PUT", "/vms/idle", config.as_str(), 409, "idle"),
        ("PUT", "/vms/busy", &config, 409, "busy"),
        ("DELETE", "/vms/busy", "", 409, "busy"),
        // As Firecracker answers these.
        ("PUT", "/vms/busy/actions", START, 400, "busy"),
        ("PUT", "/vms/idle/actions", STOP, 400, "idle"),
        (
            "PATCH",
            "/vms/idle/vm",
            r#"{"state": "Paused"}"#,
            400,
            "idle",
        ),
    ];
    for refusal in refusals {
        assert_refused(&server, refusal);
    }
    let vms = server.call("GET", "/vms", "").json();
    let states: Vec<_> = vms
        .as_array()
        .unwrap()
        .iter()
        .map(|vm| &vm["state"])
        .collect();
    assert_eq!(states, ["Running", "Not started"]);
}

#[test]
fn body_over_the_limit_is_refused_unread() {
    if !kvm::is_present() {
        return;
    }
    let server = Server::start(&[]);
    let body = " ".repeat(1 << 20);
    // A client that sends all first, and one that waits for the reply after its head.
    let reply = server.call("PUT", "/vms/a", &body);
    assert_eq!(reply.status, 413);
    assert!(reply.fault().contains("51200"));
    let mut connection = server.connect();
    let head = "PUT /vms/a HTTP/1.1\r\nContent-Length: 1048576\r\n\r\n";
    connection.send(head.as_bytes()).unwrap();
    let reply = connection.reply();
    assert_eq!(reply.status, 413);
    reply.fault();
    // Without an announced length, in chunks of 64 KiB.
    let mut connection = server.connect();
    let chunk = format!("10000\r\n{}\r\n", " ".repeat(1 << 16));
    let head = "PUT /vms/a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n";
    let whole = format!("{head}{}0\r\n\r\n", chunk.repeat(16));
    connection.send(whole.as_bytes()).unwrap();
    let reply = connection.reply();
    assert_eq!(reply.status, 413);
    reply.fault();
    // Up to the limit a body is looked at.
    let reply = server.call("PUT", "/vms/a", &" ".repeat(51200));
    assert_eq!(reply.status, 400);
}

#[test]
fn replies_have_the_shape_of_firecrackers_server() {
    if !kvm::is_present() {
        return;
    }
    let server = Server::start(&[]);
    let reply = server.call("PUT", "/vms/a", &pageload(None));
    let expected = "HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n";
    assert_eq!(reply.head, expected);
    let reply = server.call("GET", "/version", "");
    let expected = format!(
        "HTTP/1.1 200 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        reply.body.len()
    );
    assert_eq!(reply.head, expected);
    let reply = server.call("POST", "/vms", "");
    assert!(
        reply.head.starts_with("HTTP/1.1 405 \r\n"),
        "{}",
        reply.head
    );
    assert!(reply.head.contains("\r\nAllow: GET\r\n"), "{}", reply.head);
    reply.fault();
}

#[test]
fn what_is_no_http_request_is_a_fault_too() {
    if !kvm::is_present() {
        return;
    }
    let server = Server::start(&[]);
    let long_path = format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(70_000));
    let headers: String = (0..200).map(|number| format!("h{number}: x\r\n")).collect();
    let cases = [
        ("nonsense\r\n\r\n", 400),
        ("GET /vms HTTP/9.9\r\n\r\n", 400),
        ("PUT /vms/a HTTP/1.1\r\nContent-Length: many\r\n\r\n", 400),
        (&format!("GET /vms HTTP/1.1\r\n{headers}\r\n"), 431),
        (&long_path, 431),
    ];
    for (request, status) in cases {
        let mut connection = server.connect();
        // A request that works comes first, so that the reply is not the connection's first.
        assert_eq!(connection.call("GET", "/vms", "").status, 200);
        connection.send(request.as_bytes()).unwrap();
        let reply = connection.reply();
        assert_eq!(reply.status, status, "{}", reply.head);
        assert!(
            reply.head.contains("\r\nConnection: close\r\n"),
            "{}",
            reply.head
        );
        reply.fault();
        // With more of it unread than the server takes, the end is a reset.
        if request.len() < 8192 {
            assert_eq!(connection.read_to_end(), b"");
        }
    }
}

#[test]
fn connections_persist_with_http_1_0_too() {
    if !kvm::is_present() {
        return;
    }
    let server = Server::start(&[]);
    let mut connection = server.connect();
    for version in ["1.0", "1.0", "1.1", "1.0"] {
        let config = pageload(None);
        let length = config.len();
        let head = format!("PUT /vms/a HTTP/{version}\r\nContent-Length: {length}\r\n\r\n");
        connection
            .send(format!("{head}{config}").as_bytes())
            .unwrap();
        assert_eq!(connection.reply().status, 204);
        connection
            .send(format!("DELETE /vms/a HTTP/{version}\r\n\r\n").as_bytes())
            .unwrap();
        assert_eq!(connection.reply().status, 204);
    }
}

#[test]
fn vm_goes_through_its_states() {
    if !kvm::is_present() {
        return;
    }
    let server = Server::start(&[]);
    let state = || server.call("GET", "/vms/a", "").json()["state"].clone();
    server.done("PUT", "/vms/a", &pageload(Some("ci")));
    assert_eq!(state(), "Not started");
    let config = server.call("GET", "/vms/a/config", "").json();
    assert_eq!(config["machine-config"]["mem_size_mib"], 32);
    assert_eq!(config["samepage"]["merge_domain"], "ci");
    assert_eq!(server.call("GET", "/vms/a/vm/config", "").json(), config);
    server.done("PUT", "/vms/a/actions", START);
    assert_eq!(state(), "Running");
    server.done("PATCH", "/vms/a/vm", r#"{"state": "Paused"}"#);
    assert_eq!(state(), "Paused");
    server.done("PATCH", "/vms/a/vm", r#"{"state": "Resumed"}"#);
    assert_eq!(state(), "Running");
    wait_until("the guest reports", PATIENCE, || {
        let vm = server.call("GET", "/vms/a", "").json();
        vm["report"]["pages_written"]
            .as_u64()
            .is_some_and(|pages| pages > 0)
    });
    server.done("PUT", "/vms/a/actions", STOP);
    let vm = server.call("GET", "/vms/a", "").json();
    assert_eq!(vm["state"], "Ended");
    assert_eq!(vm["end_reason"], "stopped");
    server.done("DELETE", "/vms/a", "");
    assert_eq!(server.call("GET", "/vms", "").json(), json!([]));
    // The id is free again.
    server.done("PUT", "/vms/a", &pageload(None));
}

#[test]
fn domains_live_as_long_as_their_vms_unless_declared() {
    if !kvm::is_present() {
        return;
    }
    let server = Server::start(&["--domain", "kept"]);
    let names = || -> Vec<String> {
        let domains = server.call("GET", "/merge", "").json();
        domains.as_object().unwrap().keys().cloned().collect()
    };
    assert_eq!(names(), ["kept"]);
    server.done("PUT", "/vms/a", &pageload(Some("ci")));
    server.done("PUT", "/vms/b", &pageload(Some("ci")));
    server.done("PUT", "/vms/c", &pageload(Some("kept")));
    // Named like a domain, and still with nobody to share with.
    server.done("PUT", "/vms/ci", &pageload(None));
    assert_eq!(names(), ["ci", "kept", "vm:ci"]);
    let vms = server.call("GET", "/merge/ci", "").json()["vms"].clone();
    let vms: Vec<_> = vms.as_object().unwrap().keys().cloned().collect();
    assert_eq!(vms, ["a", "b"]);
    for id in ["a", "b", "c", "ci"] {
        server.done("DELETE", &format!("/vms/{id}"), "");
    }
    assert_eq!(names(), ["kept"]);
}

#[test]
fn failed_create_leaves_neither_vm_nor_domain() {
    if !kvm::is_present() {
        return;
    }
    let server = Server::start(&[]);
    let config = r#"{"boot-source": {"kernel_image_path": "/nowhere"},
        "samepage": {"merge_domain": "ci"}}"#;
    assert_eq!(server.call("PUT", "/vms/a", config).status, 400);
    assert_eq!(server.call("GET", "/merge", "").json(), json!({}));
    server.done("PUT", "/vms/a", &pageload(None));
}

#[test]
fn console_stream_ends_with_the_vm() {
    if !kvm::is_present() {
        return;
    }
    let server = Server::start(&[]);
    server.done("PUT", "/vms/a", &pageload(None));
    server.done("PUT", "/vms/a/actions", START);
    let mut connection = server.connect();
    let request = "GET /vms/a/console HTTP/1.1\r\nHost: localhost\r\n\
                   Connection: Upgrade\r\nUpgrade: samepage-console\r\n\r\n";
    connection.send(request.as_bytes()).unwrap();
    let reply = connection.reply();
    assert_eq!(reply.status, 101);
    assert!(
        reply.head.contains("\r\nUpgrade: samepage-console\r\n"),
        "{}",
        reply.head
    );
    server.done("PUT", "/vms/a/actions", STOP);
    let streamed = connection.read_to_end();
    let history = server.call("GET", "/vms/a/console", "");
    assert!(
        history.head.contains("\r\nContent-Type: text/plain\r\n"),
        "{}",
        history.head
    );
    assert_eq!(streamed, history.body);
    // Without the protocol it is the history, even of a VM that has ended.
    assert_eq!(history.status, 200);
}

#[test]
fn signals_stop_the_server_with_its_vms_and_socket() {
    if !kvm::is_present() {
        return;
    }
    // Whoever runs the tests may have had hang-ups ignored, as nohup does, and the server then does.
    let heed_hang_ups = r#"set -- env --default-signal=HUP "$@""#;
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let mut server = Server::start_after(heed_hang_ups, &[]);
        let mode = std::fs::metadata(server.socket())
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
        server.done("PUT", "/vms/a", &pageload(Some("ci")));
        server.done("PUT", "/vms/a/actions", START);
        // An idle connection does not hold it up.
        let _idle = server.connect();
        let status = server.stop(signal);
        assert_eq!(status.code(), Some(0), "{signal:?}");
        assert!(!server.socket().exists());
    }
}

/// Threads, those of tokio's pools left out, and open files of a process.
fn holdings(pid: u32) -> (Vec<String>, usize) {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).expect("a live process");
    let names = tasks.flatten().map(|task| {
        let name = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        name.trim().to_owned()
    });
    let threads = names.filter(|name| !name.starts_with("tokio")).collect();
    let files = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("a live process");
    (threads, files.count())
}

/// Creates, starts, stops and deletes VMs of a few ids, whatever others do to them.
fn get_in_the_way(server: &Server, merge_domain: Option<&str>) {
    let config = pageload(merge_domain);
    let mut connection = server.connect();
    for round in 0..25 {
        let path = format!("/vms/v{}", round % 3);
        let actions = format!("{path}/actions");
        for (method, path, body) in [
            ("PUT", &path, config.as_str()),
            ("PUT", &actions, START),
            ("GET", &path, ""),
            ("PUT", &actions, STOP),
            ("DELETE", &path, ""),
        ] {
            let status = connection.call(method, path, body).status;
            let expected = [200, 204, 400, 404, 409];
            assert!(expected.contains(&status), "{method} {path}: {status}");
        }
    }
}

#[test]
fn clients_that_get_in_each_others_way_leave_nothing_behind() {
    if !kvm::is_present() {
        return;
    }
    let server = Server::start(&[]);
    // A thread has its maker's name until it has run.
    wait_until("the server's threads have their names", PATIENCE, || {
        holdings(server.pid()).0 == ["samepage", "log", "stdin"]
    });
    let before = holdings(server.pid());
    std::thread::scope(|scope| {
        for merge_domain in [Some("ci"), None, Some("ci"), None] {
            let server = &server;
            scope.spawn(move || get_in_the_way(server, merge_domain));
        }
    });
    for vm in server.call("GET", "/vms", "").json().as_array().unwrap() {
        let path = format!("/vms/{}", vm["id"].as_str().unwrap());
        // It may have been left running, or not.
        server.call("PUT", &format!("{path}/actions"), STOP);
        server.done("DELETE", &path, "");
    }
    assert_eq!(server.call("GET", "/merge", "").json(), json!({}));
    wait_until("the server holds no more than before", PATIENCE, || {
        let now = holdings(server.pid());
        // A connection that was just closed may have been counted before.
        now.0 == before.0 && now.1 <= before.1
    });
}
