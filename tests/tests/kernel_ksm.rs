//! VMs whose memory kernel KSM merges, with the host's own KSM.

use std::time::Duration;

use samepage_tests::ksm::KernelKsm;
use samepage_tests::kvm;
use samepage_tests::refusal::assert_refused;
use samepage_tests::server::Server;
use samepage_tests::wait::wait_until;
use serde_json::{Value, json};

const START: &str = r#"{"action_type": "InstanceStart"}"#;
/// Longest that anything may take here; KSM looks at a page twice before it merges it.
const PATIENCE: Duration = Duration::from_secs(120);

fn launch(server: &Server, id: &str, merge: &Value) {
    let config = json!({
        "boot-source": {
            "kernel_image_path": "builtin:pageload",
            "boot_args": "pageload seed=7 shared=80 zero=10 private=10 passes=0 pace_ms=5",
        },
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 16},
        "samepage": {"merge_domain": "ci", "merge": merge},
    });
    server.done("PUT", &format!("/vms/{id}"), &config.to_string());
    server.done("PUT", &format!("/vms/{id}/actions"), START);
}

fn get(server: &Server, path: &str) -> Value {
    server.call("GET", path, "").json()
}

fn number(value: &Value) -> u64 {
    value
        .as_u64()
        .unwrap_or_else(|| panic!("{value} is no count"))
}

/// Waits until the guest has verified all its memory twice more, and found it right.
fn wait_verified(server: &Server, id: &str) {
    let report = || get(server, &format!("/vms/{id}"))["report"].clone();
    let passes = || report()["verify_passes"].as_u64().unwrap_or(0);
    let wanted = passes() + 2;
    wait_until("two more passes", PATIENCE, || passes() >= wanted);
    assert_eq!(report()["verify_errors"], 0, "{id}");
}

fn stdout(server: &Server, arguments: &[&str]) -> String {
    let output = server.cli(arguments);
    assert!(output.status.success(), "{arguments:?}");
    String::from_utf8(output.stdout).expect("text")
}

#[test]
fn vms_for_kernel_ksm_are_merged_by_it_alone_and_read_what_they_wrote() {
    if !kvm::is_present() {
        return;
    }
    let Some(ksm) = KernelKsm::take() else {
        return;
    };
    let server = Server::start(&["--domain", "ci"]);
    ksm.hurry();
    launch(&server, "a", &json!("ksm"));
    launch(&server, "b", &json!("ksm"));
    launch(&server, "alone", &json!(false));
    let merging = |id: &str| {
        let merge = get(&server, &format!("/vms/{id}/merge"));
        number(&merge["ksm"]["pages_merging"])
    };
    wait_until("both are merged", PATIENCE, || {
        merging("a") > 1000 && merging("b") > 1000
    });
    wait_verified(&server, "a");
    wait_verified(&server, "b");

    let domain = get(&server, "/merge/ci");
    assert_eq!(domain["slots"], 0, "the engine has none of them");
    assert_eq!(domain["pages_sharing"], 0);
    assert_eq!(domain["ksm"]["run"], "merge");
    let process = &domain["ksm"]["process"];
    assert!(number(&process["ksm_merging_pages"]) > 1000, "{process}");
    assert!(number(&process["ksm_rmap_items"]) > 1000, "{process}");
    let vm = |id: &str| &domain["vms"][id]["ksm"];
    let sum = number(&vm("a")["pages_merging"]) + number(&vm("b")["pages_merging"]);
    assert_eq!(number(&domain["ksm"]["pages_merging"]), sum);
    assert_eq!(*vm("alone"), Value::Null);
    assert_eq!(get(&server, "/vms/alone/merge")["ksm"], Value::Null);
    assert_eq!(get(&server, "/merge")["ci"]["ksm"]["run"], "merge");

    // A budget takes what KSM merged as each guest's own: then no write can break it.
    server.done("PATCH", "/merge/ci", r#"{"memory_budget": 268435456}"#);
    let memory = get(&server, "/merge/ci")["memory"].clone();
    assert_eq!(memory["limited_by"], "budget");
    assert!(number(&memory["use_bytes"]) > sum * 4096, "{memory}");

    let table = stdout(&server, &["stats"]);
    assert!(table.contains("KSM MERGING") && table.contains("SERVER MERGING"));
    let listed = stdout(&server, &["ps"]);
    let a = listed.lines().find(|line| line.starts_with("a "));
    assert!(a.is_some_and(|line| line.contains(" ksm ")), "{listed}");
}

#[test]
fn a_vm_for_kernel_ksm_starts_while_that_is_off_and_has_nothing_to_do_with_the_engines_orders() {
    if !kvm::is_present() {
        return;
    }
    let Some(ksm) = KernelKsm::take() else {
        return;
    };
    ksm.set("run", "0");
    let server = Server::start(&["--domain", "ci"]);
    launch(&server, "a", &json!("ksm"));
    assert_eq!(get(&server, "/vms/a")["merge"], "ksm");
    assert_eq!(get(&server, "/vms/a/config")["samepage"]["merge"], "ksm");
    assert_eq!(get(&server, "/vms/a/merge")["ksm"]["run"], "stop");
    assert_eq!(get(&server, "/merge/ci")["ksm"]["run"], "stop");

    let merge_now = r#"{"action_type": "MergeNow"}"#;
    let refusal = ("PUT", "/vms/a/actions", merge_now, 400, "kernel KSM");
    assert_refused(&server, refusal);

    ksm.hurry();
    let merging = || {
        let merge = get(&server, "/vms/a/merge");
        number(&merge["ksm"]["pages_merging"])
    };
    // Its pages of zeros are alike, so that it takes no second VM.
    wait_until("it is merged", PATIENCE, || merging() > 100);
    server.done("PATCH", "/merge/ci", r#"{"run": "unmerge"}"#);
    assert!(merging() > 100, "an unmerge of the engine is none of KSM's");
    wait_verified(&server, "a");

    server.done(
        "PUT",
        "/vms/a/actions",
        r#"{"action_type": "InstanceStop"}"#,
    );
    assert_eq!(get(&server, "/vms/a/merge")["ksm"], Value::Null);
    assert_eq!(get(&server, "/merge/ci")["ksm"], Value::Null);
}
