//! No writer is left asleep, whatever fails.

use std::fs;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use super::*;
use crate::backing::Pool;

const PAGES: u32 = 16;
/// Longest that a writer may take to fall asleep, or to wake up.
const LONG: Duration = Duration::from_secs(10);

/// Memory with a content of its own in each page, and a pool with the same in its first pages.
fn filled() -> (Arc<LinuxMemory>, LinuxPool) {
    let mapping = Mapping::new(pages_to_bytes(PAGES)).expect("address space is there");
    let userfaultfd = Arc::new(Userfaultfd::open().expect("this host has userfaultfd"));
    let memory = LinuxMemory::new(mapping, userfaultfd).expect("the kernel takes the range");
    let pool = LinuxPool::new().expect("there is memory");
    for page in 0..PAGES {
        write(&memory, page, content(page));
    }
    memory
        .fill(0..PAGES, &pool, PoolPage(0))
        .expect("there is memory");
    (Arc::new(memory), pool)
}

fn content(page: u32) -> u64 {
    u64::from(page) + 1
}

fn write(memory: &LinuxMemory, page: u32, word: u64) {
    let address: *mut u64 = memory.mapping.address(page).cast();
    // SAFETY: the first word of a page of the range, which is mapped until `memory` is dropped.
    unsafe { address.write_volatile(word) };
}

fn read(memory: &LinuxMemory, page: u32) -> u64 {
    let mut words = [0; crate::page::PAGE_WORDS];
    memory.read(page, &mut words);
    words[0]
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + LONG;
    while !done() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        thread::yield_now();
    }
}

/// A thread that writes to a page and then says so. Returns once it sleeps in the fault.
fn sleeping_writer(memory: &Arc<LinuxMemory>, page: u32) -> Receiver<u32> {
    sleeping(memory, move |memory| {
        write(memory, page, content(page) + 100);
        page
    })
}

/// A thread that touches a page, and tells what comes of it. Returns once it sleeps in the fault.
fn sleeping<T: Send + 'static>(
    memory: &Arc<LinuxMemory>,
    touch: impl FnOnce(&LinuxMemory) -> T + Send + 'static,
) -> Receiver<T> {
    let (tell_thread, thread) = channel();
    let (tell_done, done) = channel();
    let memory = Arc::clone(memory);
    thread::spawn(move || {
        let own = fs::read_link("/proc/thread-self").expect("this is Linux");
        tell_thread.send(own).expect("the test waits for it");
        // Nobody listens when the test has failed.
        let _ = tell_done.send(touch(&memory));
    });
    let sleeper = thread.recv().expect("it has begun");
    let stat = std::path::Path::new("/proc").join(sleeper).join("stat");
    wait_until("the thread falls asleep", || {
        assert!(done.try_recv().is_err(), "the page is not protected");
        let text = fs::read_to_string(&stat).unwrap_or_default();
        // A page fault that waits for its handler can be interrupted, or else can't.
        let state = text
            .rsplit(") ")
            .next()
            .and_then(|rest| rest.chars().next());
        matches!(state, Some('S' | 'D'))
    });
    done
}

/// Protects everything, has one writer fall asleep in each of some pages, maps `shared` to the pool
/// but for `own`, and releases everything as `remapped`. All writers must wake and find what was
/// there.
fn release_wakes_everybody(shared: PageRange, own: &[PageRange], remapped: bool) {
    let (memory, pool) = filled();
    memory.protect(0..PAGES, false).expect("it is registered");
    let pages = [0, 5, 6, 7, PAGES - 1];
    let writers = pages.map(|page| sleeping_writer(&memory, page));
    if !shared.is_empty() {
        let first = PoolPage(shared.start);
        let mapped = match own {
            [] => memory.share(&pool, shared, first),
            _ => memory.bridge(&pool, shared, first, own),
        };
        mapped.expect("there are VMAs");
    }
    memory.release(0..PAGES, remapped);
    for (page, writer) in pages.into_iter().zip(writers) {
        let woken = writer.recv_timeout(LONG);
        assert_eq!(woken, Ok(page), "the writer of page {page} sleeps");
    }
    for page in 0..PAGES {
        let written = if pages.contains(&page) { 100 } else { 0 };
        assert_eq!(read(&memory, page), content(page) + written, "page {page}");
        // And nobody sleeps from now on.
        let (tell_done, done) = channel();
        let theirs = Arc::clone(&memory);
        thread::spawn(move || {
            write(&theirs, page, 7);
            let _ = tell_done.send(());
        });
        assert_eq!(done.recv_timeout(LONG), Ok(()), "page {page} is protected");
    }
    // What is registered anew can be protected and released again.
    memory.protect(0..PAGES, true).expect("it is mapped");
    memory.release(0..PAGES, false);
}

