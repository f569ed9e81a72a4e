//! What is filled into the pool is there, by whichever way it went.

use std::os::unix::fs::MetadataExt;

use super::*;
use crate::base::page::HUGE_PAGE_PAGES;

#[test]
fn a_huge_page_of_the_pool_holds_what_was_filled_into_it_and_nobody_can_write_to_it() {
    let mapping = Mapping::new(pages_to_bytes(HUGE_PAGE_PAGES)).expect("address space is there");
    let userfaultfd = Arc::new(Userfaultfd::open().expect("this host has userfaultfd"));
    let memory = LinuxMemory::new(mapping, userfaultfd).expect("the kernel takes the range");
    for page in 0..HUGE_PAGE_PAGES {
        write(&memory, page, content(page));
    }
    let pool = LinuxPool::new().expect("there is memory");
    let first = PoolPage(2 * HUGE_PAGE_PAGES);
    memory
        .fill(0..HUGE_PAGE_PAGES, &pool, first)
        .expect("there is memory");
    for page in 0..HUGE_PAGE_PAGES {
        assert!(memory.equals_pool(page, &pool, first.plus(page)), "{page}");
    }
    let pages = u64::from(HUGE_PAGE_PAGES);
    assert_eq!(pool.allocated_pages().expect("it is a file"), pages);
    assert_eq!(writable_mappings(&pool), "");
    pool.punch(first, HUGE_PAGE_PAGES).expect("it is a file");
    assert_eq!(pool.allocated_pages().expect("it is a file"), 0);
}

/// Lines of `/proc/self/maps` by which the pool's pages could be written to.
fn writable_mappings(pool: &LinuxPool) -> String {
    let file = pool.file().expect("there are descriptors");
    let inode = file.metadata().expect("it is a file").ino().to_string();
    let maps = fs::read_to_string("/proc/self/maps").expect("this is Linux");
    let is_one = |line: &&str| {
        let mut words = line.split_whitespace();
        words.nth(1) == Some("rw-s") && words.nth(2) == Some(inode.as_str())
    };
    maps.lines().filter(is_one).collect()
}
