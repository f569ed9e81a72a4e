//! What Samepage cannot do without: KVM, userfaultfd, a kernel, descriptors.

use std::io;

use super::Check;
use super::host::Host;

/// The first kernel with `PAGEMAP_SCAN`, as major and minor number.
const KERNEL_MIN: (u32, u32) = (6, 7);
/// Descriptors of a running VM with one vCPU and one drive, as `limits` has it.
const DESCRIPTORS_PER_VM: u64 = 8;
/// Fewer descriptors than for about 500 VMs are worth a word.
const DESCRIPTORS_FEW: u64 = 4096;

/// Whether VMs can be made.
pub(super) fn kvm(host: &Host) -> Check {
    let name = "kvm";
    let error = match &host.kvm {
        Ok(_) => return Check::ok(name, "/dev/kvm can be used."),
        Err(error) => error,
    };
    let mend = match error.kind() {
        io::ErrorKind::NotFound => {
            "Load KVM's module: modprobe kvm_intel, or kvm_amd. Inside a VM its own host must allow \
             nested virtualization; a container needs the device passed in."
        }
        io::ErrorKind::PermissionDenied => {
            "Let the user read and write /dev/kvm: usermod -aG kvm USER, then log in again."
        }
        _ => "Ask the kernel's log: dmesg | grep -i kvm.",
    };
    Check::missing(name, format!("/dev/kvm cannot be used: {error}."), mend)
}

/// Whether writers can be stopped page by page.
pub(super) fn userfaultfd(host: &Host) -> Check {
    let name = "userfaultfd";
    match &host.userfaultfd {
        Ok(missing) if missing.is_empty() => {
            Check::ok(name, "userfaultfd can be used, with write protection.")
        }
        Ok(missing) => Check::missing(
            name,
            format!("The kernel's userfaultfd lacks {}.", missing.join(", ")),
            "Use Linux 6.7 or newer, built with CONFIG_PTE_MARKER_UFFD_WP.",
        ),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Check::missing(
            name,
            format!("/dev/userfaultfd cannot be used: {error}."),
            "Let the user read and write it: chgrp kvm /dev/userfaultfd, chmod 660 \
             /dev/userfaultfd; a udev rule makes that last.",
        ),
        Err(error) => Check::missing(
            name,
            format!("There is no userfaultfd: {error}."),
            "Use a kernel built with CONFIG_USERFAULTFD.",
        ),
    }
}

/// Whether the kernel is new enough.
pub(super) fn kernel(host: &Host) -> Check {
    let name = "kernel";
    let (major, minor) = KERNEL_MIN;
    let mend = format!("Use Linux {major}.{minor} or newer.");
    let Some(release) = host.text("proc/sys/kernel/osrelease") else {
        return Check::warning(name, "The kernel does not tell its version.", mend);
    };
    match version_of(&release) {
        Some(version) if version >= KERNEL_MIN => Check::ok(name, format!("Linux {release}.")),
        Some(_) => Check::missing(name, format!("Linux {release} has no PAGEMAP_SCAN."), mend),
        None => Check::warning(name, format!("{release:?} is no version of Linux."), mend),
    }
}

/// Major and minor number of a release such as `6.12.9-amd64`.
fn version_of(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let major = numbers.next()?.parse().ok()?;
    let minor = numbers.next()?.parse().ok()?;
    Some((major, minor))
}

/// Whether there are descriptors for many VMs.
pub(super) fn descriptors(host: &Host) -> Check {
    let name = "descriptors";
    let vms = |descriptors: u64| descriptors / DESCRIPTORS_PER_VM;
    if let Some(most) = host.descriptors_max.filter(|most| *most < DESCRIPTORS_FEW) {
        return Check::warning(
            name,
            format!(
                "A process may have {most} descriptors, enough for about {} VMs.",
                vms(most)
            ),
            "Raise the hard limit: ulimit -Hn 1048576, or LimitNOFILE=1048576 in a service.",
        );
    }
    if let Some(free) = free_of_host(host).filter(|free| *free < DESCRIPTORS_FEW) {
        return Check::warning(
            name,
            format!(
                "The host has {free} free descriptors, enough for about {} VMs.",
                vms(free)
            ),
            "Raise the limit of the host: sysctl -w fs.file-max=9000000.",
        );
    }
    let most = host.descriptors_max;
    let most = most.map_or("as many descriptors as it wants".to_owned(), |most| {
        format!("{most} descriptors, enough for about {} VMs", vms(most))
    });
    Check::ok(name, format!("A process may have {most}."))
}

/// `fs.file-nr` is: allocated, allocated but unused (always 0), most (`admin-guide/sysctl/fs.rst`).
fn free_of_host(host: &Host) -> Option<u64> {
    let text = host.text("proc/sys/fs/file-nr")?;
    let mut numbers = text.split_whitespace().map(str::parse::<u64>);
    let allocated = numbers.next()?.ok()?;
    let most = numbers.nth(1)?.ok()?;
    Some(most.saturating_sub(allocated))
}
