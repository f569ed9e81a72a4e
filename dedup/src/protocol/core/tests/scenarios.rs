//! Single turns of events that random steps hardly ever take.

use super::*;
use crate::backing::Backing as _;

#[test]
fn an_exit_while_the_cursor_rests_on_the_region_leaves_it_to_the_worker() {
    let mut world = World::new();
    world.apply(&Step::Write {
        region: 0,
        page: 0,
        pages: PAGES,
        content: 3,
        stride: 1,
    });
    world.pass();
    assert_eq!(
        world.shared.exit(&world.guests[0].region),
        ExitPath::HandedOver
    );
    assert_eq!(world.shared.stats().slots, 2);
    world.shared.batch(1);
    assert_eq!(
        world.shared.stats().slots,
        1,
        "the handed-over slot is finished first"
    );
}

#[test]
fn a_second_exit_of_a_region_does_nothing() {
    let world = World::new();
    assert_eq!(world.shared.exit(&world.guests[0].region), ExitPath::Fast);
    assert_eq!(
        world.shared.exit(&world.guests[0].region),
        ExitPath::HandedOver
    );
    assert_eq!(world.shared.stats().slots, 1);
}

#[test]
fn a_region_that_frees_its_pages_in_the_middle_of_a_merge_gives_nobody_its_zeros() {
    for (dying, moment) in [0, 1]
        .into_iter()
        .flat_map(|dying| [(dying, Moment::Fill), (dying, Moment::Compare)])
    {
        let mut world = World::filled();
        // Calm from the next pass on, in which the pages of both are merged.
        world.pass();
        let (region, memory) = (
            Arc::clone(&world.guests[dying].region),
            world.guests[dying].memory.clone(),
        );
        if dying == 1 {
            // Equal to what the dying founder's page shows once it is freed.
            world.guests[0].memory.write_before_protection(5, 0);
            world.guests[0].expected[5] = 0;
        }
        // The first two steps of an exit; the third would wait for the merge.
        world.pool.interrupt(moment, move || {
            region.set_exiting();
            memory.free_all();
        });
        world.pass();
        let survivor = &world.guests[1 - dying];
        survivor.memory.finish_racing_writes();
        for page in 0..PAGES {
            assert_eq!(
                survivor.memory.content(page),
                survivor.expected[page as usize]
            );
        }
        assert!(survivor.memory.is_unprotected());
    }
}

#[test]
fn a_page_that_was_somebodys_partner_in_its_own_visit_is_counted_once() {
    let mut world = World::new();
    world.register();
    let write = |region, page, content| {
        let (pages, stride) = (1, 0);
        Step::Write {
            region,
            page,
            pages,
            content,
            stride,
        }
    };
    let [first, second, last] = [0, 1, 2];
    world.apply(&write(first, 5, 3));
    world.apply(&write(second, 0, 3));
    world.apply(&write(second, 1, 3));
    world.pass();
    // The second region's pages find the first's, which has changed: they stay in the index.
    world.shared.batch(1);
    world.apply(&write(first, 5, 99));
    world.shared.batch(1);
    // The last one leaves when it is next. The pass goes on at the first region, and the second
    // region's pages meet their own entries.
    world.apply(&Step::ExitStopped { region: last });
    world.check_settled();
}

#[test]
fn a_merge_that_fails_half_way_leaves_no_page_in_the_pool() {
    let mut world = World::new();
    for region in [0, 1] {
        world.apply(&Step::Write {
            region,
            page: 0,
            pages: 5,
            content: 3,
            stride: 1,
        });
    }
    world.pass();
    // Page 2 changes under the merge, which falls into two parts; mapping the first one fails.
    world.guests[1].memory.write_before_protection(2, 77);
    world.guests[1].expected[2] = 77;
    world.guests[0]
        .memory
        .calls_left
        .store(0, Ordering::Relaxed);
    world.pass();
    world.check();
    world.guests[0]
        .memory
        .calls_left
        .store(u32::MAX, Ordering::Relaxed);
    world.check_settled();
}

#[test]
fn two_pages_that_change_alike_under_a_merge_do_not_found_a_page_under_their_old_name() {
    let mut world = World::new();
    for region in [0, 1] {
        world.apply(&Step::Write {
            region,
            page: 0,
            pages: 3,
            content: 3,
            stride: 1,
        });
    }
    world.pass();
    for guest in [0, 1] {
        world.guests[guest].memory.write_before_protection(1, 3);
        world.guests[guest].expected[1] = 3;
    }
    world.pass();
    world.check_settled();
}

#[test]
fn a_shared_page_that_the_kernel_is_moving_keeps_its_stable_page() {
    let world = World::filled();
    world.check_settled();
    for guest in &world.guests {
        guest.memory.moving.store(true, Ordering::Relaxed);
    }
    world.pass();
    for guest in &world.guests {
        guest.memory.moving.store(false, Ordering::Relaxed);
    }
    world.check();
    world.check_settled();
}

