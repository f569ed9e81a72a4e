//! `samepage doctor` on the host that the tests run on.

use std::process::{Command, Output};

use samepage_tests::{binary, kvm};
use serde_json::Value;

fn doctor(arguments: &[&str]) -> Output {
    Command::new(binary::samepage())
        .arg("doctor")
        .args(arguments)
        .output()
        .expect("run samepage")
}

#[test]
fn doctor_finds_what_these_tests_need_and_its_exit_status_says_how_the_host_does() {
    if !kvm::is_present() {
        return;
    }
    let output = doctor(&["--json"]);
    let report: Value = serde_json::from_slice(&output.stdout).expect("a JSON object");
    let status_of = |name: &str| {
        let checks = report["checks"].as_array().expect("checks");
        let check = checks.iter().find(|check| check["name"] == name);
        check.unwrap_or_else(|| panic!("no {name}: {report}"))["status"].clone()
    };
    for needed in ["kvm", "userfaultfd", "kernel"] {
        assert_eq!(status_of(needed), "ok", "{report}");
    }
    // What else there is depends on the host, which may be slow but runs these tests.
    let code = match report["status"].as_str() {
        Some("ok") => 0,
        Some("warning") => 3,
        other => panic!("{other:?}: {report}"),
    };
    assert_eq!(output.status.code(), Some(code));
    assert!(output.stderr.is_empty());
}

#[test]
fn doctor_tells_a_human_how_to_mend_each_trouble() {
    let text = String::from_utf8(doctor(&[]).stdout).expect("text");
    let lines: Vec<&str> = text.lines().collect();
    for (line, next) in lines.iter().zip(&lines[1..]) {
        let is_trouble = ["warning", "missing"]
            .iter()
            .any(|status| line.starts_with(status));
        assert_eq!(is_trouble, next.contains("To mend it: "), "{text}");
    }
    let last = lines.last().expect("a summary");
    assert!(last.starts_with("Samepage can"), "{text}");
}
