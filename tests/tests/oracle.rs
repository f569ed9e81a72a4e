//! The counters that users see, against an oracle that reads the guests' memory itself.

use std::collections::HashMap;

use pageload_workload::{Layout, Workload, expect, layout};
use samepage_tests::guest_memory::Process;
use samepage_tests::kvm;
use samepage_tests::server::Server;
use samepage_tests::wait::{PATIENCE, wait_until};
use serde_json::{Value, json};

const MEM_SIZE_MIB: u64 = 24;
const VMS: u64 = 3;

/// Contents that may be in the pool twice: once more where two VMs hold one at the same place.
const REPEATED_MAX: u64 = 16;

fn workload(number: u64) -> Workload {
    Workload {
        shared: 55,
        zero: 15,
        private: 30,
        layout: Layout::Shuffled,
        ..Workload::quiet(number + 1)
    }
}

fn stats(server: &Server) -> Value {
    let output = server.cli(&["stats", "--json"]);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let all: Value = serde_json::from_slice(&output.stdout).expect("json");
    all["lab"].clone()
}

fn number(stats: &Value, key: &str) -> u64 {
    stats[key]
        .as_u64()
        .unwrap_or_else(|| panic!("{key}: {stats}"))
}

fn launch(server: &Server, vm: u64) {
    let config = json!({
        "boot-source": {
            "kernel_image_path": "builtin:pageload",
            "boot_args": workload(vm).to_string(),
        },
        "machine-config": { "vcpu_count": 1, "mem_size_mib": MEM_SIZE_MIB },
        "samepage": { "merge_domain": "lab" },
    });
    server.done("PUT", &format!("/vms/vm{vm}"), &config.to_string());
    let start = r#"{"action_type": "InstanceStart"}"#;
    server.done("PUT", &format!("/vms/vm{vm}/actions"), start);
}

fn verify_passes(server: &Server, vm: u64) -> u64 {
    let info = server.call("GET", &format!("/vms/vm{vm}"), "").json();
    assert_eq!(
        info["report"]["verify_errors"].as_u64().unwrap_or(0),
        0,
        "{info}"
    );
    info["report"]["verify_passes"].as_u64().unwrap_or(0)
}

/// Waits until the counters are those of a world that stands still.
fn wait_for_scans(server: &Server, more: u64) -> Value {
    // Pages that were busy are put off; nobody writes any more, so each of them has its turn.
    wait_until("every page was found calm", PATIENCE, || {
        number(&stats(server), "pages_volatile") == 0
    });
    let target = number(&stats(server), "full_scans") + more;
    wait_until("the worker scanned all memory", PATIENCE, || {
        number(&stats(server), "full_scans") >= target
    });
    stats(server)
}

/// Distinct contents with more than one copy, and copies beyond the first, zeros left out.
fn count(memories: &[Vec<Vec<u8>>]) -> (u64, u64) {
    let mut copies: HashMap<&[u8], u64> = HashMap::new();
    for page in memories.iter().flatten() {
        if page.iter().any(|&byte| byte != 0) {
            *copies.entry(page).or_default() += 1;
        }
    }
    let shared = copies.values().filter(|&&count| count > 1);
    (
        shared.clone().count() as u64,
        shared.map(|count| count - 1).sum(),
    )
}

#[test]
fn stats_are_those_of_an_oracle_that_compares_every_page() {
    if !kvm::is_present() {
        return;
    }
    let server = Server::start(&["--domain", "lab"]);
    (0..VMS).for_each(|vm| launch(&server, vm));
    wait_until("every guest has verified its memory", PATIENCE, || {
        (0..VMS).all(|vm| verify_passes(&server, vm) > 0)
    });
    for vm in 0..VMS {
        server.done(
            "PATCH",
            &format!("/vms/vm{vm}/vm"),
            r#"{"state": "Paused"}"#,
        );
    }
    // A guest's stack was busy until now, and would be left alone for some seconds more.
    for vm in 0..VMS {
        let merge_now = r#"{"action_type": "MergeNow"}"#;
        let reply = server.call("PUT", &format!("/vms/vm{vm}/actions"), merge_now);
        assert_eq!(reply.status, 200, "{}", reply.head);
    }
    let process = Process::open(server.pid()).expect("our own child");
    let memories: Vec<Vec<Vec<u8>>> = (0..VMS)
        .map(|vm| {
            process
                .guest_pages(workload(vm), MEM_SIZE_MIB << 20)
                .expect("its memory")
        })
        .collect();
    let (pages_shared, pages_sharing) = count(&memories);
    let merged = |stats: &Value| number(stats, "pages_shared") + number(stats, "pages_sharing");
    // What is equal at another place is mapped once it was calm for long.
    wait_until("every page that has an equal is merged", PATIENCE, || {
        merged(&stats(&server)) == pages_shared + pages_sharing
    });
    let seen = wait_for_scans(&server, 4);
    let in_pool = number(&seen, "pages_shared");
    assert_eq!(merged(&seen), pages_shared + pages_sharing, "{seen}");
    assert!(
        (pages_shared..=pages_shared + REPEATED_MAX).contains(&in_pool),
        "{pages_shared} contents: {seen}"
    );
    assert_eq!(number(&seen, "pages_volatile"), 0, "{seen}");
    let merging: u64 = (0..VMS)
        .map(|vm| number(&seen["vms"][format!("vm{vm}")], "pages_merging"))
        .sum();
    assert_eq!(merging, pages_shared + pages_sharing, "{seen}");
    // The second oracle computes from the seeds, without looking at memory. It leaves out what is
    // below a guest's first page: its image, and what the monitor puts there for booting.
    let pages = layout::page_count(MEM_SIZE_MIB << 20);
    let plans: Vec<(Workload, u64)> = (0..VMS).map(|vm| (workload(vm), pages)).collect();
    let expected = expect(&plans).expect("seeds differ");
    let below = VMS * layout::FIRST_PAGE_ADDRESS / layout::PAGE_BYTES;
    assert!((expected.pages_shared..expected.pages_shared + below).contains(&pages_shared));
    assert!((expected.pages_sharing..expected.pages_sharing + below).contains(&pages_sharing));
    let pages_zero = number(&seen, "pages_zero");
    assert!((expected.pages_zero..expected.pages_zero + below).contains(&pages_zero));
}
