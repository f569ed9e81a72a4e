//! The density benchmark's oracle, against guests whose memory is known byte by byte.

use std::time::Duration;

use pageload_workload::{Layout, Workload};
use samepage_tests::density::oracle::count::count;
use samepage_tests::density::oracle::memory::read_fleet;
use samepage_tests::density::oracle::{Fingerprint, NEVER_TOUCHED, ZERO, fingerprint};
use samepage_tests::guest_memory::Process;
use samepage_tests::kvm;
use samepage_tests::server::Server;
use samepage_tests::wait::wait_until;
use serde_json::{Value, json};

/// Two sizes, so that guests cannot be told apart by the size alone.
const MEM_SIZES_MIB: [u64; 4] = [24, 32, 24, 24];
const PATIENCE: Duration = Duration::from_secs(120);
const MIB: u64 = 1 << 20;
/// Contents that may be in the pool twice.
const REPEATED_MAX: u64 = 16;

fn workload(vm: usize) -> Workload {
    Workload {
        shared: 55,
        zero: 15,
        private: 30,
        layout: Layout::Shuffled,
        ..Workload::quiet(vm as u64 + 1)
    }
}

fn get(server: &Server, path: &str) -> Value {
    let reply = server.call("GET", path, "");
    assert_eq!(reply.status, 200, "{path}");
    reply.json()
}

/// A server with paused guests that have verified their memory.
fn fleet(samepage: &Value) -> Server {
    let server = Server::start(&["--domain", "lab"]);
    for (vm, mem_size_mib) in MEM_SIZES_MIB.into_iter().enumerate() {
        let config = json!({
            "boot-source": {
                "kernel_image_path": "builtin:pageload",
                "boot_args": workload(vm).to_string(),
            },
            "machine-config": { "vcpu_count": 1, "mem_size_mib": mem_size_mib },
            "samepage": samepage,
        });
        server.done("PUT", &format!("/vms/vm{vm}"), &config.to_string());
        let start = r#"{"action_type": "InstanceStart"}"#;
        server.done("PUT", &format!("/vms/vm{vm}/actions"), start);
    }
    for vm in 0..MEM_SIZES_MIB.len() {
        let path = format!("/vms/vm{vm}");
        wait_until("the guest has verified its memory", PATIENCE, || {
            get(&server, &path)["report"]["verify_passes"].as_u64() > Some(0)
        });
        server.done("PATCH", &format!("{path}/vm"), r#"{"state": "Paused"}"#);
    }
    server
}

fn read(server: &Server) -> Vec<Vec<Fingerprint>> {
    let sizes_bytes = MEM_SIZES_MIB.map(|mib| mib * MIB);
    read_fleet(server.pid(), &sizes_bytes).expect("the fleet")
}

/// Whether fingerprints are those of a guest's pages, which the other reader found by their content.
/// It gives memory to each page that it looks at, so it comes second.
fn shows(fingerprints: &[Fingerprint], pages: &[Vec<u8>]) -> bool {
    let is_page = |(&seen, page): (&Fingerprint, &Vec<u8>)| {
        seen == fingerprint(page) || seen == NEVER_TOUCHED && fingerprint(page) == ZERO
    };
    fingerprints.len() == pages.len() && fingerprints.iter().zip(pages).all(is_page)
}

fn assert_is_fleet_of(server: &Server, fleet: &[Vec<Fingerprint>]) {
    let process = Process::open(server.pid()).expect("our own child");
    for (vm, mem_size_mib) in MEM_SIZES_MIB.into_iter().enumerate() {
        let pages = process.guest_pages(workload(vm), mem_size_mib * MIB);
        let pages = pages.expect("its memory");
        let shown = fleet.iter().filter(|guest| shows(guest, &pages)).count();
        assert_eq!(shown, 1, "vm{vm}");
    }
}

#[test]
fn guests_without_merging_are_read_page_by_page() {
    if !kvm::is_present() {
        return;
    }
    let server = fleet(&json!({ "merge": false }));
    let fleet = read(&server);
    assert_is_fleet_of(&server, &fleet);
    let oracle = count(&fleet);
    assert!(
        oracle.zero_pages > 0 && oracle.ideal_saved_pages() > 0,
        "{oracle:?}"
    );
}

#[test]
fn merged_guests_are_read_as_they_see_themselves_and_need_no_memory_for_it() {
    if !kvm::is_present() {
        return;
    }
    let server = fleet(&json!({ "merge_domain": "lab" }));
    for vm in 0..MEM_SIZES_MIB.len() {
        let merge_now = r#"{"action_type": "MergeNow"}"#;
        let reply = server.call("PUT", &format!("/vms/vm{vm}/actions"), merge_now);
        assert_eq!(reply.status, 200, "{}", reply.head);
    }
    let stats = || get(&server, "/merge/lab");
    let number =
        |stats: &Value, key: &str| stats[key].as_u64().unwrap_or_else(|| panic!("{stats}"));
    wait_until("every page was found calm", PATIENCE, || {
        number(&stats(), "pages_volatile") == 0
    });
    // A content that two VMs hold at the same place is in the pool there, too. What is equal at another
    // place is mapped once it was calm for long; while it is being mapped, nobody can read it from outside.
    wait_until("what has an equal is merged", PATIENCE, || {
        let ideal = count(&read(&server)).ideal_saved_pages();
        number(&stats(), "pages_sharing") + REPEATED_MAX >= ideal
    });
    let scans = number(&stats(), "full_scans") + 4;
    wait_until("the worker scanned all memory", PATIENCE, || {
        number(&stats(), "full_scans") >= scans
    });
    let before = stats();
    let fleet = read(&server);
    let oracle = count(&fleet);
    // Nothing was unmerged, and no hole of the pool was filled by the reading.
    for key in ["pages_shared", "pages_sharing", "pages_zero"] {
        assert_eq!(number(&stats(), key), number(&before, key), "{key}");
    }
    let ideal = oracle.ideal_saved_pages();
    let again = count(&read(&server)).ideal_saved_pages();
    assert_eq!(again, ideal, "nobody writes");
    assert!(number(&before, "pages_sharing") <= ideal, "{oracle:?}");
    assert_is_fleet_of(&server, &fleet);
}

#[test]
fn a_guest_that_is_not_there_is_an_error_with_what_is() {
    if !kvm::is_present() {
        return;
    }
    let server = Server::start(&["--domain", "lab"]);
    let error = read_fleet(server.pid(), &[24 * MIB]).expect_err("no guest runs");
    assert!(error.to_string().contains("guests of []"), "{error}");
}
