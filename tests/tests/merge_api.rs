//! What operators set and ask of merging over the API: pace, advisor, merge now.

use samepage::domain_name::DomainName;
use samepage::front_door::FrontDoor;
use samepage::reply::Reply;
use samepage::request::Request;
use samepage_tests::kvm;
use samepage_tests::refusal::assert_refused;
use samepage_tests::server::Server;
use samepage_tests::wait::{PATIENCE, wait_until};
use serde_json::{Value, json};

const START: &str = r#"{"action_type": "InstanceStart"}"#;

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
fn merge_settings_change_one_by_one() {
    if !kvm::is_present() {
        return;
    }
    let server = Server::start(&["--domain", "ci"]);
    let domain = || server.call("GET", "/merge/ci", "").json();
    let before = domain();
    assert_eq!(before["run"], "merge");
    server.done("PATCH", "/merge/ci", r#"{"run": "stop"}"#);
    assert_eq!(domain()["run"], "stop");
    assert_eq!(domain()["pages_to_scan"], before["pages_to_scan"]);
    server.done("PATCH", "/merge/ci", r#"{"pages_to_scan": 77}"#);
    assert_eq!(domain()["pages_to_scan"], 77);
    assert_eq!(domain()["sleep_millisecs"], before["sleep_millisecs"]);
    server.done(
        "PATCH",
        "/merge/ci",
        r#"{"sleep_millisecs": 7, "run": "unmerge"}"#,
    );
    assert_eq!(domain()["sleep_millisecs"], 7);
    assert_eq!(domain()["run"], "unmerge");
    server.done("PATCH", "/merge/ci", "{}");
    for counter in [
        "pages_shared",
        "pages_sharing",
        "pages_zero",
        "saved_bytes",
        "full_scans",
    ] {
        assert!(domain()[counter].is_i64(), "{counter}");
    }
}

/// Sets one field to each value in turn, and finds it there each time.
fn set_again_and_again(door: &FrontDoor, field: &str) {
    let name: DomainName = "ci".parse().expect("a name");
    let ask = |request| door.handle(request).expect("an answer");
    for value in 1..=5_000 {
        let patch = serde_json::from_value(json!({ field: value })).expect("a patch");
        ask(Request::PatchDomain(name.clone(), patch));
        let Reply::Json(domain) = ask(Request::DescribeDomain(name.clone())) else {
            panic!("no domain");
        };
        let domain: Value = serde_json::from_slice(&domain).expect("json");
        assert_eq!(domain[field], value, "{field}");
    }
}

#[test]
fn merge_settings_that_are_changed_at_once_are_both_changed() {
    if !kvm::is_present() {
        return;
    }
    // Without a socket between: the moment in which one could be lost is short.
    let door = FrontDoor::new(dedup::Settings {
        run: dedup::Run::Stop,
        ..dedup::Settings::default()
    });
    door.declare("ci".parse().unwrap()).unwrap();
    std::thread::scope(|scope| {
        for field in ["pages_to_scan", "sleep_millisecs"] {
            let door = &door;
            scope.spawn(move || set_again_and_again(door, field));
        }
    });
}

#[test]
fn the_advisor_and_the_cpu_cap_are_set_live_and_shown() {
    if !kvm::is_present() {
        return;
    }
    let server = Server::start(&["--domain", "ci"]);
    let domain = || {
        let mut settings = server.call("GET", "/merge/ci", "").json();
        // A figure of its own, which no setting holds still.
        settings["memory"] = Value::Null;
        settings
    };
    assert_eq!(domain()["advisor_mode"], "none");
    assert_eq!(domain()["max_cpu_percent"], 100);
    let change = r#"{"advisor_mode": "scan-time", "max_cpu_percent": 30, "target_scan_time_ms": 700,
        "advisor_min_pages_to_scan": 90, "advisor_max_pages_to_scan": 9000}"#;
    server.done("PATCH", "/merge/ci", change);
    let advised = domain();
    assert_eq!(advised["advisor_mode"], "scan-time");
    assert_eq!(advised["max_cpu_percent"], 30);
    assert_eq!(advised["target_scan_time_ms"], 700);
    assert_eq!(advised["advisor_min_pages_to_scan"], 90);
    assert_eq!(advised["advisor_max_pages_to_scan"], 9000);
    for (body, named) in [
        (r#"{"pages_to_scan": 9}"#, "pages_to_scan 9"),
        (r#"{"max_cpu_percent": 101}"#, "max_cpu_percent 101"),
        (r#"{"max_cpu_percent": 0}"#, "max_cpu_percent 0"),
        (r#"{"target_scan_time_ms": 0}"#, "target_scan_time_ms"),
        (
            r#"{"advisor_max_pages_to_scan": 89}"#,
            "advisor_min_pages_to_scan 90",
        ),
        (r#"{"advisor_mode": "always"}"#, "always"),
    ] {
        assert_refused(&server, ("PATCH", "/merge/ci", body, 400, named));
    }
    assert_eq!(domain(), advised, "what is refused changes nothing");
    let shown = server.cli(&["stats"]);
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert!(
        shown.contains("scan-time") && shown.contains("30 %"),
        "{shown}"
    );

    // With something to scan, the advisor says how many pages a batch has.
    server.done("PUT", "/vms/a", &pageload(Some("ci")));
    server.done("PUT", "/vms/a/actions", START);
    wait_until("the advisor has advised", PATIENCE, || {
        domain()["pages_to_scan"] != advised["pages_to_scan"]
            && domain()["worker_cpu_us"].as_u64().unwrap_or(0) > 0
    });
    server.done("PATCH", "/merge/ci", r#"{"advisor_mode": "none"}"#);
    assert_eq!(domain()["pages_to_scan"], advised["pages_to_scan"]);
}

#[test]
fn merge_now_replies_when_the_vms_memory_is_merged() {
    if !kvm::is_present() {
        return;
    }
    let server = Server::start(&["--domain", "ci"]);
    // A worker that comes round once in an hour.
    let slow = r#"{"pages_to_scan": 1, "sleep_millisecs": 3600000}"#;
    server.done("PATCH", "/merge/ci", slow);
    let merge_now = r#"{"action_type": "MergeNow"}"#;
    for id in ["a", "b"] {
        let path = format!("/vms/{id}");
        server.done("PUT", &path, &pageload(Some("ci")));
        let early = server.call("PUT", &format!("{path}/actions"), merge_now);
        assert_eq!(early.status, 400, "it is not started yet");
        server.done("PUT", &format!("{path}/actions"), START);
        wait_until("the guest verified its memory", PATIENCE, || {
            let report = &server.call("GET", &path, "").json()["report"];
            report["verify_passes"].as_u64().unwrap_or(0) > 0
        });
    }
    assert_eq!(
        server.call("GET", "/merge/ci", "").json()["pages_sharing"],
        0
    );
    let merged = |id: &str| {
        let reply = server.call("PUT", &format!("/vms/{id}/actions"), merge_now);
        assert_eq!(reply.status, 200, "{}", reply.head);
        reply.json()
    };
    let zero_pages = merged("a")["pages_zero"].as_u64().unwrap_or(0);
    assert!(zero_pages > 100, "{zero_pages}");
    let reply = merged("b");
    let gained = reply["pages_gained"].as_i64().unwrap_or(0);
    assert!(gained > 1000, "{reply}");
    let stats = server.call("GET", "/vms/b/merge", "").json();
    assert_eq!(reply["pages_merging"], stats["pages_merging"]);

    let output = server.cli(&["merge", "a"]);
    assert!(output.status.success());
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.starts_with("a: "), "{text}");

    server.done("PATCH", "/merge/ci", r#"{"run": "stop"}"#);
    let refused = server.call("PUT", "/vms/a/actions", merge_now);
    assert_eq!(refused.status, 400);
}
