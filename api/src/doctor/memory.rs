//! What makes merging slow, narrow or unsafe.

use super::Check;
use super::host::Host;
use crate::bytes::in_units;

/// What several distributions set today. The kernel's own is 65530.
const MAPPINGS_ENOUGH: u64 = 1 << 20;
/// Below this it is worth a word: real guests that differ take up to some hundred mappings each.
const MAPPINGS_FEW: u64 = 1 << 18;

/// Whether a merge domain may have as many mappings as its VMs need.
pub(super) fn mappings(host: &Host) -> Check {
    let name = "max_map_count";
    let mend = format!(
        "sysctl -w vm.max_map_count={MAPPINGS_ENOUGH}; a file in /etc/sysctl.d makes it last."
    );
    match host.number("proc/sys/vm/max_map_count") {
        None => Check::warning(name, "vm.max_map_count cannot be read.", mend),
        Some(most) if most < MAPPINGS_FEW => Check::warning(
            name,
            format!(
                "vm.max_map_count is {most}. Pages that are equal at different places of their VMs \
                 take mappings, and stay unshared when a merge domain has none left."
            ),
            mend,
        ),
        Some(most) => Check::ok(name, format!("vm.max_map_count is {most}.")),
    }
}

/// Whether transparent huge pages are to be had by those who ask for them.
pub(super) fn huge_pages(host: &Host) -> Check {
    let name = "transparent_hugepage";
    match host
        .choice("sys/kernel/mm/transparent_hugepage/enabled")
        .as_deref()
    {
        None => Check::warning(
            name,
            "The kernel has no transparent huge pages. Clones merge slower, and their memory is \
             read slower afterwards.",
            "Use a kernel built with CONFIG_TRANSPARENT_HUGEPAGE.",
        ),
        Some("never") => Check::warning(
            name,
            "Transparent huge pages are off. A VM with huge_pages \"Transparent\" gets small ones.",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        ),
        Some(choice) => Check::ok(
            name,
            format!(
                "Transparent huge pages are set to {choice}. Each VM says whether it wants them."
            ),
        ),
    }
}

/// Whether kernel KSM does what the operator thinks it does.
pub(super) fn kernel_ksm(host: &Host) -> Check {
    let name = "ksm";
    let own = host.text("proc/self/ksm_stat").unwrap_or_default();
    let merges_any = own
        .lines()
        .filter_map(|line| line.split_once(':'))
        .any(|(key, value)| key == "ksm_merge_any" && value.trim() == "yes");
    if merges_any {
        return Check::warning(
            name,
            "Kernel KSM merges all memory of what is started here, and so across merge domains \
             (PR_SET_MEMORY_MERGE).",
            "Start samepage without it: no MemoryKSM=yes in its service or a service above it.",
        );
    }
    let found = match host.text("sys/kernel/mm/ksm/run").as_deref() {
        None => "The kernel has no KSM. Only VMs with merge \"ksm\" need it.",
        Some("1") => "Kernel KSM runs. It merges VMs with merge \"ksm\" and no others.",
        Some(_) => "Kernel KSM rests. It would merge VMs with merge \"ksm\" if its run were 1.",
    };
    Check::ok(name, found)
}

/// Whether guests' memory is on a disk.
pub(super) fn swap(host: &Host) -> Check {
    let name = "swap";
    let swaps = host.text("proc/swaps").unwrap_or_default();
    let areas: Vec<u64> = swaps.lines().skip(1).map(used_bytes).collect();
    let used: u64 = areas.iter().sum();
    if areas.is_empty() {
        return Check::ok(name, "There is no swap.");
    }
    if used == 0 {
        return Check::ok(name, "There is swap, and nothing is in it.");
    }
    Check::warning(
        name,
        format!(
            "{} are swapped out. Pages in swap are not merged, and guests wait for them.",
            in_units(i128::from(used))
        ),
        "Keep samepage out of it: memory.swap.max=0 in its cgroup, MemorySwapMax=0 in its service, \
         or swapoff -a.",
    )
}

/// The fourth column of a line of `/proc/swaps`, which is in KiB.
fn used_bytes(line: &str) -> u64 {
    let column = line.split_whitespace().nth(3);
    let kib = column.and_then(|text| text.parse::<u64>().ok());
    kib.unwrap_or(0).saturating_mul(1024)
}
