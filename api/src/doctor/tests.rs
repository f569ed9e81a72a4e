//! Hosts made out of directories, each with one thing wrong.

use std::fs;
use std::io;
use std::time::Duration;

use tempfile::TempDir;

use super::host::Host;
use super::{Check, Status, examine};

/// A host that lacks nothing, and its directory.
fn good_host() -> (Host, TempDir) {
    let root = tempfile::tempdir().unwrap();
    let host = Host {
        root: root.path().to_owned(),
        kvm: Ok(Duration::from_micros(350)),
        userfaultfd: Ok(Vec::new()),
        descriptors_max: Some(1 << 20),
    };
    for (path, text) in [
        ("proc/sys/kernel/osrelease", "6.12.9-amd64\n"),
        ("proc/sys/vm/max_map_count", "1048576\n"),
        ("proc/sys/fs/file-nr", "1216\t0\t9223372036854775807\n"),
        (
            "proc/swaps",
            "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n",
        ),
        (
            "proc/self/ksm_stat",
            "ksm_rmap_items 0\nksm_merge_any: no\n",
        ),
        (
            "proc/self/mountinfo",
            "30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n",
        ),
        (
            "sys/kernel/mm/transparent_hugepage/enabled",
            "always [madvise] never\n",
        ),
        ("sys/kernel/mm/ksm/run", "0\n"),
        ("sys/module/kvm/parameters/nx_huge_pages", "N\n"),
        (
            "sys/devices/system/cpu/vulnerabilities/itlb_multihit",
            "Not affected\n",
        ),
    ] {
        write(&host, path, text);
    }
    (host, root)
}

fn write(host: &Host, path: &str, text: &str) {
    let path = host.root.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

fn check(host: &Host, name: &str) -> Check {
    let checks = examine(host).checks;
    let mut found = checks.into_iter().filter(|check| check.name == name);
    found.next().unwrap()
}

/// The one check that is not well, on a host that is good but for `change`.
fn only_trouble(change: impl FnOnce(&mut Host)) -> Check {
    let (mut host, _root) = good_host();
    change(&mut host);
    let report = examine(&host);
    let bad: Vec<Check> = report
        .checks
        .into_iter()
        .filter(|check| check.status != Status::Ok)
        .collect();
    assert_eq!(bad.len(), 1, "{bad:?}");
    assert_eq!(report.status, bad[0].status);
    assert!(bad[0].mend.is_some(), "{bad:?}");
    bad[0].clone()
}

fn only_trouble_of_file(path: &str, text: &str) -> Check {
    only_trouble(|host| write(host, path, text))
}

#[test]
fn good_host_has_nothing_to_mend() {
    let (host, _root) = good_host();
    let report = examine(&host);
    assert_eq!(report.status, Status::Ok, "{report:?}");
    assert!(report.checks.iter().all(|check| check.mend.is_none()));
}

#[test]
fn names_of_checks_are_one_each() {
    let (host, _root) = good_host();
    let mut names: Vec<String> = examine(&host)
        .checks
        .into_iter()
        .map(|check| check.name)
        .collect();
    let count = names.len();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), count);
}

#[test]
fn kvm_that_is_absent_and_kvm_that_is_denied_are_mended_differently() {
    let failing = |kind: io::ErrorKind| only_trouble(|host| host.kvm = Err(kind.into()));
    let (absent, denied) = (
        failing(io::ErrorKind::NotFound),
        failing(io::ErrorKind::PermissionDenied),
    );
    assert_eq!(absent.name, "kvm");
    assert_eq!(
        [absent.status, denied.status],
        [Status::Missing, Status::Missing]
    );
    assert!(absent.mend.unwrap().contains("modprobe"));
    assert!(denied.mend.unwrap().contains("usermod -aG kvm"));
}

#[test]
fn userfaultfd_without_a_feature_names_it() {
    let check = only_trouble(|host| host.userfaultfd = Ok(vec!["WP_UNPOPULATED"]));
    assert_eq!(check.status, Status::Missing);
    assert!(check.found.contains("WP_UNPOPULATED"), "{}", check.found);
}

#[test]
fn userfaultfd_that_is_denied_says_which_file_to_open_up() {
    let denied = io::ErrorKind::PermissionDenied;
    let check = only_trouble(|host| host.userfaultfd = Err(denied.into()));
    assert_eq!(check.status, Status::Missing);
    assert!(check.mend.unwrap().contains("/dev/userfaultfd"));
}

#[test]
fn kernel_is_compared_by_numbers() {
    let status = |release: &str| {
        let (host, _root) = good_host();
        write(&host, "proc/sys/kernel/osrelease", release);
        check(&host, "kernel").status
    };
    assert_eq!(status("6.7.0"), Status::Ok);
    assert_eq!(status("6.18.44-fc-v657\n"), Status::Ok);
    assert_eq!(status("7.0-rc1\n"), Status::Ok);
    assert_eq!(status("6.6.63-lts\n"), Status::Missing);
    assert_eq!(status("5.10.0"), Status::Missing);
    assert_eq!(status("plan9"), Status::Warning);
}

