//! Blocks that are based on places, with pages between them that are their guests' own.

use super::*;
use crate::backing::Backing as _;
use crate::base::budget::{Headroom, MemoryGauge};

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

/// How often blocks were built aside.
fn replaced(world: &World) -> u32 {
    let of = |guest: &Guest| guest.memory.replaced.load(Ordering::Relaxed);
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
    assert_eq!(vmas(&world), 4, "each region is one mapping of places");
    assert_eq!(replaced(&world), 4, "each was built once");
    for guest in &world.guests {
        for &page in &own {
            assert!(matches!(guest.memory.page(page), FakePage::Private(_)));
        }
    }
    world.unmerge();
    world.check();
    world.check_settled();
    assert_eq!(replaced(&world), 4, "what is based stays so");
    leave(world);
}

#[test]
fn a_page_that_is_shared_later_takes_the_place_that_was_left_for_it() {
    let mut world = patchy(4, &[2, 3, 9, 17]);
    world.check_settled();
    let metadata_bytes = world.shared.stats().metadata_bytes;
    let replaced_before = replaced(&world);
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
        (vmas(&world), replaced(&world)),
        (4, replaced_before),
        "nothing was mapped"
    );
    assert!(world.shared.stats().metadata_bytes <= metadata_bytes + 64);
    leave(world);
}

/// All regions leave, one by one.
fn leave(mut world: World) {
    while let Some(guest) = world.guests.pop() {
        world.shared.exit(&guest.region);
        world.shared.reap();
        world.check();
    }
    world.check_pool_is_free();
}

#[test]
fn pages_that_pair_where_others_have_their_own_fill_their_places() {
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
    leave(world);
}

#[test]
fn of_two_contents_at_one_place_one_takes_it_and_the_other_a_mapping() {
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
    leave(world);
}

#[test]
fn zeros_over_a_place_are_given_back_once_they_are_enough_and_never_show_it() {
    let mut world = patchy(3, &[9]);
    world.check_settled();
    let (replaced_before, zeros) = (replaced(&world), world.shared.stats().pages_zero);
    world.apply(&write(0, 3, 1, 0));
    for _ in 0..4 {
        world.pass();
    }
    assert_eq!(world.guests[0].memory.page(3), FakePage::Private(0));
    assert_eq!(
        replaced(&world),
        replaced_before,
        "one page is not worth it"
    );
    world.apply(&write(0, 0, PAGES / 2, 0));
    for _ in 0..4 {
        world.pass();
    }
    for page in 0..PAGES / 2 {
        assert_eq!(world.guests[0].memory.page(page), FakePage::Zeros);
    }
    assert_eq!(replaced(&world), replaced_before + 1);
    let zeros_now = world.shared.stats().pages_zero;
    assert_eq!(zeros_now, zeros + u64::from(PAGES / 2));
    // Something new there is the guest's own, until somebody has the same.
    world.apply(&write(0, 9, 1, 7777));
    world.check_settled_but_for_zeros();
    world.apply(&write(1, 9, 1, 7777));
    world.check_settled_but_for_zeros();
    let page = world.guests[0].memory.page(9);
    assert!(matches!(page, FakePage::Shared(_)));
    assert_eq!(vmas(&world), 3);
    leave(world);
}

/// Whatever is filled into a place shows nowhere but where it was.
#[test]
fn a_place_that_is_filled_later_shows_nobody_anything() {
    let mut world = patchy(4, &[2, 3]);
    // Never touched in one of them, zeros in another, its own in the third.
    let fresh = 4;
    world.register();
    let memory = world.guests[fresh].memory.clone();
    memory.is_huge.store(false, Ordering::Relaxed);
    world.apply(&write(fresh, 4, PAGES - 4, 3));
    world.apply(&write(0, 2, 2, 0));
    world.check_settled();
    assert_eq!(
        memory.page(2),
        FakePage::Zeros,
        "nothing is absent over a place"
    );
    for region in [2, 3] {
        world.apply(&write(region, 2, 2, 9000));
    }
    world.check_settled();
    assert!(matches!(
        world.guests[2].memory.page(2),
        FakePage::Shared(_)
    ));
    assert_eq!(memory.page(2), FakePage::Zeros);
    assert_eq!(vmas(&world), 5);
    leave(world);
}

