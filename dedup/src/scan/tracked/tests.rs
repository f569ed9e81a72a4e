//! Windows of watched regions.

use std::time::{Duration, Instant};

use crate::backing::fake::{FakeMemory, FakePool};
use crate::base::pace::Pace;
use crate::merge::domain::Scanner;
use crate::pages::backoff::Intervals;
use crate::protocol::control::{Control, Run};
use crate::protocol::core::Shared;

fn world(pages: u32) -> (Shared<Scanner<FakeMemory>>, FakeMemory) {
    world_of(pages, 1000)
}

fn world_of(pages: u32, vma_budget: u32) -> (Shared<Scanner<FakeMemory>>, FakeMemory) {
    let pool = FakePool::default();
    let mut scanner = Scanner::new(pool.clone(), vma_budget);
    scanner.intervals = Intervals::new(Duration::ZERO, Instant::now());
    scanner.map_after = 0;
    let shared = Shared::new(scanner, Control::new(Run::Merge, Pace::default()));
    let memory = FakeMemory::new(pages, &pool);
    shared.register(memory.clone(), Some(memory.source()));
    (shared, memory)
}

/// Waits that a page was given in 20 times three passes, before each of which it was written to
/// or, without a content to write, only called dirty.
fn waits(content: impl Fn(u64) -> Option<u64>) -> u64 {
    let (shared, memory) = world(4);
    let pass = || while shared.batch(u32::MAX).passes == 0 {};
    memory.write(1, 7);
    for version in 0..20 {
        match content(version) {
            Some(content) => memory.write(1, content),
            None => memory.name_dirty(1),
        }
        (0..3).for_each(|_| pass());
    }
    shared.stats().pages_skipped
}

#[test]
fn a_page_that_is_called_dirty_and_holds_what_it_held_is_not_put_off() {
    assert_eq!(waits(|_| None), 0);
    assert!(waits(|version| Some(100 + version)) > 2);
}

#[test]
fn no_stable_page_is_founded_with_a_page_that_changed_since() {
    let (shared, memory) = world(4);
    let pass = || while shared.batch(u32::MAX).passes == 0 {};
    let settle = || (0..4).for_each(|_| pass());
    memory.write(1, 7);
    settle();
    memory.write(1, 8);
    settle();
    memory.write(2, 7);
    settle();
    let stats = shared.stats();
    assert_eq!(
        (stats.pages_unshared, stats.pages_shared),
        (2, 0),
        "{stats:?}"
    );
    // Both can still be found.
    memory.write(0, 7);
    memory.write(3, 8);
    settle();
    let stats = shared.stats();
    assert_eq!(
        (stats.pages_shared, stats.pages_sharing),
        (2, 2),
        "{stats:?}"
    );
}

#[test]
fn pages_over_the_vma_budget_are_tried_once() {
    const PAGES: u32 = 9;
    // Two regions take two VMAs, and no page here has a neighbour to share one with.
    let (shared, one) = world_of(PAGES, 2);
    let pool = shared.lock_scanner().pool.clone();
    let other = FakeMemory::new(PAGES, &pool);
    shared.register(other.clone(), Some(other.source()));
    for page in (1..PAGES).step_by(2) {
        one.write(page, u64::from(page));
        other.write(PAGES - 1 - page, u64::from(page));
    }
    one.write(0, 100);
    other.write(0, 200);
    let scanned = || {
        (0..20).for_each(|_| while shared.batch(u32::MAX).passes == 0 {});
        let stats = shared.stats();
        let alone = stats.pages_unshared + stats.pages_over_vma_budget;
        assert_eq!((stats.pages_shared, alone), (0, 10), "{stats:?}");
        assert!(stats.pages_over_vma_budget >= 4, "{stats:?}");
        stats.pages_scanned
    };
    assert_eq!(scanned(), scanned());
}

