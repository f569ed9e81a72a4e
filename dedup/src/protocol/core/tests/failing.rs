//! What fails costs its saving and nothing else.

use super::*;

fn write(region: usize, page: u32, pages: u32, content: Content) -> Step {
    let stride = u64::from(content != 0);
    Step::Write {
        region,
        page,
        pages,
        content,
        stride,
    }
}

/// Two regions without huge pages.
fn world() -> World {
    let world = World::new();
    for guest in &world.guests {
        guest.memory.is_huge.store(false, Ordering::Relaxed);
    }
    world
}

/// A state in which the next pass has one kind of merge to do.
#[derive(Clone, Copy, Debug)]
enum Merge {
    /// Equal pages at the same places of two regions, some of them zeros, some of their own: both
    /// blocks are based on new places.
    Basing,
    /// Equal pages of two regions at other places.
    Founding,
    /// Pages equal to stable pages at other places.
    Mapping,
    /// Pages of zeros that lie over nothing.
    Zeros,
    /// Pages that got their content back.
    Settling,
    /// Pages of zeros that lie over places.
    ZerosOverPlaces,
}

impl Merge {
    const ALL: [Merge; 6] = [
        Merge::Basing,
        Merge::Founding,
        Merge::Mapping,
        Merge::Zeros,
        Merge::Settling,
        Merge::ZerosOverPlaces,
    ];

    /// The calls of which each can make this merge fail.
    fn calls(self) -> Vec<Call> {
        let own: &[Call] = match self {
            Merge::Basing => &[
                Call::Fill,
                Call::Stage,
                Call::StageCopies,
                Call::StageZeros,
                Call::Replace,
            ],
            Merge::Founding => &[Call::Fill, Call::Map],
            Merge::Mapping => &[Call::Map],
            Merge::Zeros | Merge::Settling => &[Call::Discard],
            Merge::ZerosOverPlaces => &[Call::Stage, Call::StageZeros, Call::Replace],
        };
        [&[Call::Residency, Call::Protect], own].concat()
    }

    /// Brings a world to the pass before which the merge is due.
    fn due(self) -> World {
        let mut world = world();
        let settle = |world: &mut World, regions: &[usize]| {
            for &region in regions {
                world.apply(&write(region, 0, PAGES, 3));
            }
            world.check_settled();
        };
        match self {
            Merge::Basing => {
                for region in [0, 1] {
                    // One page is never touched.
                    world.apply(&write(region, 0, 11, 3));
                    world.apply(&write(region, 12, PAGES - 12, 3));
                    world.apply(&write(region, 5, 2, 1000 * (region as u64 + 1)));
                }
            }
            Merge::Founding => {
                world.apply(&write(0, 0, 3, 50));
                world.apply(&moved(1, 10, 3, 50, 0));
            }
            Merge::Mapping => {
                settle(&mut world, &[0, 1]);
                world.register();
                let memory = &world.guests[2].memory;
                memory.is_huge.store(false, Ordering::Relaxed);
                world.apply(&moved(2, 4, 3, 3, 2));
            }
            Merge::Zeros => world.apply(&write(0, 0, PAGES, 0)),
            Merge::Settling => {
                world.register();
                let memory = &world.guests[2].memory;
                memory.is_huge.store(false, Ordering::Relaxed);
                settle(&mut world, &[0, 1, 2]);
                world.apply(&write(0, 0, PAGES, 90));
                world.pass();
                world.apply(&write(0, 0, PAGES, 3));
            }
            Merge::ZerosOverPlaces => {
                settle(&mut world, &[0, 1]);
                world.apply(&write(0, 0, PAGES, 0));
            }
        }
        // Calm in the next one; what takes mappings waits for one more.
        sync::lock(&world.shared.control).waiters += 1;
        world.pass();
        if let Merge::Founding | Merge::Mapping = self {
            world.pass();
        }
        world
    }
}

