//! Parts that are shared together: their pages are gone for a moment, and nobody may see that.

use super::*;
use crate::backing::Part;

/// Single pages, neighbours, and the last page; what lies between stays private.
fn parts() -> [Part; 5] {
    [1..2, 3..6, 6..7, 9..10, PAGES - 1..PAGES].map(|range| {
        let first = PoolPage(range.start);
        (range, first)
    })
}

/// Protects everything and shares parts until all are, as the engine does. Returns how many calls
/// that took.
fn share_all(memory: &LinuxMemory, pool: &LinuxPool, parts: &[Part]) -> usize {
    memory.protect(0..PAGES, true).expect("it is registered");
    let (mut calls, mut done) = (0, 0);
    while done < parts.len() {
        done += memory.share(pool, &parts[done..]).expect("there are VMAs");
        calls += 1;
    }
    calls
}

/// Each page shows its content, and takes writes.
fn everything_is_as_before(memory: &Arc<LinuxMemory>) {
    for page in 0..PAGES {
        let theirs = Arc::clone(memory);
        let (tell_done, done) = channel();
        thread::spawn(move || {
            let before = read(&theirs, page);
            write(&theirs, page, before + 1);
            let _ = tell_done.send((before, read(&theirs, page)));
        });
        let seen = done.recv_timeout(LONG);
        assert_eq!(
            seen,
            Ok((content(page), content(page) + 1)),
            "page {page}: nobody sleeps, and nothing is lost"
        );
    }
}

fn private_pages(memory: &LinuxMemory) -> Vec<u32> {
    let mut found = Vec::new();
    memory.residency(0..PAGES, &mut found).expect("it is told");
    let private = found
        .into_iter()
        .filter(|(_, residency)| *residency == Residency::Private);
    private.flat_map(|(range, _)| range).collect()
}

#[test]
fn parts_are_shared_by_one_call_or_one_by_one() {
    for takes_many in [true, false] {
        let (memory, pool) = filled();
        memory.takes_many.store(takes_many, Ordering::Relaxed);
        let calls = share_all(&memory, &pool, &parts());
        memory.release(0..PAGES, true);
        let with_batches = memory.takes_many.load(Ordering::Relaxed);
        assert_eq!(calls, if with_batches { 1 } else { parts().len() });
        let between = [0, 2, 7, 8, 10, 11, 12, 13, 14];
        assert_eq!(private_pages(&memory), between);
        everything_is_as_before(&memory);
    }
}

/// The pages between the parts are armed along with them: one of them that has no memory must read
/// as zeros afterwards.
#[test]
fn a_page_without_memory_between_parts_reads_as_zeros_after_the_release() {
    let (memory, pool) = filled();
    memory.advise(&(2..3), libc::MADV_DONTNEED).expect("memory");
    memory.protect(0..PAGES, false).expect("it is registered");
    let done = memory.share(&pool, &parts()).expect("there are VMAs");
    let reader = sleeping(&memory, |memory| read(memory, 2));
    let writer = sleeping(&memory, |memory| {
        write(memory, 12, 1);
        read(memory, 12)
    });
    memory.release(0..PAGES, true);
    assert_eq!(reader.recv_timeout(LONG), Ok(0), "after {done} parts");
    assert_eq!(writer.recv_timeout(LONG), Ok(1));
    memory.advise(&(7..8), libc::MADV_DONTNEED).expect("memory");
    assert_eq!(read(&memory, 7), 0, "nobody sleeps for want of a page");
}

