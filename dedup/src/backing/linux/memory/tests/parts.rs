//! Parts that are dropped together.

use super::*;

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
            done += memory.discard(&PARTS[done..]).expect("it is memory");
            calls += 1;
        }
        assert_eq!(absent_pages(&memory), DROPPED);
        let with_batches = memory.takes_many.load(Ordering::Relaxed);
        assert_eq!(calls, if with_batches { 1 } else { PARTS.len() });
    }
}

#[test]
fn parts_show_the_pool_when_their_copies_are_dropped() {
    let (memory, pool) = filled();
    memory.protect(0..PAGES).expect("it is registered");
    memory
        .map(&pool, 0..PAGES, PoolPage(0))
        .expect("there are VMAs");
    memory.release(0..PAGES, true);
    (0..PAGES).for_each(|page| write(&memory, page, 77));
    memory.protect(0..PAGES).expect("it is registered");
    let mut done = 0;
    while done < PARTS.len() {
        done += memory.discard(&PARTS[done..]).expect("it is memory");
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
            match memory.discard(&PARTS[done..]) {
                Ok(parts) => done += parts,
                Err(error) => break error,
            }
        };
        assert_eq!((done, error.raw_os_error()), (2, Some(libc::EINVAL)));
        assert_eq!(absent_pages(&memory), DROPPED[..4]);
    }
}