/// Passes until a page that was written to in region 0 is merged again.
fn passes_until_merged(world: &World) -> u32 {
    (1..100)
        .find(|_| {
            world.pass();
            world.shared.stats().pages_sharing == u64::from(PAGES)
        })
        .expect("it is merged again")
}

#[test]
fn a_page_that_breaks_again_and_again_is_merged_less_and_less_often_until_it_calms() {
    // The first region is not watched, the second is.
    for busy in [0, 1] {
        let mut world = World::new();
        let write = |region, page, pages| Step::Write {
            region,
            page,
            pages,
            content: 3,
            stride: 1,
        };
        world.apply(&write(0, 0, PAGES));
        world.apply(&write(1, 0, PAGES));
        world.check_settled();
        let mut waits = Vec::new();
        for _ in 0..4 {
            world.apply(&write(busy, 7, 1));
            waits.push(passes_until_merged(&world));
        }
        assert!(waits.is_sorted() && waits[3] >= 16, "{busy}: {waits:?}");
        assert!(world.shared.stats().pages_skipped > 0);
        for _ in 0..600 {
            world.pass();
        }
        world.apply(&write(busy, 7, 1));
        assert!(passes_until_merged(&world) <= waits[0]);
        // Who waits for full scans does not wait for busy pages.
        for _ in 0..4 {
            world.apply(&write(busy, 7, 1));
            world.check_settled();
        }
    }
}

#[test]
fn a_page_that_changes_in_every_pass_is_left_out_of_most() {
    let mut world = World::new();
    for content in 1..80 {
        world.apply(&Step::Write {
            region: 0,
            page: 3,
            pages: 1,
            content,
            stride: 0,
        });
        world.pass();
    }
    let skipped = world.shared.stats().pages_skipped;
    assert!(skipped > 60, "{skipped} of 79 visits");
}

#[test]
fn a_region_is_merged_now_while_the_worker_rests() {
    // The first region is not watched, the second is.
    for late in [0, 1] {
        let world = World::filled();
        let merge_now = |region: usize| world.shared.merge_now(&world.guests[region].region);
        let first = merge_now(1 - late).expect("the engine merges");
        assert_eq!((first.pages_merging, first.pages_gained), (0, 0));
        let second = merge_now(late).expect("the engine merges");
        assert_eq!(second.pages_merging, u64::from(PAGES));
        assert_eq!(second.pages_gained, i64::from(PAGES));
        assert_eq!(second.pages_volatile, 0);
        world.check();
        world.set_run(Run::Stop);
        let stopped = world.shared.merge_now(&world.guests[late].region);
        assert_eq!(stopped, Err(MergeNowError::NotMerging));
    }
}

#[test]
fn a_region_that_exits_after_a_merge_now_leaves_nothing() {
    let mut world = World::new();
    world.apply(&Step::Write {
        region: 0,
        page: 0,
        pages: PAGES,
        content: 3,
        stride: 0,
    });
    let region = Arc::clone(&world.guests[0].region);
    world.shared.merge_now(&region).expect("the engine merges");
    assert!(world.pool.used_pages() > 0);
    assert_eq!(world.shared.exit(&region), ExitPath::HandedOver);
    let late = world.shared.merge_now(&region);
    assert_eq!(late, Err(MergeNowError::Exiting));
    world.shared.reap();
    assert_eq!(world.shared.stats().slots, 1);
    assert_eq!(world.pool.used_pages(), 0);
}

#[test]
fn a_broken_block_is_healed() {
    const PAGES: u32 = 512;
    let world = World::new();
    let regions = [1, 389].map(|step| {
        let memory = FakeMemory::new(PAGES, &world.pool);
        (0..PAGES).for_each(|page| memory.write(page, 1 + u64::from(page * step % PAGES)));
        (world.shared.register(memory.clone(), None), memory)
    });
    (0..8).for_each(|_| while world.shared.batch(1000).passes == 0 {});
    let stats = world.shared.stats();
    assert_eq!(stats.pages_sharing, u64::from(PAGES), "{stats:?}");
    let scattered = regions
        .iter()
        .max_by_key(|(region, _)| sync::lock(&region.stats).vmas);
    let (region, memory) = scattered.expect("there are two");
    assert!(sync::lock(&region.stats).vmas > 100);
    (0..PAGES).for_each(|page| memory.write(page, 1_000_000 + u64::from(page)));
    (0..4).for_each(|_| while world.shared.batch(1000).passes == 0 {});
    let vmas = sync::lock(&region.stats).vmas;
    assert_eq!(vmas, 1);
    (0..PAGES).for_each(|page| {
        assert_eq!(memory.content(page), 1_000_000 + u64::from(page));
    });
}