/// Writes what `write` would have written at `from` to other pages.
fn moved(region: usize, page: u32, pages: u32, content: Content, from: u32) -> Step {
    Step::Write {
        region,
        page,
        pages,
        // The model adds the page's number.
        content: content + u64::from(from) - u64::from(page),
        stride: 1,
    }
}

/// Two regions of the same content, merged.
fn merged() -> World {
    let mut world = world();
    world.apply(&write(0, 0, PAGES, 3));
    world.apply(&write(1, 0, PAGES, 3));
    world.check_settled();
    world
}

/// What an aborted merge must not change.
fn merged_pages(world: &World) -> (u64, u64, u64, u64, usize) {
    let stats = world.shared.stats();
    let used_pages = world.pool.used_pages();
    (
        stats.pages_shared,
        stats.pages_sharing,
        stats.pages_zero,
        stats.vmas,
        used_pages,
    )
}

fn pages(world: &World) -> Vec<FakePage> {
    let of = |guest: &Guest| (0..PAGES).map(|page| guest.memory.page(page)).collect();
    world
        .guests
        .iter()
        .flat_map(|guest| -> Vec<FakePage> { of(guest) })
        .collect()
}

#[test]
fn every_kind_of_merge_is_made_in_the_pass_that_it_is_due_in() {
    for merge in Merge::ALL {
        let world = merge.due();
        let before = pages(&world);
        world.pass();
        assert_ne!(pages(&world), before, "{merge:?}");
        world.check();
    }
}

/// Invariant I19 of KSM.
#[test]
fn an_aborted_merge_leaves_its_pages_private_and_intact_and_the_counters_unchanged() {
    for merge in Merge::ALL {
        for call in merge.calls() {
            let world = merge.due();
            let before = (pages(&world), merged_pages(&world));
            for guest in &world.guests {
                guest.memory.fail(&[call], 0);
            }
            world.pass();
            assert_eq!(
                (pages(&world), merged_pages(&world)),
                before,
                "{merge:?} without {call:?}"
            );
            world.check();
            for guest in &world.guests {
                guest.memory.recover();
            }
            world.check_settled();
            assert_ne!(pages(&world), before.0, "{merge:?} after {call:?}");
        }
    }
}

#[test]
fn a_merge_that_fails_on_one_side_is_made_up_for_later() {
    for call in [Call::Protect, Call::Map] {
        for side in [0, 1] {
            let world = Merge::Founding.due();
            world.guests[side].memory.fail(&[call], 0);
            world.pass();
            let shared = |page| matches!(world.guests[side].memory.page(page), FakePage::Shared(_));
            assert!(!(0..PAGES).any(shared), "{call:?} on side {side}");
            world.check();
            world.guests[side].memory.recover();
            world.check_settled();
        }
    }
}

#[test]
fn pages_that_could_not_be_punched_are_filled_anew() {
    let mut world = merged();
    world.guests[0].memory.fail(&[Call::Punch], 0);
    world.unmerge();
    assert_eq!(world.pool.unpunched_pages(), PAGES as usize);
    world.guests[0].memory.recover();
    for region in [0, 1] {
        world.apply(&write(region, 0, PAGES, 50));
    }
    world.check_settled();
    assert_eq!(world.pool.unpunched_pages(), 0);
}

#[test]
fn pages_that_could_not_be_punched_are_punched_at_the_end_of_a_pass() {
    let mut world = merged();
    world.guests[0].memory.fail(&[Call::Punch], 0);
    // Each other page, so that they are as many runs.
    for page in (0..PAGES).step_by(2) {
        world.apply(&write(0, page, 1, 1000 + u64::from(page)));
        world.apply(&write(1, page, 1, 2000 + u64::from(page)));
    }
    world.pass();
    world.pass();
    assert_eq!(world.pool.unpunched_pages(), PAGES as usize / 2);
    world.guests[0].memory.recover();
    world.pass();
    assert_eq!(world.pool.unpunched_pages(), 0);
}