#[test]
fn a_region_that_has_touched_little_of_its_memory_holds_nobody_up() {
    const BATCH_PAGES: u32 = 2048;
    let (shared, new) = world(64 * 1024);
    let pool = shared.lock_scanner().pool.clone();
    new.write(40_000, 1);
    for _ in 0..2 {
        let memory = FakeMemory::new(8, &pool);
        (0..8).for_each(|page| memory.write(page, u64::from(page) + 10));
        shared.register(memory.clone(), Some(memory.source()));
    }
    let mut batches = 0;
    while shared.stats().pages_sharing < 8 {
        shared.batch(BATCH_PAGES);
        batches += 1;
        assert!(batches <= 8, "{:?}", shared.stats());
    }
}

#[test]
fn what_is_equal_elsewhere_is_mapped_once_it_was_calm_for_long() {
    const PAGES: u32 = 8;
    let (shared, one) = world(PAGES);
    let mut scanner = shared.lock_scanner();
    scanner.map_after = 20;
    let pool = scanner.pool.clone();
    drop(scanner);
    let other = FakeMemory::new(PAGES, &pool);
    shared.register(other.clone(), Some(other.source()));
    for page in 0..PAGES {
        one.write(page, u64::from(page + 1));
        other.write(PAGES - 1 - page, u64::from(page + 1));
    }
    let pass = || while shared.batch(u32::MAX).passes == 0 {};
    (0..15).for_each(|_| pass());
    let stats = shared.stats();
    assert_eq!((stats.pages_shared, stats.pages_unshared), (0, 16));
    let scanned = stats.pages_scanned;
    (0..3).for_each(|_| pass());
    assert_eq!(
        shared.stats().pages_scanned,
        scanned,
        "nobody looks meanwhile"
    );
    (0..12).for_each(|_| pass());
    assert_eq!(shared.stats().pages_sharing, u64::from(PAGES));
}

#[test]
fn a_long_run_elsewhere_is_mapped_without_a_wait() {
    const RUN_PAGES: u32 = 20;
    let (shared, one) = world(2 * RUN_PAGES);
    let mut scanner = shared.lock_scanner();
    scanner.map_after = 1000;
    let pool = scanner.pool.clone();
    drop(scanner);
    let other = FakeMemory::new(2 * RUN_PAGES, &pool);
    shared.register(other.clone(), Some(other.source()));
    for page in 0..RUN_PAGES {
        one.write(page, u64::from(page + 1));
        other.write(page + RUN_PAGES, u64::from(page + 1));
    }
    (0..15).for_each(|_| while shared.batch(u32::MAX).passes == 0 {});
    let stats = shared.stats();
    assert_eq!(stats.pages_sharing, u64::from(RUN_PAGES), "{stats:?}");
    assert_eq!(stats.vmas, 3, "{stats:?}");
}

#[test]
fn what_is_written_to_a_page_that_is_put_off_is_not_asked_for() {
    let (shared, memory) = world(4);
    let pass = || while shared.batch(u32::MAX).passes == 0 {};
    let mut looks_ignored = 0;
    for version in 0..60 {
        memory.write(1, 100 + version);
        pass();
        looks_ignored += u32::from(memory.is_ignored(1));
    }
    assert!(looks_ignored > 40, "{looks_ignored} of 60 looks");
    // Left alone, it is found to be calm.
    (0..70).for_each(|_| pass());
    assert_eq!(shared.stats().pages_unshared, 1, "{:?}", shared.stats());
    assert!(!memory.is_ignored(1));
}

#[test]
fn a_merge_now_goes_on_when_a_pass_came_by_meanwhile() {
    const PAGES: u32 = 1024;
    let pool = FakePool::default();
    let mut scanner = Scanner::new(pool.clone(), 1000);
    scanner.intervals = Intervals::new(Duration::from_secs(3600), Instant::now());
    let shared = Shared::new(scanner, Control::new(Run::Merge, Pace::default()));
    let memory = FakeMemory::new(PAGES, &pool);
    let region = shared.register(memory.clone(), Some(memory.source()));
    memory.write(PAGES - 1, 7);
    let first = shared.turn(&region, 0).expect("the engine merges");
    let next = first.next.expect("a window is left");
    while shared.batch(u32::MAX).passes == 0 {}
    let second = shared.turn(&region, next).expect("the engine merges");
    assert_eq!(next, PAGES / 2);
    assert!(second.pages > 0, "{second:?}");
}