#[test]
fn a_release_wakes_writers_of_all_pages() {
    for shared in [0..0, 4..8, 0..PAGES] {
        release_wakes_everybody(shared, &[], true);
    }
}

/// The release meets a mapping that is not registered and fails, without a fault being injected.
#[test]
fn a_release_that_the_kernel_refuses_wakes_writers_of_all_pages() {
    for shared in [0..1, 4..8, 8..PAGES, 0..PAGES] {
        release_wakes_everybody(shared, &[], false);
    }
}

#[cfg(feature = "failpoints")]
#[test]
fn a_release_of_which_any_call_fails_wakes_writers_of_all_pages() {
    let scenario = fail::FailScenario::setup();
    for point in ["register_again", "release"] {
        fail::cfg(point, "return").expect("a known action");
        for shared in [0..1, 4..8, 8..PAGES, 0..PAGES] {
            release_wakes_everybody(shared, &[], true);
        }
        fail::remove(point);
    }
    scenario.teardown();
}

/// As if registering it again had failed after its mapping was replaced, by one without the pool.
#[test]
fn memory_that_lost_its_registration_is_registered_by_its_next_protection() {
    let (memory, _pool) = filled();
    memory.protect(0..PAGES, false).expect("it is registered");
    memory.rebuild(4..8, &[false; 4]).expect("there is memory");
    memory.release(0..PAGES, false);
    memory
        .protect(0..PAGES, false)
        .expect("it is registered again");
    let writer = sleeping_writer(&memory, 5);
    memory.release(0..PAGES, false);
    assert_eq!(writer.recv_timeout(LONG), Ok(5));
}

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
    let (memory, pool) = filled();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut rounds = 0;
            while !stop.load(Ordering::Relaxed) {
                for page in 0..PAGES {
                    assert_eq!(read(&memory, page), content(page), "page {page}");
                }
                rounds += 1;
            }
            rounds
        });
        for round in 0..ROUNDS {
            let own = [2 + round % 4..7, 9..10 + round % 5];
            memory.protect(0..PAGES, true).expect("it is registered");
            memory
                .bridge(&pool, 0..PAGES, PoolPage(0), &own)
                .expect("there are VMAs");
            memory.release(0..PAGES, true);
            memory.unshare(0..PAGES).expect("there is memory");
        }
        stop.store(true, Ordering::Relaxed);
        assert!(reader.join().expect("it saw nothing else") > 0);
    });
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

/// Each way to put a mapping over pages, with the kernel failing half-way a few times. The guest
/// finds its content, whoever came to a page meanwhile goes on, and nothing else is left.
#[cfg(feature = "failpoints")]
#[test]
fn a_mapping_that_fails_when_the_old_one_is_gone_is_made_again_until_it_succeeds() {
    type Put = fn(&LinuxMemory, &LinuxPool) -> io::Result<()>;
    let puts: [Put; 3] = [
        |memory, pool| memory.share(pool, 2..12, PoolPage(2)),
        |memory, pool| memory.bridge(pool, 2..12, PoolPage(2), &[4..6, 7..8]),
        |memory, _| memory.rebuild(2..12, &[false; 10]),
    ];
    let scenario = fail::FailScenario::setup();
    for put in puts {
        let (memory, pool) = filled();
        memory.protect(0..PAGES, false).expect("it is registered");
        let writer = sleeping_writer(&memory, 6);
        fail::cfg("unmapped", "4*return").expect("a known action");
        put(&memory, &pool).expect("it is made again");
        memory.release(0..PAGES, true);
        assert_eq!(writer.recv_timeout(LONG), Ok(6));
        for page in (0..PAGES).filter(|&page| page != 6) {
            assert_eq!(read(&memory, page), content(page), "page {page}");
        }
        write(&memory, 3, 1);
        memory.protect(0..PAGES, true).expect("it is one range");
        memory.release(0..PAGES, true);
    }
    scenario.teardown();
}