#[test]
fn a_block_that_cannot_be_healed_keeps_its_mappings_and_its_pages() {
    for call in [Call::Protect, Call::Stage, Call::StageCopies, Call::Replace] {
        let mut world = world();
        world.apply(&write(0, 0, PAGES, 3));
        // The same the other way round, so that one of them takes a mapping for each page.
        for page in 0..PAGES {
            world.apply(&Step::Write {
                region: 1,
                page,
                pages: 1,
                content: u64::from(3 + PAGES - 1 - page),
                stride: 0,
            });
        }
        world.check_settled();
        assert!(world.shared.stats().vmas > u64::from(PAGES), "scattered");
        world.apply(&write(0, 0, PAGES, 200));
        let vmas = world.shared.stats().vmas;
        world.guests[0].memory.fail(&[call], 0);
        world.pass();
        assert_eq!(world.shared.stats().vmas, vmas, "without {call:?}");
        world.check();
        world.guests[0].memory.recover();
        world.check_settled();
        assert!(world.shared.stats().vmas < vmas, "healed after {call:?}");
    }
}

#[test]
fn parts_of_a_batch_that_were_merged_before_one_failed_are_accounted_for() {
    for calls in 0..=PAGES.div_ceil(2) {
        let mut world = world();
        for page in (0..PAGES).step_by(2) {
            world.apply(&write(0, page, 1, 0));
        }
        sync::lock(&world.shared.control).waiters += 1;
        world.pass();
        world.guests[0].memory.fail(&[Call::Discard], calls);
        world.pass();
        assert_eq!(world.shared.stats().pages_zero, u64::from(calls));
        world.check();
        world.guests[0].memory.recover();
        world.check_settled();
        let zeros = u64::from(PAGES.div_ceil(2));
        assert_eq!(world.shared.stats().pages_zero, zeros);
    }
}

#[test]
fn pages_of_a_batch_that_settled_before_one_failed_are_accounted_for() {
    for calls in 0..=PAGES.div_ceil(2) {
        let mut world = world();
        world.register();
        for region in 0..3 {
            world.apply(&write(region, 0, PAGES, 3));
        }
        world.check_settled();
        let before = world.shared.stats().pages_sharing;
        for content in [90, 3] {
            for page in (0..PAGES).step_by(2) {
                world.apply(&write(0, page, 1, content));
            }
            sync::lock(&world.shared.control).waiters += 1;
            world.pass();
        }
        world.guests[0].memory.fail(&[Call::Discard], calls);
        world.pass();
        let left = u64::from(PAGES.div_ceil(2) - calls);
        assert_eq!(world.shared.stats().pages_sharing, before - left);
        world.check();
        world.guests[0].memory.recover();
        world.check_settled();
        assert_eq!(world.shared.stats().pages_sharing, before);
    }
}

/// Invariant I22 of KSM: `run` is the engine's part of it.
#[test]
fn a_failed_unmerge_leaves_what_is_still_merged_accounted_for() {
    for region in [0, 1] {
        for calls in 0..PAGES {
            for then_merges in [false, true] {
                let mut world = merged();
                // The cursor rests within the ring.
                world.shared.batch(1);
                let before = merged_pages(&world);
                world.guests[region].memory.fail(&[Call::Unshare], calls);
                world.shared.unmerge_all().expect_err("there is no memory");
                world.check();
                assert_eq!(
                    sync::lock(&world.shared.ring).current().map(|at| at.2),
                    Some(0)
                );
                // The region is one run: nothing of it is forgotten before all of it is unshared.
                let sharing = if region == 0 { before.1 } else { 0 };
                let stats = world.shared.stats();
                assert_eq!(
                    (stats.pages_shared, stats.pages_sharing),
                    (before.0, sharing)
                );
                world.guests[region].memory.recover();
                if then_merges {
                    world.apply(&Step::Exit { region: 1 - region });
                    world.check_settled();
                }
                world.unmerge();
                world.check();
            }
        }
    }
}
