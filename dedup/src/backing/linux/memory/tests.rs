//! No writer is left asleep, whatever fails.

mod filling;
mod parts;
#[cfg(feature = "failpoints")]
mod replacing;
mod staging;

use std::fs;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use super::*;
use crate::backing::Pool;

const PAGES: u32 = 16;
/// How long a writer may take to fall asleep, or to wake up: only one that nobody wakes takes longer.
const LONG: Duration = Duration::from_secs(120);

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
    let mut words = [0; crate::base::page::PAGE_WORDS];
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

/// Puts a mapping of the pool over a range, or one of nothing, with copies of the pages of `own`.
fn build(
    memory: &LinuxMemory,
    pool: &LinuxPool,
    range: PageRange,
    under: Option<PoolPage>,
    own: &[PageRange],
) -> io::Result<()> {
    let staging = memory.stage(pool, range, under)?;
    for pages in own {
        memory.stage_copies(&staging, pages.clone())?;
    }
    memory.replace(staging)
}

/// Protects everything, has one writer fall asleep in each of some pages, maps `shared` to the pool
/// but for `own`, and releases everything as `remapped`. All writers must wake and find what was
/// there.
fn release_wakes_everybody(shared: PageRange, own: &[PageRange], remapped: bool) {
    let (memory, pool) = filled();
    memory.protect(0..PAGES).expect("it is registered");
    let pages = [0, 5, 6, 7, PAGES - 1];
    let writers = pages.map(|page| sleeping_writer(&memory, page));
    if !shared.is_empty() {
        let first = PoolPage(shared.start);
        let mapped = match own {
            [] => memory.map(&pool, shared, first),
            _ => build(&memory, &pool, shared, Some(first), own),
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
    memory.protect(0..PAGES).expect("it is mapped");
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
    let (memory, pool) = filled();
    memory.protect(0..PAGES).expect("it is registered");
    let copies = std::slice::from_ref(&(4..8));
    build(&memory, &pool, 4..8, None, copies).expect("there is memory");
    memory.release(0..PAGES, false);
    memory.protect(0..PAGES).expect("it is registered again");
    let writer = sleeping_writer(&memory, 5);
    memory.release(0..PAGES, false);
    assert_eq!(writer.recv_timeout(LONG), Ok(5));
}
