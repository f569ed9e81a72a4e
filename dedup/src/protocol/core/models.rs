//! The protocol under loom, which runs each model in every order of its threads' operations on
//! locks, condition variables and the exiting flag, up to a number of preemptions.
//!
//! Everything is the engine's own code but the memory and what is done with it: `toy`.
//! ARCHITECTURE.md tells which of KSM's invariants each model holds.

use loom::thread;

use super::*;
use crate::base::pace::Pace;
use crate::protocol::worker;

mod mutants;
mod toy;

use toy::World;

/// Preemptions in one run, where the environment (`LOOM_MAX_PREEMPTIONS`) does not say. Bugs in
/// protocols show with two as a rule; each more costs ten times the runs.
const PREEMPTIONS_MAX: usize = 3;

fn explore(model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound.get_or_insert(PREEMPTIONS_MAX);
    builder.check(model);
}

#[test]
fn an_exit_meets_the_scan_of_its_region() {
    explore(|| {
        let world = World::new(Run::Merge);
        let region = world.register();
        let worker = world.spawn(|shared| {
            shared.batch(1);
            shared.batch(1);
        });
        world.exit(region);
        worker.join().expect("the worker goes on");
        world.finish();
    });
}

#[test]
fn an_exit_meets_the_scan_of_a_region_that_has_items() {
    explore(|| {
        let world = World::new(Run::Merge);
        let region = world.register();
        world.shared.batch(1);
        let worker = world.spawn(|shared| {
            shared.batch(1);
        });
        world.exit(region);
        worker.join().expect("the worker goes on");
        world.finish();
    });
}

#[test]
fn an_exit_finds_the_cursor_on_its_slot() {
    explore(|| {
        let world = World::new(Run::Merge);
        let (dying, other) = (world.register(), world.register());
        // The cursor is in the middle of the first region, and will go on with it.
        world.shared.batch(1);
        let worker = world.spawn(|shared| {
            shared.batch(1);
        });
        world.exit(dying);
        worker.join().expect("the worker goes on");
        world.assert_linked(&other);
        world.exit(other);
        world.finish();
    });
}

#[test]
fn an_exit_meets_a_merge_that_has_its_region_as_partner() {
    explore(|| {
        let world = World::new(Run::Merge);
        let (scanned, partner) = (world.register(), world.register());
        world.visit_windows(4);
        world.merge_windows();
        let worker = world.spawn(|shared| {
            shared.batch(1);
        });
        world.exit(partner);
        worker.join().expect("the worker goes on");
        world.assert_linked(&scanned);
        world.exit(scanned);
        world.finish();
    });
}

#[test]
fn an_exit_meets_a_merge_now() {
    explore(|| {
        let world = World::new(Run::Merge);
        let (region, other) = (world.register(), world.register());
        let caller = {
            let (shared, region) = (world.shared.clone(), Arc::clone(&region));
            thread::spawn(move || shared.turn(&region, 0).is_ok())
        };
        let worker = world.spawn(|shared| {
            shared.batch(1);
        });
        world.exit(region);
        caller.join().expect("the caller is told");
        worker.join().expect("the worker goes on");
        world.assert_linked(&other);
        world.exit(other);
        world.finish();
    });
}

#[test]
fn an_exit_meets_a_discard() {
    explore(|| {
        let world = World::new(Run::Merge);
        let (region, other) = (world.register(), world.register());
        let caller = {
            let (shared, region) = (world.shared.clone(), Arc::clone(&region));
            thread::spawn(move || shared.discard(&region, &(0..1)).is_ok())
        };
        let worker = world.spawn(|shared| {
            shared.batch(1);
        });
        world.exit(region);
        caller.join().expect("the caller is told");
        worker.join().expect("the worker goes on");
        world.assert_linked(&other);
        world.exit(other);
        world.finish();
    });
}

#[test]
fn an_exit_meets_an_unmerge() {
    explore(|| {
        let world = World::new(Run::Merge);
        let region = world.register();
        world.shared.batch(1);
        let worker = world.spawn(|shared| {
            shared.set_run(Run::Unmerge).expect("there is memory");
        });
        world.exit(region);
        worker.join().expect("the unmerge ends");
        world.finish();
    });
}

#[test]
fn an_exit_needs_no_running_worker() {
    explore(|| {
        let world = World::new(Run::Merge);
        let region = world.register();
        world.shared.batch(1);
        world
            .shared
            .set_run(Run::Stop)
            .expect("stopping cannot fail");
        let worker = world.spawn(|shared| while worker::act(shared) {});
        world.exit(region);
        // The worker is not told to scan, but it must finish the region: nobody else will.
        world.wait_until_dropped(1);
        world.stop();
        worker.join().expect("the worker ends");
        world.assert_empty();
    });
}

#[test]
fn an_exit_meets_the_order_to_stop() {
    explore(|| {
        let world = World::new(Run::Merge);
        let region = world.register();
        world.shared.batch(1);
        let worker = world.spawn(|shared| {
            shared.set_run(Run::Stop).expect("stopping cannot fail");
            while worker::act(shared) {}
        });
        world.exit(region);
        world.wait_until_dropped(1);
        world.stop();
        worker.join().expect("the worker ends");
        world.assert_empty();
    });
}

