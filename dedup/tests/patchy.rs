//! Memory that is alike but for scattered pages, on real memory.

mod guest;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use dedup::{Engine, Mapping, PAGE_SIZE_BYTES, RegionHandle, Run, Settings};
use guest::{assert_holds, vmas, write_page};

const BLOCKS: usize = 4;
const PAGES: usize = BLOCKS * 512;
const REGIONS: usize = 3;

/// A group of pages takes one, and what lies between two groups another. Mapped one by one, the
/// runs between a region's own pages would take two for each of some 200.
const VMAS_MAX: usize = 8 * BLOCKS;

/// Every tenth page is the region's own, in each region others.
fn is_own(region: usize, page: usize) -> bool {
    page % 10 == 3 * region
}

fn content(region: usize, page: usize) -> u64 {
    let own = if is_own(region, page) { region + 1 } else { 0 };
    (own * 1_000_000 + page + 1) as u64
}

/// Pages that are the same in another region.
fn shared_pages(region: usize) -> u64 {
    (0..PAGES).filter(|&page| !is_own(region, page)).count() as u64
}

fn filled(engine: &Engine, region: usize) -> RegionHandle {
    let mapping = Mapping::new(PAGES * PAGE_SIZE_BYTES).expect("address space is there");
    let handle = engine
        .register(mapping)
        .expect("the kernel takes the range");
    (0..PAGES).for_each(|page| write_page(handle.mapping(), page, content(region, page)));
    handle
}

fn wait_for_passes(engine: &Engine) {
    let deadline = Instant::now() + Duration::from_secs(60);
    assert!(engine.wait_full_scans(4, deadline), "four passes in time");
}

fn assert_merged(engine: &Engine, regions: &[RegionHandle], vmas_max: usize) {
    let merging = |(index, region): (usize, &RegionHandle)| {
        (region.stats().pages_merging, shared_pages(index))
    };
    // A page whose group met a write is merged in a later pass.
    let is_whole = |(merging, shared): (u64, u64)| merging == shared;
    let is_merged = || regions.iter().enumerate().map(merging).all(is_whole);
    let deadline = Instant::now() + Duration::from_secs(60);
    while !is_merged() {
        let counts: Vec<_> = regions.iter().enumerate().map(merging).collect();
        assert!(
            Instant::now() < deadline,
            "merging, to be shared: {counts:?}"
        );
        wait_for_passes(engine);
    }
    for (index, region) in regions.iter().enumerate() {
        assert!(
            vmas(region.mapping()) <= vmas_max,
            "{} mappings",
            vmas(region.mapping())
        );
        (0..PAGES).for_each(|page| assert_holds(region.mapping(), page, content(index, page)));
    }
    let stats = engine.stats();
    let real: usize = regions.iter().map(|region| vmas(region.mapping())).sum();
    assert!(real as u64 <= stats.vmas + 1, "{real} {stats:?}");
    let pool_bytes = engine.process_memory().pool_bytes().expect("fstat");
    assert_eq!(pool_bytes, stats.pool_bytes, "a hole takes no memory");
}

#[test]
fn regions_that_differ_in_every_tenth_page_take_few_mappings() {
    let engine = Engine::new(&Settings::default()).expect("this host has userfaultfd");
    let regions: Vec<RegionHandle> = (0..REGIONS).map(|region| filled(&engine, region)).collect();
    wait_for_passes(&engine);
    assert_merged(&engine, &regions, VMAS_MAX);
    // A guest writes to its own pages and to others, and gets the old content back.
    for page in (0..PAGES).step_by(3) {
        write_page(regions[1].mapping(), page, 5_000_000);
    }
    for page in (0..PAGES).step_by(3) {
        write_page(regions[1].mapping(), page, content(1, page));
    }
    wait_for_passes(&engine);
    assert_merged(&engine, &regions, VMAS_MAX);
    engine.set_run(Run::Unmerge).expect("there is memory");
    assert_eq!(engine.process_memory().pool_bytes().expect("fstat"), 0);
    for (index, region) in regions.iter().enumerate() {
        (0..PAGES).for_each(|page| assert_holds(region.mapping(), page, content(index, page)));
    }
}

#[test]
fn guests_read_and_write_while_runs_are_mapped_around_their_pages() {
    let engine = Engine::new(&Settings::default()).expect("this host has userfaultfd");
    let regions: Vec<RegionHandle> = (0..REGIONS).map(|region| filled(&engine, region)).collect();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for (index, region) in regions.iter().enumerate() {
            let stop = &stop;
            scope.spawn(move || {
                let mut version = 0;
                while !stop.load(Ordering::Relaxed) {
                    for page in (0..PAGES).filter(|&page| is_own(index, page)) {
                        // Its own page is changed now and then, the next one is read.
                        if page % 40 == 3 * index {
                            write_page(region.mapping(), page, content(index, page) + version);
                            assert_holds(region.mapping(), page, content(index, page) + version);
                        }
                        assert_holds(region.mapping(), page + 1, content(index, page + 1));
                    }
                    version += 1;
                }
            });
        }
        for _ in 0..6 {
            wait_for_passes(&engine);
            engine.set_run(Run::Unmerge).expect("there is memory");
            engine.set_run(Run::Merge).expect("merging starts");
        }
        stop.store(true, Ordering::Relaxed);
    });
    for (index, region) in regions.iter().enumerate() {
        for page in (0..PAGES).filter(|page| page % 40 == 3 * index) {
            write_page(region.mapping(), page, content(index, page));
        }
    }
    wait_for_passes(&engine);
    // One group meets the writes to its pages at other times than the next.
    assert_merged(&engine, &regions, 4 * VMAS_MAX);
}
