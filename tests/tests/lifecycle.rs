//! Many VMs come and go; nothing of them stays. One test to a program: it counts what its own
//! process holds.

use pageload_workload::Workload;
use samepage_tests::guests::{eager_monitor, launch, pageload, wait_verified};
use samepage_tests::kvm;
use samepage_tests::proc::Holdings;
use samepage_tests::wait::{PATIENCE, wait_until};
use vmm::{Monitor, VmId};

const VMS: usize = 200;
/// Stacks and arenas that the C library keeps; 200 VMs that leak one mapping each are more.
const MAPPINGS_SLACK: usize = 100;

#[test]
fn two_hundred_vms_leave_no_thread_descriptor_mapping_pool_page_or_slot_behind() {
    if !kvm::is_present() {
        return;
    }
    let monitor = eager_monitor("lifecycle");
    let workload = |seed: usize| Workload {
        pace_ms: 0,
        ..Workload::writer(seed as u64)
    };
    // One that goes: whatever a monitor makes on first use is there now.
    let first = launch(&monitor, "first", pageload(&workload(0), 16));
    wait_verified(&monitor, std::slice::from_ref(&first), 1);
    end(&monitor, &first);
    settle(&monitor, 0);
    let before = Holdings::of(std::process::id()).expect("our own /proc");
    // One that stays, so that there is always something to merge with.
    let resident = launch(&monitor, "resident", pageload(&workload(1), 16));
    wait_verified(&monitor, std::slice::from_ref(&resident), 1);
    for number in 0..VMS {
        let workload = workload(number + 2);
        let id = launch(&monitor, &format!("vm{number}"), pageload(&workload, 16));
        // Some die at once, some at rest, some when the worker met them, some when they are merged.
        match number % 4 {
            0 => {}
            1 => wait_verified(&monitor, std::slice::from_ref(&id), 1),
            2 => wait_until("the worker met its pages", PATIENCE, || {
                monitor.merge_stats(&id).is_ok_and(|stats| stats.items > 0)
            }),
            _ => wait_until("some of its pages are merged", PATIENCE, || {
                monitor
                    .merge_stats(&id)
                    .is_ok_and(|stats| stats.pages_merging > 0)
            }),
        }
        end(&monitor, &id);
    }
    wait_verified(&monitor, std::slice::from_ref(&resident), 1);
    end(&monitor, &resident);
    settle(&monitor, 0);
    // The slot is gone first, then the worker lets go of what hung on it.
    let holdings = || Holdings::of(std::process::id()).expect("our own /proc");
    wait_until("nothing is left of 200 VMs", PATIENCE, || {
        holdings().leaked_since(&before, MAPPINGS_SLACK).is_empty()
    });
    let after = holdings();
    let stats = monitor.engine().stats();
    assert_eq!(
        (stats.vmas, stats.pages_shared, after.memfd_pages),
        (0, 0, 0),
        "{stats:?}"
    );
}

fn end(monitor: &Monitor, id: &VmId) {
    monitor.stop(id).expect("it stops");
    monitor.delete(id).expect("it goes");
}

/// Waits until the worker has finished what left.
fn settle(monitor: &Monitor, slots: u64) {
    wait_until("the worker finished every slot that left", PATIENCE, || {
        monitor.engine().stats().slots == slots
    });
}