#[test]
fn default_number_of_mappings_is_worth_a_word() {
    let check = only_trouble_of_file("proc/sys/vm/max_map_count", "65530\n");
    assert_eq!(check.name, "max_map_count");
    assert!(check.found.contains("65530"), "{}", check.found);
    assert!(check.mend.unwrap().contains("vm.max_map_count=1048576"));
}

#[test]
fn few_descriptors_are_told_for_the_process_and_for_the_host() {
    let process = only_trouble(|host| host.descriptors_max = Some(1024));
    assert!(process.found.contains("about 128 VMs"), "{}", process.found);
    let host = only_trouble_of_file("proc/sys/fs/file-nr", "9000\t0\t10000\n");
    assert!(
        host.found.contains("1000 free descriptors"),
        "{}",
        host.found
    );
}

#[test]
fn no_limit_of_descriptors_is_well() {
    let (mut host, _root) = good_host();
    host.descriptors_max = None;
    assert_eq!(check(&host, "descriptors").status, Status::Ok);
}

#[test]
fn huge_pages_that_are_off_or_absent_are_told() {
    let file = "sys/kernel/mm/transparent_hugepage/enabled";
    let off = only_trouble_of_file(file, "always madvise [never]\n");
    assert!(off.mend.unwrap().contains("echo madvise"));
    let absent = only_trouble(|host| fs::remove_file(host.root.join(file)).unwrap());
    assert_eq!(absent.name, "transparent_hugepage");
}

#[test]
fn kernel_ksm_is_a_trouble_only_if_it_takes_all_memory() {
    let (host, _root) = good_host();
    for run in ["0\n", "1\n", "2\n"] {
        write(&host, "sys/kernel/mm/ksm/run", run);
        assert_eq!(check(&host, "ksm").status, Status::Ok);
    }
    fs::remove_file(host.root.join("sys/kernel/mm/ksm/run")).unwrap();
    assert_eq!(check(&host, "ksm").status, Status::Ok);
    let all = only_trouble_of_file("proc/self/ksm_stat", "ksm_merge_any: yes\n");
    assert!(all.found.contains("across merge domains"), "{}", all.found);
}

#[test]
fn swap_is_a_trouble_once_something_is_in_it() {
    let swaps = |used: &str| {
        let head = "Filename\tType\tSize\tUsed\tPriority\n";
        format!("{head}/dev/sda2 partition 8388604 0 -2\n/swapfile file 1048572 {used} -3\n")
    };
    let (host, _root) = good_host();
    write(&host, "proc/swaps", &swaps("0"));
    assert_eq!(check(&host, "swap").status, Status::Ok);
    let used = only_trouble_of_file("proc/swaps", &swaps("2048"));
    assert!(used.found.starts_with("2.0 MiB "), "{}", used.found);
}

#[test]
fn small_pages_for_code_are_a_trouble_only_on_a_cpu_that_needs_none() {
    let parameter = "sys/module/kvm/parameters/nx_huge_pages";
    let needless = only_trouble_of_file(parameter, "Y\n");
    assert_eq!(needless.name, "nx_huge_pages");
    let (host, _root) = good_host();
    write(&host, parameter, "Y\n");
    let cpu = "sys/devices/system/cpu/vulnerabilities/itlb_multihit";
    write(&host, cpu, "KVM: Mitigation: Split huge pages\n");
    assert_eq!(check(&host, "nx_huge_pages").status, Status::Ok);
}

#[test]
fn slow_vm_creation_is_put_down_to_the_lock_of_cgroups_where_that_can_be() {
    let slow = Duration::from_millis(27);
    let trapped = only_trouble(|host| host.kvm = Ok(slow));
    assert_eq!(trapped.name, "create_vm");
    assert!(trapped.found.contains("27.0 ms"), "{}", trapped.found);
    let mend = trapped.mend.unwrap();
    assert!(mend.contains("remount,favordynmods") && mend.contains("nx_huge_pages=never"));

    // A CPU that needs the thread is not told to leave it out.
    let cpu = "sys/devices/system/cpu/vulnerabilities/itlb_multihit";
    let affected = only_trouble(|host| {
        host.kvm = Ok(slow);
        write(host, cpu, "KVM: Mitigation: Split huge pages\n");
    });
    assert!(!affected.mend.unwrap().contains("nx_huge_pages=never"));

    let no_thread = |host: &Host| {
        write(host, "sys/module/kvm/parameters/nx_huge_pages", "never\n");
    };
    let favoured = |host: &Host| {
        let line = "30 24 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate,favordynmods\n";
        write(host, "proc/self/mountinfo", line);
    };
    for mended in [&no_thread as &dyn Fn(&Host), &favoured] {
        let (mut host, _root) = good_host();
        host.kvm = Ok(slow);
        mended(&host);
        assert_eq!(check(&host, "create_vm").status, Status::Ok);
    }
}

#[test]
fn empty_host_is_judged_without_a_panic() {
    let root = tempfile::tempdir().unwrap();
    let host = Host {
        root: root.path().to_owned(),
        kvm: Err(io::ErrorKind::NotFound.into()),
        userfaultfd: Err(io::ErrorKind::Unsupported.into()),
        descriptors_max: None,
    };
    let report = examine(&host);
    assert_eq!(report.status, Status::Missing);
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["status"], "missing");
    assert_eq!(json["checks"][0]["name"], "kvm");
}
