//! What makes the start of a VM slow: KVM's thread for huge pages, and the lock of cgroups.
//!
//! For each VM KVM makes a kernel thread that puts huge pages together again, unless
//! `kvm.nx_huge_pages` is `never`. The thread is moved into the VM's cgroup, under a lock that
//! Linux 6.0 made slow for writers. The mount option `favordynmods` makes it fast again
//! (Firecracker's issue 2129 and its `docs/prod-host-setup.md`).

use std::time::Duration;

use super::Check;
use super::host::Host;

const NX_HUGE_PAGES: &str = "sys/module/kvm/parameters/nx_huge_pages";
const ITLB_MULTIHIT: &str = "sys/devices/system/cpu/vulnerabilities/itlb_multihit";
/// `KVM_CREATE_VM` took 0.35 ms without the slow lock, and 27 ms with it.
const CREATE_VM_SLOW: Duration = Duration::from_millis(5);

/// Whether KVM keeps guests' code in small pages without need.
pub(super) fn nx_huge_pages(host: &Host) -> Check {
    let name = "nx_huge_pages";
    let Some(setting) = host.text(NX_HUGE_PAGES) else {
        return Check::ok(name, "This KVM has no nx_huge_pages.");
    };
    let is_on = ["Y", "1", "force", "auto"].contains(&setting.as_str());
    if is_on && is_cpu_safe(host) {
        return Check::warning(
            name,
            format!(
                "kvm.nx_huge_pages is {setting}. KVM keeps guests' code in small pages, against a \
                 fault that this CPU does not have."
            ),
            NEVER,
        );
    }
    let found = if is_on {
        "KVM keeps guests' code in small pages, because this CPU needs it (iTLB multihit)."
    } else {
        "KVM may keep guests' code in huge pages."
    };
    Check::ok(name, format!("kvm.nx_huge_pages is {setting}. {found}"))
}

/// What to do on a CPU without that fault.
const NEVER: &str = "Load KVM's module with nx_huge_pages=never, by options kvm nx_huge_pages=never \
                     in /etc/modprobe.d or kvm.nx_huge_pages=never on the kernel's command line.";

/// Whether making a VM waits for the lock of cgroups.
pub(super) fn cgroup_lock(host: &Host) -> Check {
    let name = "create_vm";
    let Ok(took) = &host.kvm else {
        return Check::ok(name, "No VM could be made, so its time is not known.");
    };
    let time = format!("KVM_CREATE_VM took {:.1} ms", took.as_secs_f64() * 1e3);
    let has_thread = host
        .text(NX_HUGE_PAGES)
        .is_some_and(|setting| setting != "never");
    if *took < CREATE_VM_SLOW {
        return Check::ok(name, format!("{time}."));
    }
    if !has_thread || favours_writers(host) {
        let found = format!("{time}, for no reason that is known here. A busy host may be one.");
        return Check::ok(name, found);
    }
    let remount = "Remount cgroups: mount -o remount,favordynmods /sys/fs/cgroup. Version 1 needs \
                   cgroup_favordynmods=true on the kernel's command line instead.";
    let mend = if is_cpu_safe(host) {
        format!("{remount} Or: {NEVER}")
    } else {
        remount.to_owned()
    };
    Check::warning(
        name,
        format!(
            "{time}. KVM moves a thread of its own into the VM's cgroup, and waits for a lock."
        ),
        mend,
    )
}

/// Whether the CPU lacks the fault that `nx_huge_pages` guards against.
fn is_cpu_safe(host: &Host) -> bool {
    host.text(ITLB_MULTIHIT).as_deref() == Some("Not affected")
}

/// Whether some hierarchy of cgroups is mounted with `favordynmods`. The lock is one for all.
fn favours_writers(host: &Host) -> bool {
    let mounts = host.text("proc/self/mountinfo").unwrap_or_default();
    // Behind the hyphen: type, source, options (`proc_pid_mountinfo(5)`).
    let mut types = mounts.lines().filter_map(|line| line.split_once(" - "));
    types.any(|(_, mount)| {
        let mut fields = mount.split_whitespace();
        let is_cgroup = matches!(fields.next(), Some("cgroup" | "cgroup2"));
        let mut options = fields.nth(1).unwrap_or_default().split(',');
        is_cgroup && options.any(|option| option == "favordynmods")
    })
}