/// Who reads a page while it is gone sleeps instead of reading zeros.
#[cfg(feature = "failpoints")]
#[test]
fn who_comes_to_a_page_whose_mapping_is_gone_waits_for_it() {
    let scenario = fail::FailScenario::setup();
    let (memory, pool) = filled();
    memory.protect(0..PAGES, false).expect("it is registered");
    fail::cfg("unmapped", "1*return->1*pause").expect("a known action");
    thread::scope(|scope| {
        let sharer = scope.spawn(|| memory.share(&pool, 2..12, PoolPage(2)));
        let [start, end] = [2, 12].map(|page| memory.mapping.address(page).addr());
        wait_until("the hole is plugged", || {
            let maps = fs::read_to_string("/proc/self/maps").expect("this is Linux");
            maps.contains(&format!("{start:x}-{end:x} rw-p"))
        });
        let reader = sleeping(&memory, |memory| read(memory, 6));
        fail::remove("unmapped");
        sharer.join().expect("no panic").expect("it is made again");
        memory.release(0..PAGES, true);
        assert_eq!(reader.recv_timeout(LONG), Ok(content(6)));
    });
    scenario.teardown();
}

fn absent_pages(memory: &LinuxMemory) -> Vec<u32> {
    let mut found = Vec::new();
    memory.residency(0..PAGES, &mut found).expect("it is told");
    let there: Vec<u32> = found.into_iter().flat_map(|(range, _)| range).collect();
    (0..PAGES).filter(|page| !there.contains(page)).collect()
}

/// Parts of a page, of several, and the last.
const PARTS: [PageRange; 4] = [0..1, 3..6, 7..8, PAGES - 1..PAGES];
const DROPPED: [u32; 6] = [0, 3, 4, 5, 7, PAGES - 1];

#[test]
fn parts_are_dropped_together_by_one_call_or_one_by_one() {
    for takes_many in [true, false] {
        let (memory, _pool) = filled();
        memory.takes_many.store(takes_many, Ordering::Relaxed);
        let (mut calls, mut done) = (0, 0);
        while done < PARTS.len() {
            done += memory.drop_zeros(&PARTS[done..]).expect("it is memory");
            calls += 1;
        }
        assert_eq!(absent_pages(&memory), DROPPED);
        let with_batches = memory.takes_many.load(Ordering::Relaxed);
        assert_eq!(calls, if with_batches { 1 } else { PARTS.len() });
    }
}

#[test]
fn parts_are_uncovered_together() {
    let (memory, pool) = filled();
    memory.protect(0..PAGES, false).expect("it is registered");
    memory
        .share(&pool, 0..PAGES, PoolPage(0))
        .expect("there are VMAs");
    memory.release(0..PAGES, true);
    (0..PAGES).for_each(|page| write(&memory, page, 77));
    memory.protect(0..PAGES, true).expect("it is registered");
    let mut done = 0;
    while done < PARTS.len() {
        done += memory.uncover(&PARTS[done..]).expect("it is memory");
    }
    memory.release(0..PAGES, false);
    for page in 0..PAGES {
        let is_uncovered = DROPPED.contains(&page);
        let shown = if is_uncovered { content(page) } else { 77 };
        assert_eq!(read(&memory, page), shown, "page {page}");
    }
}

#[test]
fn what_cannot_be_dropped_stops_the_parts_after_it_and_is_told_apart() {
    for takes_many in [true, false] {
        let (memory, _pool) = filled();
        memory.takes_many.store(takes_many, Ordering::Relaxed);
        let (start, len_bytes) = memory.span(&(7..8));
        // SAFETY: a page of the range; locking changes no content. The kernel drops no locked page.
        check(unsafe { libc::mlock(start.cast(), len_bytes) }).expect("a page may be locked");
        let mut done = 0;
        let error = loop {
            match memory.drop_zeros(&PARTS[done..]) {
                Ok(parts) => done += parts,
                Err(error) => break error,
            }
        };
        assert_eq!((done, error.raw_os_error()), (2, Some(libc::EINVAL)));
        assert_eq!(absent_pages(&memory), DROPPED[..4]);
    }
}
