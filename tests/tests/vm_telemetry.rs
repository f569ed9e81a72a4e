//! Firecracker's `/logger` and `/metrics` of a VM.

use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use samepage_tests::kvm;
use samepage_tests::server::Server;
use serde_json::{Value, json};

const FLUSH: &str = r#"{"action_type": "FlushMetrics"}"#;

fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).expect("the file");
    text.lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect()
}

#[test]
fn metrics_are_lines_of_json_that_count_since_the_last_one() {
    if !kvm::is_present() {
        return;
    }
    let server = Server::start(&[]);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("metrics");
    server.done("PUT", "/vms/a", "{}");
    server.done("PUT", "/vms/a/actions", FLUSH);
    let config = json!({"metrics_path": path, "emit_id": true}).to_string();
    server.done("PUT", "/vms/a/metrics", &config);
    server.call("GET", "/vms/a", "");
    let nowhere = r#"{"kernel_image_path": "/nowhere"}"#;
    assert_eq!(
        server.call("PUT", "/vms/a/boot-source", nowhere).status,
        400
    );
    server.done("PUT", "/vms/a/actions", FLUSH);
    server.done("PUT", "/vms/a/actions", FLUSH);

    let lines = lines(&path);
    let [first, second] = &lines[..] else {
        panic!("{lines:?}");
    };
    assert_eq!(first["id"], "a");
    assert_eq!(first["get_api_requests"]["instance_info_count"], 1);
    assert_eq!(first["put_api_requests"]["boot_source_count"], 1);
    assert_eq!(first["put_api_requests"]["boot_source_fails"], 1);
    assert_eq!(second["put_api_requests"]["boot_source_count"], 0);
    // The first line was written while its own request was in hand.
    assert_eq!(second["put_api_requests"]["actions_count"], 1);

    let again = server.call("PUT", "/vms/a/metrics", &config);
    assert_eq!(again.status, 400);
    assert!(again.fault().contains("metrics_path"));
}

#[test]
fn requests_are_logged_to_a_pipe_that_its_reader_opens_when_it_likes() {
    if !kvm::is_present() {
        return;
    }
    let server = Server::start(&[]);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("log");
    let fifo = rustix::fs::FileType::Fifo;
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, &path, fifo, mode, 0).unwrap();
    server.done("PUT", "/vms/a", "{}");
    let config = json!({"log_path": path, "level": "INFO", "show_level": true});
    server.done("PUT", "/vms/a/logger", &config.to_string());
    let machine = r#"{"vcpu_count": 1, "mem_size_mib": 32}"#;
    server.done("PUT", "/vms/a/machine-config", machine);
    let start = r#"{"action_type": "InstanceStart"}"#;
    assert_eq!(server.call("PUT", "/vms/a/actions", start).status, 400);

    let mut reader = std::fs::OpenOptions::new();
    let reader = reader.read(true).custom_flags(libc::O_NONBLOCK).open(&path);
    let mut text = vec![0; 4096];
    let length = reader.unwrap().read(&mut text).unwrap();
    let text = String::from_utf8(text[..length].to_vec()).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let [_, done, refused] = &lines[..] else {
        panic!("{text}");
    };
    assert!(
        done.contains("[a:fc_api:Info] PUT /machine-config: done"),
        "{done}"
    );
    assert!(
        refused.contains(":Error] PUT /actions InstanceStart: refused: "),
        "{refused}"
    );
}

#[test]
fn a_log_or_metrics_file_that_cannot_be_is_refused_by_name() {
    if !kvm::is_present() {
        return;
    }
    let server = Server::start(&[]);
    server.done("PUT", "/vms/a", "{}");
    for (path, body, named) in [
        ("logger", r#"{"log_path": "/nowhere/log"}"#, "/nowhere/log"),
        ("logger", r#"{"log_path": "/dev/null"}"#, "/dev/null"),
        ("logger", r#"{"level": "Loud"}"#, "Loud"),
        ("metrics", r#"{"metrics_path": "/"}"#, "metrics_path: /"),
    ] {
        let reply = server.call("PUT", &format!("/vms/a/{path}"), body);
        let fault = reply.fault();
        assert_eq!(reply.status, 400, "{fault}");
        assert!(fault.contains(named), "{fault}");
    }
}
