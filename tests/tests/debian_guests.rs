//! Debian guests that run a Python program: from one read-only image, alone and merged.

use samepage_tests::debian::{Agent, Progress, Round, expected_digests};
use samepage_tests::guests::{eager_monitor, launch};
use samepage_tests::wait::wait_until;
use samepage_tests::{debian, kvm, linux};
use vmm::{EndReason, Monitor, VmId};

/// What two guests share at least, in pages that need no memory of their own, and what of it is
/// mapped in each of them: the kernel, the files of Debian that both have read, and much of the
/// interpreter's memory. Less than half of what was measured.
const PAGES_SHARING_MIN: u64 = 3000;
const PAGES_MERGING_MIN: u64 = 2000;

/// The rounds that a guest has printed so far, each of them with the right digest.
fn checked_rounds(monitor: &Monitor, id: &VmId, expected: &[String]) -> Vec<Round> {
    let console = linux::console(monitor, id);
    let progress = Progress::parse(&console);
    assert!(
        progress.rounds.is_empty() || progress.is_ready,
        "{id}: {console}"
    );
    for (round, (number, digest)) in progress.rounds.iter().zip((1..).zip(expected)) {
        assert_eq!((round.number, &round.digest), (number, digest), "{id}");
    }
    progress.rounds
}

#[test]
fn a_debian_guest_runs_the_program_from_a_read_only_disk_and_powers_off_after_its_rounds() {
    if !kvm::is_present() {
        return;
    }
    let agent = Agent {
        seed: 7,
        rounds: 2,
        sleep_ms: 100,
    };
    let expected = expected_digests(agent.seed, agent.rounds);
    let image = &debian::guest().rootfs;
    let before = std::fs::read(image).unwrap();
    let monitor = eager_monitor("debian");
    let id = launch(&monitor, "agent", agent.config());

    let end = debian::end(&monitor, &id);

    let console = linux::console(&monitor, &id);
    assert_eq!(end, EndReason::GuestShutdown, "{console}");
    assert!(console.contains(&linux::exit_line(0)), "{console}");
    assert_eq!(checked_rounds(&monitor, &id, &expected).len(), 2);
    assert!(std::fs::read(image).unwrap() == before, "the image changed");
}

#[test]
fn two_debian_guests_share_their_pages_while_they_run_and_compute_right_digests() {
    if !kvm::is_present() {
        return;
    }
    // A guest ends when this many are not enough, which fails the test.
    const ROUNDS: u64 = 500;
    const ROUNDS_MERGED: usize = 3;
    let monitor = eager_monitor("agents");
    let guests = [1, 2].map(|seed| {
        let agent = Agent {
            seed,
            rounds: ROUNDS,
            sleep_ms: 1000,
        };
        let id = launch(&monitor, &format!("agent{seed}"), agent.config());
        (id, expected_digests(seed, ROUNDS))
    });
    let counts = || {
        guests.each_ref().map(|(id, expected)| {
            linux::assert_running(&monitor, id);
            checked_rounds(&monitor, id, expected).len()
        })
    };
    let is_merged = || {
        let merging = |id: &VmId| monitor.merge_stats(id).expect("it is there").pages_merging;
        monitor.engine().stats().pages_sharing >= PAGES_SHARING_MIN
            && guests
                .iter()
                .all(|(id, _)| merging(id) >= PAGES_MERGING_MIN)
    };

    wait_until("both guests work", debian::PATIENCE, || {
        counts().iter().all(|&rounds| rounds >= 1)
    });
    wait_until("both guests are merged", debian::PATIENCE, || {
        counts();
        is_merged()
    });
    let before = counts();
    wait_until("both guests go on", debian::PATIENCE, || {
        let mut progress = counts().into_iter().zip(before);
        progress.all(|(now, before)| now >= before + ROUNDS_MERGED)
    });

    assert!(is_merged(), "{:?}", monitor.engine().stats());
}
