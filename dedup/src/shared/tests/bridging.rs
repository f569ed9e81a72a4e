//! Runs with pages between them that are their guests' own.

use super::*;
use crate::backing::Backing as _;
use crate::budget::{Headroom, MemoryGauge};

fn write(region: usize, page: u32, pages: u32, content: Content) -> Step {
    Step::Write {
        region,
        page,
        pages,
        content,
        stride: 1,
    }
}

/// Regions of the same content but for the pages of `own`, which differ in each. None is huge.
fn patchy(regions: usize, own: &[u32]) -> World {
    let mut world = World::new();
    while world.guests.len() < regions {
        world.register();
    }
    for region in 0..regions {
        let memory = &world.guests[region].memory;
        memory.is_huge.store(false, Ordering::Relaxed);
        world.apply(&write(region, 0, PAGES, 3));
        own.iter().for_each(|&page| {
            let content = 1000 * (region as u64 + 1);
            world.apply(&write(region, page, 1, content));
        });
    }
    world
}

fn bridged(world: &World) -> u32 {
    let of = |guest: &Guest| guest.memory.bridged.load(Ordering::Relaxed);
    world.guests.iter().map(of).sum()
}

fn vmas(world: &World) -> u64 {
    world.shared.stats().vmas
}

#[test]
fn regions_that_differ_in_scattered_pages_take_one_mapping_each() {
    let own = [2, 3, 9, 17];
    let world = patchy(4, &own);
    world.check_settled();
    assert_eq!(vmas(&world), 4, "each region is one run of the pool");
    assert!(bridged(&world) >= 4);
    for guest in &world.guests {
        for &page in &own {
            assert!(matches!(guest.memory.page(page), FakePage::Private(_)));
        }
    }
    world.unmerge();
    world.check();
    world.check_pool_is_free();
}

#[test]
fn a_page_that_is_shared_later_takes_the_place_that_was_left_for_it() {
    let mut world = patchy(4, &[2, 3, 9, 17]);
    world.check_settled();
    let metadata_bytes = world.shared.stats().metadata_bytes;
    let bridged_before = bridged(&world);
    // Alike in two regions first, then in all, and something else than at the others' place.
    for region in 0..4 {
        world.apply(&write(region, 9, 1, 5000));
        if region % 2 == 1 {
            world.check_settled();
            world.check();
        }
    }
    let page = world.guests[0].memory.page(9);
    assert!(matches!(page, FakePage::Shared(_)));
    for guest in &world.guests {
        assert_eq!(guest.memory.page(9), page);
    }
    assert_eq!(
        (vmas(&world), bridged(&world)),
        (4, bridged_before),
        "nothing was mapped"
    );
    assert!(world.shared.stats().metadata_bytes <= metadata_bytes + 64);
    while let Some(guest) = world.guests.pop() {
        world.shared.exit(&guest.region);
        world.shared.reap();
        world.check();
    }
    world.check_pool_is_free();
}

#[test]
fn pages_that_pair_where_others_have_their_own_find_holes_there() {
    let mut world = patchy(3, &[]);
    for region in 0..3u32 {
        for page in (2 * region..PAGES).step_by(6) {
            let content = 1000 * (u64::from(region) + 1);
            world.apply(&write(region as usize, page, 1, content));
        }
    }
    world.check_settled();
    for (region, guest) in (0..3).zip(&world.guests) {
        let own = |page| matches!(guest.memory.page(page), FakePage::Private(_));
        assert!((0..PAGES).all(|page| own(page) == (page % 6 == 2 * region)));
    }
    // A region may begin or end with a page of its own.
    assert!(vmas(&world) <= 6, "{}", vmas(&world));
    world.unmerge();
    world.check_pool_is_free();
}

#[test]
fn pages_that_lie_over_the_same_hole_become_stable_each_on_its_own() {
    let mut world = patchy(4, &[9]);
    world.check_settled();
    for region in 0..4 {
        world.apply(&write(region, 9, 1, 5000 + region as u64 % 2));
    }
    world.check_settled();
    world.check();
    let of = |region: usize| world.guests[region].memory.page(9);
    assert_eq!((of(0), of(1)), (of(2), of(3)));
    assert_ne!(of(0), of(1));
    world.unmerge();
    world.check_pool_is_free();
}

