//! Huge pages of the pool: who maps one, and what comes back when its parts are given up.

mod guest;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use dedup::{Engine, Mapping, PAGE_SIZE_BYTES, PAGE_WORDS, RegionHandle, Settings};
use guest::{smaps_bytes, write_word};

const HUGE_PAGE_PAGES: u32 = 512;
const HUGE_PAGES: u32 = 8;
const PAGES: u32 = HUGE_PAGES * HUGE_PAGE_PAGES;

fn deadline() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

/// Writes the first word of a page.
fn write(mapping: &Mapping, page: u32, word: u64) {
    write_word(mapping, page as usize, 0, word);
}

fn read(mapping: &Mapping, page: u32) -> u64 {
    let mut words = [0; PAGE_WORDS];
    mapping.read_page(page, &mut words);
    words[0]
}

/// Two regions of base pages with one content, merged.
fn merged() -> (Engine, [RegionHandle; 2]) {
    let engine = Engine::new(&Settings::default()).expect("this host has userfaultfd");
    let regions = [(); 2].map(|()| {
        let size_bytes = PAGES as usize * PAGE_SIZE_BYTES;
        let mapping = Mapping::new(size_bytes).expect("address space is there");
        (0..PAGES).for_each(|page| write(&mapping, page, u64::from(page) + 1));
        engine
            .register(mapping)
            .expect("the kernel takes the range")
    });
    assert!(engine.wait_full_scans(4, deadline()), "four passes in time");
    let stats = engine.stats();
    assert_eq!(stats.pages_sharing, u64::from(PAGES), "{stats:?}");
    (engine, regions)
}

/// Bytes of a mapping that one entry of the page tables maps 2 MiB at a time.
fn huge_bytes(mapping: &Mapping) -> usize {
    smaps_bytes(mapping, "ShmemPmdMapped")
}

fn pool_bytes(engine: &Engine) -> u64 {
    engine
        .process_memory()
        .pool_bytes()
        .expect("the kernel tells")
}

#[test]
fn what_is_shared_as_a_whole_is_mapped_as_a_huge_page() {
    let until = deadline();
    loop {
        let (engine, regions) = merged();
        assert_eq!(pool_bytes(&engine), u64::from(PAGES) * 4096);
        for region in &regions {
            let holds = |page| read(region.mapping(), page) == u64::from(page) + 1;
            assert!((0..PAGES).all(holds));
        }
        // The kernel may refuse one or the other, as when a page of it is on its way to a list. It
        // gives base pages while its free memory is in pieces, and puts some together for each try.
        let is_huge = |region: &RegionHandle| {
            let mapping = region.mapping();
            huge_bytes(mapping) >= mapping.size_bytes() / 2
        };
        if regions.iter().all(is_huge) {
            return;
        }
        assert!(
            Instant::now() < until,
            "the kernel has no huge pages to give, or maps base pages"
        );
    }
}

#[test]
fn a_write_breaks_one_page_out_of_a_huge_one() {
    let (engine, regions) = merged();
    let [one, other] = &regions;
    write(one.mapping(), 700, 0);
    for page in 0..PAGES {
        let expected = if page == 700 { 0 } else { u64::from(page) + 1 };
        assert_eq!(read(one.mapping(), page), expected);
        assert_eq!(read(other.mapping(), page), u64::from(page) + 1);
    }
    assert!(engine.wait_full_scans(3, deadline()), "passes in time");
    let stats = engine.stats();
    assert_eq!(stats.pages_sharing, u64::from(PAGES) - 1, "{stats:?}");
}

#[test]
fn a_huge_page_of_the_pool_comes_back_piece_by_piece_while_others_read_it() {
    let (engine, regions) = merged();
    let is_done = AtomicBool::new(false);
    thread::scope(|scope| {
        for region in &regions {
            scope.spawn(|| {
                while !is_done.load(Ordering::Relaxed) {
                    // By now either the shared content or what is written below.
                    for page in 0..PAGES {
                        let word = read(region.mapping(), page);
                        assert_eq!(word % 1_000_000, u64::from(page) + 1, "page {page}");
                    }
                }
            });
        }
        // Each 37th page, then the ones after those: pages die one by one, all over.
        for offset in 0..37 {
            for page in (offset..PAGES).step_by(37) {
                for (owner, region) in (1..).zip(&regions) {
                    write(
                        region.mapping(),
                        page,
                        owner * 1_000_000 + u64::from(page) + 1,
                    );
                }
            }
            assert!(engine.wait_full_scans(1, deadline()), "a pass in time");
        }
        let until = deadline();
        while pool_bytes(&engine) > 0 && Instant::now() < until {
            assert!(engine.wait_full_scans(1, deadline()), "a pass in time");
        }
        is_done.store(true, Ordering::Relaxed);
    });
    let (stats, bytes) = (engine.stats(), pool_bytes(&engine));
    assert_eq!((stats.pages_shared, bytes), (0, 0), "{stats:?}");
}
