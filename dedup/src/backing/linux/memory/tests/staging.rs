//! Ranges that are built aside and put in place.

use std::sync::atomic::{AtomicBool, AtomicU32};

use super::*;
use crate::base::page::HUGE_PAGE_BYTES;

#[test]
fn writers_to_a_range_that_is_replaced_wait_and_then_write() {
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
fn copies_are_private_and_take_no_memory_of_the_pool() {
    let (memory, pool) = filled();
    pool.punch(PoolPage(5), 3).expect("it can be punched");
    let (_, blocks) = pool_use(&pool);
    memory.protect(0..PAGES).expect("it is registered");
    let own = [5..6, 6..8];
    build(&memory, &pool, 2..12, Some(PoolPage(2)), &own).expect("there are VMAs");
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
fn readers_see_what_they_saw_while_a_range_is_replaced() {
    const ROUNDS: u32 = 400;
    let (memory, pool) = filled();
    let (stop, rounds) = (AtomicBool::new(false), AtomicU32::new(0));
    thread::scope(|scope| {
        let reader = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for page in 0..PAGES {
                    assert_eq!(read(&memory, page), content(page), "page {page}");
                }
                rounds.fetch_add(1, Ordering::Relaxed);
            }
        });
        let is_seen = || rounds.load(Ordering::Relaxed) > 0;
        for round in (0..).take_while(|&round| round < ROUNDS || !is_seen()) {
            let own = [2 + round % 4..7, 9..10 + round % 5];
            memory.protect(0..PAGES).expect("it is registered");
            build(&memory, &pool, 0..PAGES, Some(PoolPage(0)), &own).expect("there are VMAs");
            memory.release(0..PAGES, true);
            memory.unshare(0..PAGES).expect("there is memory");
        }
        stop.store(true, Ordering::Relaxed);
        reader.join().expect("it saw nothing else");
    });
}

/// A range that cannot be mapped is as it was, and nothing of the staging range is left.
fn nothing_is_left_of_a_range_that_cannot_be_built(first: PoolPage) {
    let (memory, pool) = filled();
    let before = (pool_use(&pool), residencies(&memory));
    memory.protect(0..PAGES).expect("it is registered");
    let writer = sleeping_writer(&memory, 6);
    let failed = build(&memory, &pool, 2..12, Some(first), &[4..6, 7..8]);
    failed.expect_err("it must fail");
    memory.release(0..PAGES, true);
    assert_eq!(writer.recv_timeout(LONG), Ok(6));
    assert_eq!((pool_use(&pool), residencies(&memory)), before);
    for page in (0..PAGES).filter(|&page| page != 6) {
        assert_eq!(read(&memory, page), content(page), "page {page}");
    }
}

#[test]
fn a_range_over_places_past_the_pool_leaves_all_as_it_was() {
    nothing_is_left_of_a_range_that_cannot_be_built(PoolPage(
        crate::pages::item::POOL_PAGES_MAX - 1,
    ));
}

#[cfg(feature = "failpoints")]
#[test]
fn a_range_of_which_any_call_fails_leaves_all_as_it_was() {
    let scenario = fail::FailScenario::setup();
    for point in ["stage", "stage_copies", "mremap"] {
        fail::cfg(point, "return").expect("a known action");
        nothing_is_left_of_a_range_that_cannot_be_built(PoolPage(0));
        fail::remove(point);
    }
    scenario.teardown();
}

/// The zero page over a place: it shows the place neither when that is filled, nor when somebody reads
/// or writes next to it, and the pool gets no memory for it.
#[test]
fn pages_of_zeros_show_zeros_whatever_is_filled_into_their_places() {
    let (memory, pool) = filled();
    pool.punch(PoolPage(4), 6).expect("it can be punched");
    let (_, blocks) = pool_use(&pool);
    // SAFETY: pages of the range, which nobody uses meanwhile.
    let zeroed = unsafe {
        let (start, len_bytes) = memory.span(&(4..10));
        libc::memset(start.cast(), 0, len_bytes)
    };
    assert!(!zeroed.is_null());
    memory.protect(0..PAGES).expect("it is registered");
    let staging = memory
        .stage(&pool, 0..PAGES, Some(PoolPage(0)))
        .expect("there are VMAs");
    memory.stage_zeros(&staging, 4..9).expect("it is empty");
    memory.stage_copies(&staging, 9..10).expect("it is empty");
    // A second thought, of both kinds.
    memory.unstage(&staging, 8).expect("it is there");
    memory.stage_copies(&staging, 8..9).expect("it is empty");
    memory.unstage(&staging, 9).expect("it is there");
    memory.stage_zeros(&staging, 9..10).expect("it is empty");
    assert!(memory.equals_staged(&staging, 8));
    let sleeper = sleeping_writer(&memory, 5);
    memory.replace(staging).expect("there are VMAs");
    memory.release(0..PAGES, true);
    assert_eq!(sleeper.recv_timeout(LONG), Ok(5));
    let zeros = [4..5, 6..8, 9..10].map(|pages| (pages, Residency::ZeroPage));
    let found = residencies(&memory);
    assert!(zeros.iter().all(|zeros| found.contains(zeros)), "{found:?}");
    assert_eq!(pool_use(&pool).1, blocks, "no memory in the pool");
    memory.fill(0..1, &pool, PoolPage(4)).expect("memory");
    memory.fill(0..1, &pool, PoolPage(6)).expect("memory");
    for page in [4, 6, 7, 9] {
        assert_eq!(read(&memory, page), 0, "page {page}");
    }
    // A writer of the zero page waits as any other does, and gets a page of its own.
    memory.protect(0..PAGES).expect("it is registered");
    let sleeper = sleeping_writer(&memory, 6);
    memory.release(0..PAGES, false);
    assert_eq!(sleeper.recv_timeout(LONG), Ok(6));
    assert_eq!(read(&memory, 6), content(6) + 100);
}

#[test]
fn what_is_built_aside_begins_where_a_huge_page_can() {
    let (memory, pool) = filled();
    // Small mappings lie side by side where the kernel may choose.
    let under = [Some(PoolPage(0)), None, Some(PoolPage(512)), None];
    let stagings = under.map(|under| {
        memory
            .stage(&pool, 0..PAGES, under)
            .expect("there are VMAs")
    });
    for staging in &stagings {
        let start = staging.page_address(0).addr();
        assert!(start.is_multiple_of(HUGE_PAGE_BYTES), "{start:x}");
    }
}
