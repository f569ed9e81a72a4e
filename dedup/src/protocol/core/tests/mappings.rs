//! Mappings that run out.

use super::*;
use crate::base::vmas::{VmaAccount, Vmas};

/// Two regions that have the same pages in opposite orders, so that none has a neighbour to share a
/// mapping with.
fn scattered(vmas: Vmas, is_watched: bool) -> World {
    let pool = FakePool::default();
    let mut scanner = Scanner::new(pool.clone(), 0);
    scanner.intervals = Intervals::new(Duration::ZERO, Instant::now());
    scanner.map_after = 0;
    scanner.vmas = vmas;
    let mut world = World {
        shared: Shared::new(scanner, Control::new(Run::Merge, Pace::default())),
        pool,
        guests: Vec::new(),
        registered: 0,
        blocks: 1,
    };
    let contents: Vec<Content> = (1..=u64::from(PAGES)).collect();
    for expected in [contents.clone(), contents.into_iter().rev().collect()] {
        let memory = FakeMemory::new(PAGES, &world.pool);
        for (page, &content) in (0..).zip(&expected) {
            memory.write(page, content);
        }
        let source = is_watched.then(|| memory.source());
        let region = world.shared.register(memory.clone(), source);
        world.guests.push(Guest {
            region,
            memory,
            expected,
        });
    }
    world
}

#[test]
fn pages_over_the_budget_count_once_and_are_merged_when_there_are_plenty_of_mappings() {
    for is_watched in [false, true] {
        let account = VmaAccount::new(1000);
        let mut others = Vmas::new(1000, StdArc::clone(&account));
        others.change(0, 998);
        let world = scattered(Vmas::new(1000, account), is_watched);
        (0..20).for_each(|_| world.pass());
        let stats = world.shared.stats();
        assert_eq!(stats.pages_sharing, 0, "{stats:?}");
        let over = stats.pages_over_vma_budget;
        assert!((1..=2 * u64::from(PAGES)).contains(&over), "{stats:?}");
        (0..20).for_each(|_| world.pass());
        assert_eq!(world.shared.stats().pages_over_vma_budget, over);
        drop(others);
        (0..20).for_each(|_| world.pass());
        world.check();
        let stats = world.shared.stats();
        assert_eq!(stats.pages_sharing, u64::from(PAGES), "{stats:?}");
        assert_eq!(stats.pages_over_vma_budget, 0, "{stats:?}");
    }
}

#[test]
fn two_domains_keep_within_what_the_process_may_have() {
    const LIMIT: u64 = 40;
    let account = VmaAccount::new(LIMIT);
    let worlds = [0, 1].map(|_| scattered(Vmas::new(1000, StdArc::clone(&account)), false));
    for _ in 0..10 {
        worlds.iter().for_each(World::pass);
        let used: u64 = worlds.iter().map(|world| world.shared.stats().vmas).sum();
        assert!(used <= LIMIT, "{used}");
    }
    let [one, other] = worlds.each_ref().map(|world| world.shared.stats());
    assert!(one.pages_sharing > 0, "{one:?}");
    assert!(other.pages_over_vma_budget > 0, "{other:?}");
    // What one domain leaves, the other may have.
    let [world, left] = worlds;
    drop(world);
    (0..20).for_each(|_| left.pass());
    assert!(left.shared.stats().pages_sharing > other.pages_sharing);
    left.check();
}

#[test]
fn after_the_kernel_refused_a_mapping_none_is_tried_in_that_pass() {
    for is_watched in [false, true] {
        let world = scattered(Vmas::new(1000, VmaAccount::new(1000)), is_watched);
        for _ in 0..5 {
            let refused = Err::<(), _>(io::Error::from_raw_os_error(libc::ENOMEM));
            world.shared.lock_scanner().vmas.note_tried(1, &refused);
            world.pass();
        }
        assert_eq!(world.shared.stats().pages_sharing, 0);
        (0..5).for_each(|_| world.pass());
        world.check();
        assert_eq!(world.shared.stats().pages_sharing, u64::from(PAGES));
    }
}

#[test]
fn pages_whose_mapping_the_kernel_refused_are_not_left_out() {
    for is_watched in [false, true] {
        let world = scattered(Vmas::new(1000, VmaAccount::new(1000)), is_watched);
        for guest in &world.guests {
            guest.memory.fail(&[Call::Map], 0);
        }
        (0..5).for_each(|_| world.pass());
        let stats = world.shared.stats();
        assert_eq!((stats.pages_sharing, stats.pages_over_vma_budget), (0, 0));
        for guest in &world.guests {
            guest.memory.recover();
        }
        (0..5).for_each(|_| world.pass());
        world.check();
        assert_eq!(world.shared.stats().pages_sharing, u64::from(PAGES));
    }
}

#[test]
fn the_mappings_of_a_region_that_left_count_until_it_is_gone() {
    let account = VmaAccount::new(100);
    let others = Vmas::new(100, StdArc::clone(&account));
    let mut world = scattered(Vmas::new(100, account), false);
    (0..5).for_each(|_| world.pass());
    let taken = i64::try_from(world.shared.stats().vmas).unwrap();
    assert!(taken > i64::from(PAGES));
    for guest in &world.guests {
        world.shared.exit(&guest.region);
    }
    world.shared.reap();
    assert_eq!(world.shared.stats().vmas, 0);
    assert!(
        !others.allow(101 - taken, 512),
        "somebody holds the regions"
    );
    world.guests.clear();
    assert!(others.allow(100, 512));
}