#[test]
fn readers_never_see_that_a_page_is_gone() {
    use std::sync::atomic::AtomicBool;
    const ROUNDS: usize = 200;
    let (memory, pool) = filled();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for first in [1, 4] {
            let (memory, stop) = (&memory, &stop);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    for page in first..PAGES {
                        assert_eq!(read(memory, page), content(page), "page {page}");
                    }
                }
            });
        }
        for _ in 0..ROUNDS {
            share_all(&memory, &pool, &parts());
            memory.release(0..PAGES, true);
            // Back to memory of its own.
            memory.protect(0..PAGES, true).expect("it is registered");
            let under = [true; PAGES as usize];
            memory.rebuild(0..PAGES, &under).expect("there is memory");
            memory.release(0..PAGES, true);
        }
        stop.store(true, Ordering::Relaxed);
    });
}

/// The kernel drops the page before a locked one and then fails: that page has to come back.
#[test]
fn pages_of_a_part_that_was_dropped_half_way_come_back() {
    let (memory, pool) = filled();
    let (start, len_bytes) = memory.span(&(4..5));
    // SAFETY: a page of the range; locking changes no content. The kernel drops no locked page.
    check(unsafe { libc::mlock(start.cast(), len_bytes) }).expect("a page may be locked");
    for parts in [&parts()[..], &parts()[1..]] {
        memory.protect(0..PAGES, true).expect("it is registered");
        let done = memory.share(&pool, parts).expect("there are VMAs");
        assert_eq!(done, 1, "what comes before the locked page");
        memory.release(0..PAGES, true);
        for page in 0..PAGES {
            assert_eq!(read(&memory, page), content(page), "page {page}");
        }
    }
    everything_is_as_before(&memory);
}

#[cfg(feature = "failpoints")]
mod failing {
    use super::*;
    use crate::mapping::reserve_aligned;

    /// Mapping fails for one part after the other, and there is no memory to put pages back at first:
    /// what was done stays, the others have their pages, still protected.
    #[test]
    fn pages_that_cannot_be_mapped_come_back_protected() {
        let scenario = fail::FailScenario::setup();
        for (failing, done) in [(0, None), (1, Some(1)), (4, Some(4))] {
            let (memory, pool) = filled();
            memory.protect(0..PAGES, false).expect("it is registered");
            fail::cfg("mmap", &format!("{failing}*off->return")).expect("a known action");
            fail::cfg("put_back", "3*return").expect("a known action");
            let shared = memory.share(&pool, &parts());
            assert_eq!(shared.ok(), done);
            fail::remove("mmap");
            let last = sleeping_writer(&memory, PAGES - 1);
            memory.release(0..PAGES, true);
            assert_eq!(last.recv_timeout(LONG), Ok(PAGES - 1));
            assert_eq!(read(&memory, PAGES - 1), content(PAGES - 1) + 100);
            write(&memory, PAGES - 1, content(PAGES - 1));
            everything_is_as_before(&memory);
        }
        scenario.teardown();
    }

    /// Address space split into as many VMAs as the process may still have, but for some.
    struct AllVmas(*mut u8, usize);

    impl AllVmas {
        fn but_for(spare_pairs: usize) -> AllVmas {
            const PAGE_BYTES: usize = PAGE_SIZE_BYTES;
            let limit = fs::read_to_string("/proc/sys/vm/max_map_count").expect("this is Linux");
            let limit: usize = limit.trim().parse().expect("a number");
            let len_bytes = 2 * limit * PAGE_BYTES;
            let start = reserve_aligned(len_bytes, PAGE_BYTES, libc::PROT_NONE);
            let start = start.expect("address space is there");
            let advise = |from: usize, to: usize, prot: libc::c_int| {
                let start = start.wrapping_add(from * PAGE_BYTES).cast();
                // SAFETY: a part of what was reserved just above, which holds nothing.
                unsafe { libc::mprotect(start, (to - from) * PAGE_BYTES, prot) == 0 }
            };
            let odd = (1..2 * limit).step_by(2);
            let full = odd
                .clone()
                .find(|&page| !advise(page, page + 1, libc::PROT_READ));
            let full = full.expect("there is a limit");
            // A last one, if there is room for one.
            advise(full, 2 * limit, libc::PROT_READ);
            for pair in 0..spare_pairs {
                assert!(advise(2 * pair + 1, 2 * pair + 2, libc::PROT_NONE));
            }
            AllVmas(start, len_bytes)
        }
    }

