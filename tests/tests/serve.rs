//! The process of `samepage serve`: what it takes from its parent, and what it asks of the system.

use rustix::process::Signal;
use samepage_tests::kvm;
use samepage_tests::server::Server;
use serde_json::json;

#[test]
fn server_raises_its_limit_of_descriptors_as_far_as_it_may() {
    if !kvm::is_present() {
        return;
    }
    let server = Server::start_after("ulimit -Sn 256; ulimit -Hn 768", &[]);
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", server.pid())).unwrap();
    let line = limits
        .lines()
        .find(|line| line.starts_with("Max open files"));
    let figures: Vec<&str> = line.unwrap().split_whitespace().skip(3).take(2).collect();
    assert_eq!(figures, ["768", "768"]);
}

#[test]
fn server_that_was_told_to_ignore_hang_ups_ignores_them() {
    if !kvm::is_present() {
        return;
    }
    // As nohup does.
    let mut server = Server::start_after("trap '' HUP", &[]);
    server.signal(Signal::HUP);
    assert_eq!(server.call("GET", "/vms", "").json(), json!([]));
    assert_eq!(server.stop(Signal::TERM).code(), Some(0));
    assert!(!server.socket().exists());
}
