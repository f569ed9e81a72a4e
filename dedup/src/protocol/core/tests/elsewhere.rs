//! Content that guests hold at different places.

use super::*;

/// Pages that lie elsewhere in every other guest.
const RUN: u32 = 16;

/// Has a region hold a run of contents in a block.
fn write_run(world: &mut World, region: usize, block: u32) {
    world.apply(&Step::Write {
        region,
        page: block * PAGES,
        pages: RUN,
        content: 3,
        stride: 1,
    });
}

fn of_regions(regions: usize) -> World {
    let mut world = World::of_blocks(2);
    while world.guests.len() < regions {
        world.register();
    }
    for guest in &world.guests {
        guest.memory.is_huge.store(false, Ordering::Relaxed);
    }
    world
}

#[test]
fn a_long_run_that_the_pool_has_is_mapped_and_its_own_places_are_not_filled() {
    let mut world = of_regions(4);
    (0..2).for_each(|region| write_run(&mut world, region, 0));
    world.check_settled();
    (2..4).for_each(|region| write_run(&mut world, region, 1));
    world.check_settled();
    world.check();
    let stats = world.shared.stats();
    assert_eq!(stats.pages_shared, u64::from(RUN), "{stats:?}");
    assert_eq!(stats.pages_sharing, 3 * u64::from(RUN), "{stats:?}");
}

#[test]
fn without_mappings_for_a_long_run_its_own_places_are_filled() {
    let mut world = of_regions(4);
    for region in [0, 2] {
        write_run(&mut world, region, 0);
    }
    world.check_settled();
    world.shared.lock_scanner().vmas.change(0, 980);
    // Nobody looks again at what these leave out.
    for region in [1, 3] {
        write_run(&mut world, region, 1);
    }
    (0..8).for_each(|_| world.pass());
    world.check();
    let stats = world.shared.stats();
    assert_eq!(stats.pages_over_vma_budget, 0, "{stats:?}");
    assert_eq!(stats.pages_shared, 2 * u64::from(RUN), "{stats:?}");
    assert_eq!(stats.pages_sharing, 2 * u64::from(RUN), "{stats:?}");
}

#[test]
fn content_that_comes_page_by_page_lies_in_the_order_of_the_oldest_guest() {
    let mut world = of_regions(4);
    for step in 0..RUN {
        let page = step * 7 % RUN;
        for region in 0..4u32 {
            // Each region is the first to have every fourth page.
            let region = (region + step) % 4;
            world.apply(&Step::Write {
                region: region as usize,
                page: page + 2 * region,
                pages: 1,
                content: 3 + u64::from(page),
                stride: 0,
            });
        }
        world.check_settled();
    }
    world.check();
    let stats = world.shared.stats();
    assert_eq!(stats.pages_shared, u64::from(RUN), "{stats:?}");
    for (region, guest) in (0..).zip(&world.guests) {
        let behind = |page: u32| match guest.memory.page(page_at(page + 2 * region)) {
            FakePage::Shared(place) => place.0,
            other => panic!("{other:?}"),
        };
        assert!(
            (0..RUN).all(|page| behind(page) == page),
            "{}",
            world.known()
        );
    }
}
