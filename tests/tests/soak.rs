//! The long run: no merge may ever change what a guest reads.

use std::time::{Duration, Instant};

use dedup::Run;
use pageload_workload::{Layout, Workload};
use samepage_tests::guests::{eager_monitor, healthy_report, launch, pageload, wait_verified};
use samepage_tests::kvm;
use samepage_tests::wait::{PATIENCE, wait_until};
use vmm::{Monitor, VmId};

const GUESTS: u64 = 8;
/// What the run takes where `SAMEPAGE_SOAK_SECONDS` does not say otherwise.
const SOAK_SECONDS: u64 = 600;

fn soak_time() -> Duration {
    let seconds = std::env::var("SAMEPAGE_SOAK_SECONDS").ok();
    let seconds = seconds.map(|text| text.parse().expect("SAMEPAGE_SOAK_SECONDS: a number"));
    Duration::from_secs(seconds.unwrap_or(SOAK_SECONDS))
}

fn writer(seed: u64) -> Workload {
    // More writes, and on two cores no page would rest long enough to be merged.
    let writes_per_pass = 16;
    let layout = [Layout::Same, Layout::Runs, Layout::Shuffled][(seed % 3) as usize];
    Workload {
        layout,
        writes_per_pass,
        ..Workload::writer(seed)
    }
}

/// Merges, lets a VM come and go in the middle of it, and unmerges.
fn cycle(monitor: &Monitor, guests: &[VmId], number: u64) {
    monitor
        .engine()
        .set_run(Run::Merge)
        .expect("merging goes on");
    let visitor = launch(monitor, "visitor", pageload(&writer(1000 + number), 16));
    wait_until("pages are merged", PATIENCE, || {
        for id in guests {
            healthy_report(monitor, id);
        }
        monitor.engine().stats().pages_sharing > 1000
    });
    monitor.stop(&visitor).expect("it stops");
    monitor.delete(&visitor).expect("it goes");
    if number.is_multiple_of(4) {
        monitor
            .engine()
            .set_run(Run::Unmerge)
            .expect("there is memory");
    }
    wait_verified(monitor, guests, 1);
}

#[test]
#[ignore = "takes ten minutes"]
fn eight_guests_that_write_without_a_pause_never_read_a_wrong_word() {
    if !kvm::is_present() {
        return;
    }
    let monitor = eager_monitor("soak");
    let guests: Vec<VmId> = (0..GUESTS)
        .map(|seed| launch(&monitor, &format!("vm{seed}"), pageload(&writer(seed), 64)))
        .collect();
    wait_verified(&monitor, &guests, 1);
    let (begun, time) = (Instant::now(), soak_time());
    let mut cycles = 0;
    while begun.elapsed() < time {
        cycle(&monitor, &guests, cycles);
        cycles += 1;
    }
    let reports = guests.iter().filter_map(|id| healthy_report(&monitor, id));
    let (mut written, mut verified) = (0, 0);
    for report in reports {
        written += report.pages_written;
        verified += report.verified_pages;
    }
    println!(
        "{cycles} cycles in {:?}: {written} pages written, {verified} verified, 0 errors; {:?}",
        begun.elapsed(),
        monitor.engine().stats()
    );
    assert!(cycles > 0 && written > 0);
}