#[test]
fn what_a_guest_makes_of_a_page_over_a_hole_is_its_own() {
    let mut world = patchy(3, &[9]);
    world.check_settled();
    let used_pages = world.pool.used_pages();
    // Zeros, which are dropped, and not shown the pool's page instead; then something new.
    world.apply(&write(0, 9, 1, 0));
    world.check_settled();
    assert_eq!(world.guests[0].memory.page(9), FakePage::Absent);
    world.apply(&write(0, 9, 1, 7777));
    world.check_settled();
    assert_eq!(world.pool.used_pages(), used_pages);
    world.check();
}

#[test]
fn pages_of_zeros_between_shared_ones_get_no_memory() {
    let mut world = patchy(3, &[]);
    world.check_settled();
    // Watched: what it holds is guessed before anybody has seen that it is zeros.
    world.register();
    let memory = world.guests[3].memory.clone();
    memory.is_huge.store(false, Ordering::Relaxed);
    world.apply(&write(3, 0, PAGES, 3));
    for page in [5, 6, 11] {
        world.apply(&Step::Write {
            region: 3,
            page,
            pages: 1,
            content: 0,
            stride: 0,
        });
    }
    world.check_settled();
    for page in [5, 6, 11] {
        assert_eq!(memory.page(page), FakePage::Absent);
    }
}

#[test]
fn a_page_that_changes_before_its_run_is_protected_is_mapped_around() {
    // The one region is not watched, the other is.
    for changing in [0, 1] {
        let mut world = patchy(2, &[]);
        sync::lock(&world.shared.control).waiters += 1;
        world.pass();
        for (page, content) in [(4, 77), (5, 78), (12, 79)] {
            let guest = &mut world.guests[changing];
            guest.memory.write_before_protection(page, content);
            guest.expected[page as usize] = content;
        }
        world.pass();
        world.guests[changing].memory.finish_racing_writes();
        world.check();
        sync::lock(&world.shared.control).waiters -= 1;
        world.check_settled();
        assert!(bridged(&world) > 0);
    }
}

/// Says that there is no memory left.
#[derive(Debug)]
struct Full;

impl MemoryGauge for Full {
    fn headroom(&self, _budget_bytes: Option<u64>) -> Option<Headroom> {
        let as_of = Instant::now();
        Some(Headroom { bytes: 0, as_of })
    }
}

#[test]
fn a_region_that_exits_in_the_middle_of_a_merge_is_given_nothing_after_the_run_in_hand() {
    let mut world = patchy(2, &[]);
    world.check_settled();
    world.register();
    world.guests[2]
        .memory
        .is_huge
        .store(false, Ordering::Relaxed);
    world.apply(&write(2, 0, PAGES, 3));
    // Two runs to be mapped around a page each, with zeros between them, under one protection.
    for (page, content) in [(2, 1000), (5, 0), (9, 2000)] {
        world.apply(&write(2, page, 1, content));
    }
    let dying = &world.guests[2];
    let (region, memory) = (Arc::clone(&dying.region), dying.memory.clone());
    // The first two steps of an exit; the third would wait for the merge.
    world.pool.interrupt(Moment::Bridge, move || {
        region.set_exiting();
        memory.free_all();
    });
    world.pass();
    world.pass();
    let memory = &world.guests[2].memory;
    assert_eq!(memory.bridged.load(Ordering::Relaxed), 1);
    assert_eq!(memory.page(9), FakePage::Absent);
    assert!(memory.is_unprotected());
}

#[test]
fn nothing_is_copied_where_there_is_no_memory_for_it() {
    let world = patchy(2, &[2, 3, 9, 17]);
    world.shared.budget.set_gauge(Arc::new(Full));
    world.check_settled();
    assert_eq!(bridged(&world), 0);
    assert!(vmas(&world) > 2 * 4);
}
