//! Guests that write into merged pages while the worker merges and unmerges.

use std::time::Instant;

use dedup::Run;
use pageload_workload::{Layout, Workload};
use samepage_tests::guests::{eager_monitor, healthy_report, launch, pageload, wait_verified};
use samepage_tests::kvm;
use samepage_tests::wait::{PATIENCE, wait_until};

/// Times that memory is merged, written to and unmerged.
const CYCLES: u64 = 5;
/// Pages that the guests write together in a cycle, from when pages are merged.
const CYCLE_PAGES: u64 = 1000;

#[test]
fn guests_that_write_into_merged_pages_at_full_speed_never_read_a_wrong_word() {
    if !kvm::is_present() {
        return;
    }
    // Equal pages at the same place, and at others.
    for layout in [Layout::Same, Layout::Runs] {
        write_into_merged_pages(layout);
    }
}

fn write_into_merged_pages(layout: Layout) {
    let monitor = eager_monitor("writers");
    let ids = ["a", "b"].map(|id| {
        let seed = u64::from(id.as_bytes()[0]);
        // Every page is written to again and again; more at once, and none would rest long
        // enough to be merged on a loaded host.
        let workload = Workload {
            writes_per_pass: 64,
            layout,
            ..Workload::writer(seed)
        };
        launch(&monitor, id, pageload(&workload, 64))
    });
    wait_verified(&monitor, &ids, 1);
    let written = || -> u64 {
        let reports = ids.iter().filter_map(|id| healthy_report(&monitor, id));
        reports.map(|report| report.pages_written).sum()
    };
    // Counts cycles and pages instead of seconds: how much a second brings is the host's affair.
    for cycle in 0..CYCLES {
        wait_until("pages are merged", PATIENCE, || {
            written();
            // Nobody else has the engine map pages that were calm for a short time only.
            let deadline = Instant::now() + PATIENCE;
            assert!(monitor.engine().wait_full_scans(1, deadline));
            monitor.engine().stats().pages_sharing > 500
        });
        let before = written();
        wait_until("the guests wrote while pages were merged", PATIENCE, || {
            written() - before >= CYCLE_PAGES
        });
        monitor
            .engine()
            .set_run(Run::Unmerge)
            .expect("there is memory");
        assert_eq!(monitor.engine().stats().pages_shared, 0, "cycle {cycle}");
        monitor
            .engine()
            .set_run(Run::Merge)
            .expect("merging goes on");
    }
    wait_verified(&monitor, &ids, 1);
}

#[test]
fn unmerge_restores_private_memory_of_running_guests_and_leaves_the_pool_empty() {
    if !kvm::is_present() {
        return;
    }
    let monitor = eager_monitor("unmerge");
    let ids = ["a", "b", "c"].map(|id| {
        let seed = u64::from(id.as_bytes()[0]);
        launch(&monitor, id, pageload(&Workload::quiet(seed), 32))
    });
    wait_verified(&monitor, &ids, 1);
    let deadline = Instant::now() + PATIENCE;
    assert!(monitor.engine().wait_full_scans(3, deadline));
    assert!(monitor.engine().stats().pages_sharing > 5000);
    monitor
        .engine()
        .set_run(Run::Unmerge)
        .expect("there is memory");
    let stats = monitor.engine().stats();
    assert_eq!(
        (stats.pages_shared, stats.pages_sharing, stats.pages_zero),
        (0, 0, 0)
    );
    assert_eq!(stats.pool_bytes, 0);
    for id in &ids {
        assert_eq!(
            monitor.merge_stats(id).expect("it is there").pages_merging,
            0
        );
    }
    wait_verified(&monitor, &ids, 2);
}