#[test]
fn a_page_that_changes_before_its_block_is_protected_is_copied_again() {
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
        assert!(replaced(&world) > 0);
        leave(world);
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
fn a_region_that_exits_while_a_block_is_built_is_given_nothing() {
    let mut world = patchy(2, &[]);
    world.check_settled();
    world.register();
    let memory = world.guests[2].memory.clone();
    memory.is_huge.store(false, Ordering::Relaxed);
    world.apply(&write(2, 0, PAGES, 3));
    world.apply(&write(2, 2, 1, 1000));
    let region = Arc::clone(&world.guests[2].region);
    // The first two steps of an exit; the third would wait for the merge.
    world.pool.interrupt(Moment::Stage, {
        let memory = memory.clone();
        move || {
            region.set_exiting();
            memory.free_all();
        }
    });
    world.pass();
    world.pass();
    world.pass();
    assert_eq!(memory.replaced.load(Ordering::Relaxed), 0);
    assert_eq!(memory.page(2), FakePage::Absent);
    assert!(memory.is_unprotected());
}

#[test]
fn nothing_is_copied_where_there_is_no_memory_for_it_and_pages_are_merged_all_the_same() {
    let world = patchy(2, &[2, 3, 9, 17]);
    world.shared.budget.set_gauge(Arc::new(Full));
    world.check_settled();
    assert_eq!(replaced(&world), 0);
    assert!(vmas(&world) > 2 * 4);
    leave(world);
}

#[test]
fn a_block_with_two_images_has_places_for_both() {
    let mut world = patchy(6, &[]);
    for region in 0..6 {
        let content = 1000 * (region as u64 % 2 + 1);
        world.apply(&write(region, 0, PAGES, content));
        world.apply(&write(region, 7, 1, 100_000 + region as u64 * 1000));
    }
    world.check_settled();
    let states: Vec<_> = world
        .guests
        .iter()
        .map(|guest| guest.memory.page(3))
        .collect();
    assert_eq!(vmas(&world), 6, "{states:?}");
    let blocks = world
        .shared
        .lock_scanner()
        .stable
        .layouts
        .blocks_of(0)
        .len();
    assert_eq!(blocks, 2);
    leave(world);
}

fn kept_pages(world: &World) -> u64 {
    world.shared.lock_scanner().stable.kept_pages()
}

#[test]
fn zeros_over_a_place_outlive_what_it_held_and_what_comes_after_that() {
    let mut world = patchy(4, &[2]);
    world.apply(&write(3, 9, 1, 0));
    world.check_settled();
    let own = |world: &mut World| {
        for region in 0..3 {
            world.apply(&write(region, 9, 1, 5000 + 100 * region as u64));
        }
        world.check_settled();
        assert_eq!(world.guests[3].memory.page(9), FakePage::Zeros);
        assert_eq!(kept_pages(world), 1, "nobody shares it");
    };
    own(&mut world);
    for region in 0..3 {
        world.apply(&write(region, 9, 1, 7000));
    }
    world.check_settled();
    assert_eq!(world.guests[3].memory.page(9), FakePage::Zeros);
    assert_eq!((kept_pages(&world), vmas(&world)), (0, 4));
    own(&mut world);
    world.apply(&write(3, 9, 1, 90_000));
    world.check_settled();
    assert_eq!(kept_pages(&world), 0, "it is punched");
    leave(world);
}

#[test]
fn what_is_kept_under_zeros_goes_with_an_unmerge_and_with_the_last_region() {
    for unmerges in [true, false] {
        let mut world = patchy(4, &[2]);
        world.apply(&write(3, 9, 1, 0));
        world.check_settled();
        for region in 0..3 {
            world.apply(&write(region, 9, 1, 5000 + 100 * region as u64));
        }
        world.check_settled();
        assert_eq!(kept_pages(&world), 1);
        if unmerges {
            world.unmerge();
            world.check();
        }
        leave(world);
    }
}

/// Who shows zeros over a place is sought by the one page number that the place stands for.
#[test]
fn a_block_is_not_based_on_equal_places_of_another_number() {
    let mut world = World::of_blocks(2);
    world.register();
    // One region's first block holds what the other's second one holds, page by page.
    world.apply(&write(0, 0, 12, 50));
    world.apply(&write(1, PAGES, 12, 50));
    world.check_settled();
    assert!(world.shared.stats().pages_sharing >= 12);
    // Places next to them come and go. The one region never touched the page at that distance from the
    // start of its block, nor did the other.
    for content in [7000, 8000] {
        for (regions, index) in [([0, 2], 22), ([1, 2], PAGES + 20)] {
            for apart in [0, 100] {
                for region in regions {
                    let content = content + apart * (1 + region as u64);
                    world.apply(&write(region, index, 1, content));
                }
                world.check_settled();
            }
        }
    }
    leave(world);
}

#[test]
fn places_that_are_gone_are_nobodys_base() {
    let mut world = World::of_blocks(2);
    while world.guests.len() < 6 {
        world.register();
    }
    for (regions, index, content) in [([0, 5], PAGES, 100), ([2, 3], 0, 3000)] {
        for region in regions {
            world.apply(&write(region, index, PAGES, content));
        }
    }
    world.check_settled();
    // The first region's last block is mapped elsewhere, and the places that it was based on are free.
    world.apply(&Step::Exit { region: 5 });
    world.apply(&write(0, PAGES, PAGES, 3000));
    world.check_settled();
    assert_eq!(world.shared.lock_scanner().stable.layouts.blocks_of(1), []);
    // Others get them, for another block.
    for region in [1, 4] {
        world.apply(&write(region, 0, PAGES, 60_000));
    }
    world.check_settled();
    assert_eq!(
        world
            .shared
            .lock_scanner()
            .stable
            .layouts
            .blocks_of(0)
            .len(),
        2
    );
    world.apply(&write(0, PAGES, 16, 0));
    world.check_settled();
    for region in [1, 4] {
        world.apply(&write(region, 5, 1, 70_000 * region as u64));
    }
    world.check_settled();
    leave(world);
}
