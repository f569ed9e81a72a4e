//! Clients that send half of what they should, or too much at a time, against a real server process.

use samepage::connections::CONNECTIONS_MAX;
use samepage_tests::http::Connection;
use samepage_tests::kvm;
use samepage_tests::server::Server;
use serde_json::json;

const HALF_A_HEAD: &[u8] = b"GET /vms HTTP/1.1\r\nX-Slow: ";

#[test]
fn clients_that_send_nothing_keep_nobody_out() {
    if !kvm::is_present() {
        return;
    }
    // This process holds the other end of each.
    samepage::limits::raise().expect("descriptors");
    let server = Server::start(&[]);
    let mut slow: Vec<Connection> = Vec::new();
    for number in 0..CONNECTIONS_MAX + 100 {
        let mut connection = server.connect();
        let begin: &[u8] = if number % 2 == 0 { b"" } else { b"GET /v" };
        connection.send(begin).expect("send some of a request");
        slow.push(connection);
        if number % 50 == 0 {
            assert_eq!(server.call("GET", "/vms", "").status, 200, "{number}");
        }
    }
    // The oldest of them was cut for it.
    slow[0].read_to_end();
    let open = std::fs::read_dir(format!("/proc/{}/fd", server.pid())).expect("descriptors");
    assert!(open.count() < CONNECTIONS_MAX + 100);
}

#[test]
fn head_that_never_ends_is_cut_and_an_idle_client_is_not() {
    if !kvm::is_present() {
        return;
    }
    let server = Server::start(&[]);
    let mut idle = server.connect();
    assert_eq!(idle.call("GET", "/vms", "").status, 200);
    let mut slow = server.connect();
    slow.send(HALF_A_HEAD).expect("send half a head");
    // The end of the stream, within the patience of the connection.
    slow.read_to_end();
    // It has been idle for longer than the other had for its head.
    assert_eq!(idle.call("GET", "/vms", "").status, 200);
}

#[test]
fn body_that_does_not_come_is_a_timeout_of_its_client() {
    if !kvm::is_present() {
        return;
    }
    let server = Server::start(&[]);
    let mut slow = server.connect();
    let head = "PUT /vms/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{";
    slow.send(head.as_bytes()).expect("send a head");
    let reply = slow.reply();
    assert_eq!(reply.status, 408);
    assert!(reply.fault().contains("body"), "{}", reply.fault());
    assert_eq!(server.call("GET", "/vms", "").json(), json!([]));
}

#[test]
fn config_that_is_no_good_makes_no_monitor() {
    if !kvm::is_present() {
        return;
    }
    let server = Server::start(&[]);
    let threads = || {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", server.pid())).expect("tasks");
        let names = tasks.filter_map(|task| {
            let name = task.ok()?.path().join("comm");
            std::fs::read_to_string(name).ok()
        });
        // tokio's own come and go.
        names.filter(|name| !name.starts_with("tokio")).count()
    };
    assert_eq!(server.call("GET", "/vms", "").status, 200);
    let before = threads();
    let config = json!({
        "boot-source": { "kernel_image_path": "/dev/null" },
        "machine-config": { "vcpu_count": 0, "mem_size_mib": 32 },
    });
    for _ in 0..50 {
        let refused = server.call("PUT", "/vms/a", &config.to_string());
        assert_eq!(refused.status, 400);
        assert!(
            refused.fault().contains("vcpu_count"),
            "{}",
            refused.fault()
        );
        assert_eq!(threads(), before);
    }
}
