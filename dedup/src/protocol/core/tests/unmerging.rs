//! What an unmerge leaves behind.

use std::sync::Mutex;

use super::*;

impl World {
    /// The regions' counters add up to the domain's.
    fn check_sums(&self) {
        let stats = self.shared.stats();
        let of_regions = self.guests.iter();
        let of_regions = of_regions.map(|guest| *sync::lock(&guest.region.stats));
        let merging: u64 = of_regions.map(|stats| stats.pages_merging).sum();
        assert_eq!(merging, stats.pages_shared + stats.pages_sharing);
    }
}

/// Two regions of so many blocks with the same pages, merged. No two blocks are alike.
fn merged(blocks: u32) -> World {
    let mut world = World::of_blocks(blocks);
    for (region, block) in (0..2).flat_map(|region| (0..blocks).map(move |block| (region, block))) {
        world.apply(&Step::Write {
            region,
            page: PAGES * block,
            pages: PAGES,
            content: 3 + u64::from(100 * block),
            stride: 1,
        });
    }
    world.check_settled();
    world
}

#[test]
fn nothing_of_a_region_that_exits_during_an_unmerge_counts_after_it() {
    let world = merged(1);
    let exiting = Arc::clone(&world.guests[0].region);
    world.pool.interrupt(Moment::Unshare, move || {
        exiting.set_exiting();
    });
    world.shared.unmerge_all().expect("the model has memory");
    let stats = world.shared.stats();
    assert_eq!(
        (stats.pages_shared, stats.pages_sharing),
        (0, 0),
        "{stats:?}"
    );
    assert_eq!(stats.slots, 1);
}

#[test]
fn the_counters_of_regions_add_up_after_an_unmerge_that_failed() {
    let mut world = merged(1);
    // Two runs, of which the second fails.
    world.apply(&Step::Write {
        region: 0,
        page: 10,
        pages: 1,
        content: 1000,
        stride: 0,
    });
    world.check_settled();
    world.check_sums();
    world.guests[0].memory.fail(&[Call::Unshare], 15);
    world.shared.unmerge_all().expect_err("no memory");
    world.guests[0].memory.recover();
    world.check_sums();
}

/// Notes what the pool holds whenever pages get private copies.
fn note_used_pages(pool: &FakePool, used: &StdArc<Mutex<Vec<usize>>>) {
    let (of, into) = (pool.clone(), StdArc::clone(used));
    pool.interrupt(Moment::Unshare, move || {
        into.lock().expect("nobody panics").push(of.used_pages());
        note_used_pages(&of, &into);
    });
}

#[test]
fn the_last_region_gives_the_pool_back_block_by_block() {
    let world = merged(2);
    let used = StdArc::default();
    note_used_pages(&world.pool, &used);
    world.unmerge();
    let used = used.lock().expect("nobody panics");
    let (all, last) = (used[0], used[used.len() - 1]);
    assert!(last <= all / 2, "{used:?}");
}
