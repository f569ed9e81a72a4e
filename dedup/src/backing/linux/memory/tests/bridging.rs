//! Runs that are mapped around pages of the guest's own.

use std::sync::atomic::{AtomicBool, AtomicU64};

use super::*;

#[test]
fn writers_to_a_bridged_range_wait_and_then_write() {
    for remapped in [true, false] {
        release_wakes_everybody(0..PAGES, &[4..6, 8..9], remapped);
        release_wakes_everybody(3..9, &[5..6, 7..8], remapped);
    }
}

/// How often a pool is mapped privately, and the memory that it takes in blocks of 512 bytes.
fn pool_use(pool: &LinuxPool) -> (usize, u64) {
    let metadata = pool.file().and_then(|file| file.metadata());
    let metadata = metadata.expect("it is open");
    let inode = std::os::unix::fs::MetadataExt::ino(&metadata).to_string();
    let maps = fs::read_to_string("/proc/self/maps").expect("this is Linux");
    let is_private = |line: &&str| {
        let mut words = line.split_whitespace();
        words.nth(1).is_some_and(|flags| flags.ends_with('p')) && words.nth(2) == Some(&inode)
    };
    let mappings = maps.lines().filter(is_private).count();
    (mappings, std::os::unix::fs::MetadataExt::blocks(&metadata))
}

fn residencies(memory: &LinuxMemory) -> Vec<(PageRange, Residency)> {
    let mut found = Vec::new();
    memory
        .residency(0..PAGES, &mut found)
        .expect("the kernel tells");
    found
}

#[test]
fn pages_that_a_run_is_mapped_around_stay_private_and_take_no_memory_of_the_pool() {
    let (memory, pool) = filled();
    pool.punch(PoolPage(5), 3).expect("it can be punched");
    let (_, blocks) = pool_use(&pool);
    memory.protect(0..PAGES, false).expect("it is registered");
    memory
        .bridge(&pool, 2..12, PoolPage(2), &[5..6, 6..8])
        .expect("there are VMAs");
    memory.release(0..PAGES, true);
    assert_eq!(pool_use(&pool), (1, blocks));
    let private = [0..2, 5..8, 12..PAGES].map(|pages| (pages, Residency::Private));
    assert_eq!(residencies(&memory), private);
    for page in 0..PAGES {
        assert_eq!(read(&memory, page), content(page), "page {page}");
    }
    // A guest's write is its own, whatever lies under its page.
    for page in 0..PAGES {
        write(&memory, page, 1000);
        let place = pool.page_address(PoolPage(page)).cast::<u64>();
        let is_punched = (5..8).contains(&page);
        // SAFETY: a word of the pool's view, which lives as long as the pool.
        let pooled = (!is_punched).then(|| unsafe { place.read_volatile() });
        assert!(pooled.is_none_or(|pooled| pooled == content(page)));
    }
    assert_eq!(pool_use(&pool).1, blocks);
}

#[test]
fn readers_see_what_they_saw_while_pages_are_mapped_around_others() {
    const ROUNDS: u32 = 400;
    const READS: u64 = 10 * PAGES as u64;
    let (memory, pool) = filled();
    let (stop, reads) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let pages = (0..PAGES).cycle();
            for page in pages.take_while(|_| !stop.load(Ordering::Relaxed)) {
                assert_eq!(read(&memory, page), content(page), "page {page}");
                reads.fetch_add(1, Ordering::Relaxed);
            }
        });
        // On a loaded host the reader may get its first turn late.
        let deadline = Instant::now() + LONG;
        let is_idle = || reads.load(Ordering::Relaxed) < READS && !reader.is_finished();
        let mut round = 0;
        while round < ROUNDS || is_idle() && Instant::now() < deadline {
            let own = [2 + round % 4..7, 9..10 + round % 5];
            memory.protect(0..PAGES, true).expect("it is registered");
            memory
                .bridge(&pool, 0..PAGES, PoolPage(0), &own)
                .expect("there are VMAs");
            memory.release(0..PAGES, true);
            memory.unshare(0..PAGES).expect("there is memory");
            round += 1;
        }
        stop.store(true, Ordering::Relaxed);
        reader.join().expect("it saw nothing else");
    });
    assert!(reads.into_inner() >= READS, "the reader did read");
}

/// A range that cannot be mapped is as it was, and nothing of the staging range is left.
fn nothing_is_left_of_a_bridge_that_fails(first: PoolPage) {
    let (memory, pool) = filled();
    let before = (pool_use(&pool), residencies(&memory));
    memory.protect(0..PAGES, false).expect("it is registered");
    let writer = sleeping_writer(&memory, 6);
    let failed = memory.bridge(&pool, 2..12, first, &[4..6, 7..8]);
    failed.expect_err("it must fail");
    memory.release(0..PAGES, true);
    assert_eq!(writer.recv_timeout(LONG), Ok(6));
    assert_eq!((pool_use(&pool), residencies(&memory)), before);
    for page in (0..PAGES).filter(|&page| page != 6) {
        assert_eq!(read(&memory, page), content(page), "page {page}");
    }
}

#[test]
fn a_bridge_to_places_past_the_pool_leaves_all_as_it_was() {
    nothing_is_left_of_a_bridge_that_fails(PoolPage(crate::item::POOL_PAGES_MAX - 1));
}

#[cfg(feature = "failpoints")]
#[test]
fn a_bridge_of_which_any_call_fails_leaves_all_as_it_was() {
    let scenario = fail::FailScenario::setup();
    for point in ["bridge", "bridge_move"] {
        fail::cfg(point, "return").expect("a known action");
        nothing_is_left_of_a_bridge_that_fails(PoolPage(0));
        fail::remove(point);
    }
    scenario.teardown();
}