#[test]
fn two_exits_of_one_region_free_it_once() {
    explore(|| {
        let world = World::new(Run::Merge);
        let region = world.register();
        let again = Arc::clone(&region);
        let second = world.spawn(move |shared| {
            shared.exit(&again);
        });
        world.shared.batch(1);
        world.shared.exit(&region);
        drop(region);
        second.join().expect("the second exit ends");
        world.finish();
    });
}

#[test]
fn two_regions_exit_at_once() {
    explore(|| {
        let world = World::new(Run::Merge);
        let (first, second) = (world.register(), world.register());
        world.shared.batch(1);
        let other = {
            let world = Arc::new(world.clone());
            thread::spawn(move || world.exit(second))
        };
        let worker = world.spawn(|shared| {
            shared.batch(1);
        });
        world.exit(first);
        other.join().expect("the other exit ends");
        worker.join().expect("the worker goes on");
        world.finish();
    });
}

#[test]
fn a_registration_meets_an_exit() {
    explore(|| {
        let world = World::new(Run::Merge);
        let dying = world.register();
        world.shared.batch(1);
        let worker = world.spawn(|shared| {
            shared.batch(1);
        });
        let newcomer = {
            let world = world.clone();
            thread::spawn(move || world.register())
        };
        world.exit(dying);
        let newcomer = newcomer.join().expect("the registration ends");
        worker.join().expect("the worker goes on");
        world.assert_linked(&newcomer);
        world.exit(newcomer);
        world.finish();
    });
}

#[test]
fn a_registration_meets_an_unmerge() {
    explore(|| {
        let world = World::new(Run::Merge);
        let dying = world.register();
        world.shared.batch(1);
        let worker = world.spawn(|shared| {
            shared.set_run(Run::Unmerge).expect("there is memory");
        });
        let newcomer = world.register();
        world.exit(dying);
        worker.join().expect("the unmerge ends");
        world.assert_linked(&newcomer);
        world.exit(newcomer);
        world.finish();
    });
}

#[test]
fn a_worker_that_starves_inside_a_region_is_fed_by_its_exit() {
    explore(|| {
        let world = World::with_frames(Run::Merge, 1);
        let region = world.register();
        region.backing().fill();
        world.starve_scans();
        let worker = world.spawn(|shared| {
            shared.batch(1);
        });
        world.exit(region);
        worker.join().expect("the worker is fed");
        world.finish();
    });
}

#[test]
fn an_unmerge_that_starves_inside_a_region_is_fed_by_its_exit() {
    explore(|| {
        let world = World::with_frames(Run::Merge, 1);
        let region = world.register();
        world.shared.batch(1);
        region.backing().fill();
        let worker = world.spawn(|shared| {
            shared.set_run(Run::Unmerge).expect("it is fed");
        });
        world.exit(region);
        worker.join().expect("the unmerge is fed");
        world.finish();
    });
}

#[test]
fn an_unmerge_that_starves_is_fed_by_the_exit_of_another_region() {
    explore(|| {
        let world = World::with_frames(Run::Merge, 2);
        let (starving, victim) = (world.register(), world.register());
        // Both windows of the first, and one of the second: both have items.
        world.visit_windows(3);
        (0..2).for_each(|_| victim.backing().fill());
        let worker = world.spawn(|shared| {
            shared.set_run(Run::Unmerge).expect("it is fed");
        });
        world.exit(victim);
        worker.join().expect("the unmerge is fed");
        world.exit(starving);
        world.finish();
    });
}

#[test]
fn a_failed_unmerge_leaves_the_next_exit_a_consistent_ring() {
    explore(|| {
        let world = World::new(Run::Merge);
        let (first, second) = (world.register(), world.register());
        world.visit_windows(3);
        first.backing().refuse();
        let worker = world.spawn(|shared| {
            let failed = shared.set_run(Run::Unmerge).is_err();
            let run = sync::lock(&shared.control).run;
            assert_eq!(run == Run::Stop, failed, "run is {run:?}");
        });
        world.exit(second);
        worker.join().expect("the unmerge ends");
        world.assert_linked(&first);
        world.exit(first);
        world.finish();
    });
}

#[test]
fn nothing_is_scanned_once_stopping_has_returned() {
    for run in [Run::Stop, Run::Unmerge] {
        explore(move || {
            let world = World::new(Run::Merge);
            let region = world.register();
            let worker = world.spawn(|shared| {
                shared.batch(2 * STEP_PAGES_MIN);
            });
            world.stop_scanning(run);
            worker.join().expect("the worker goes on");
            world.exit(region);
            world.finish();
        });
    }
}

#[test]
fn a_pin_meets_a_merge_of_its_page() {
    explore(|| {
        let world = World::new(Run::Merge);
        world.replace_pages();
        let region = world.register();
        let worker = world.spawn(|shared| {
            shared.batch(1);
        });
        World::do_io(&region);
        worker.join().expect("the worker goes on");
        world.exit(region);
        world.finish();
    });
}