    impl Drop for AllVmas {
        fn drop(&mut self) {
            // SAFETY: it was reserved by `but_for`, and nobody else knows it.
            unsafe { crate::mapping::unmap(self.0, self.1) };
        }
    }

    /// With as many VMAs as a process may have, at whichever step it runs out of them, a group is
    /// released, and everybody goes on with what was there.
    #[test]
    fn a_group_is_released_where_there_are_no_vmas_left() {
        let scenario = fail::FailScenario::setup();
        let mut outcomes = Vec::new();
        for spare_pairs in 0..8 {
            let (memory, pool) = filled();
            // Neither begins nor ends with a VMA.
            memory
                .protect(2..PAGES - 2, false)
                .expect("it is registered");
            let last = sleeping_writer(&memory, PAGES - 3);
            let (tell_done, done) = channel();
            let (tell_full, full) = channel();
            let theirs = Arc::clone(&memory);
            thread::spawn(move || {
                full.recv().expect("the test tells");
                let parts = [4..5, 6..7, 9..10].map(|range| (range.clone(), PoolPage(range.start)));
                let shared = theirs.share(&pool, &parts);
                theirs.release(2..PAGES - 2, true);
                tell_done.send(shared.is_ok()).expect("the test waits");
                pool
            });
            let all = AllVmas::but_for(spare_pairs);
            tell_full.send(()).expect("it waits");
            let released = done.recv_timeout(LONG);
            let woken = last.recv_timeout(LONG);
            drop(all);
            let shared = released.expect("it is released");
            outcomes.push(shared);
            assert_eq!(woken, Ok(PAGES - 3), "{spare_pairs}");
            write(&memory, PAGES - 3, content(PAGES - 3));
            everything_is_as_before(&memory);
        }
        assert_eq!((outcomes[0], outcomes[7]), (false, true), "{outcomes:?}");
        scenario.teardown();
    }

    /// Who reads a page while it is gone sleeps instead of reading zeros; so does who writes to it.
    #[test]
    fn who_comes_to_a_page_that_is_gone_waits_for_it() {
        let scenario = fail::FailScenario::setup();
        let (memory, pool) = filled();
        memory.protect(0..PAGES, false).expect("it is registered");
        fail::cfg("mmap", "1*off->1*pause").expect("a known action");
        // Not a scope, which would wait for it for ever if this fails.
        let theirs = Arc::clone(&memory);
        let sharer = thread::spawn(move || theirs.share(&pool, &parts()));
        wait_until("the pages are gone", || {
            !private_pages(&memory).contains(&4)
        });
        let reader = sleeping(&memory, |memory| read(memory, 4));
        let writer = sleeping_writer(&memory, 9);
        fail::remove("mmap");
        let shared = sharer.join().expect("no panic");
        assert_eq!(shared.expect("there are VMAs"), 5);
        memory.release(0..PAGES, true);
        assert_eq!(reader.recv_timeout(LONG), Ok(content(4)));
        assert_eq!(writer.recv_timeout(LONG), Ok(9));
        scenario.teardown();
    }

    #[test]
    fn whoever_sleeps_is_woken_though_disarming_fails_at_first() {
        let scenario = fail::FailScenario::setup();
        let (memory, pool) = filled();
        memory.advise(&(2..3), libc::MADV_DONTNEED).expect("memory");
        memory.protect(0..PAGES, false).expect("it is registered");
        memory.share(&pool, &parts()).expect("there are VMAs");
        let reader = sleeping(&memory, |memory| read(memory, 2));
        fail::cfg("disarm", "3*return").expect("a known action");
        memory.release(0..PAGES, true);
        assert_eq!(reader.recv_timeout(LONG), Ok(0));
        scenario.teardown();
    }
}
