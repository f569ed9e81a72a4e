//! What broken runs leave behind, on real memory.

mod guest;

use std::time::{Duration, Instant};

use dedup::{Engine, Mapping, PAGE_SIZE_BYTES, RegionHandle, Run, Settings};
use guest::{assert_holds, read_word, vmas, write_page, write_word};

const PAGES: usize = 1024;

/// The content of a page: the same pages in each region, every one elsewhere.
fn shuffled(region: usize, page: usize) -> u64 {
    let multipliers = [1, 389];
    1 + (page * multipliers[region] % PAGES) as u64
}

fn merged() -> (Engine, [RegionHandle; 2]) {
    let engine = Engine::new(&Settings::default()).expect("this host has userfaultfd");
    let regions = [0, 1].map(|region| {
        let mapping = Mapping::new(PAGES * PAGE_SIZE_BYTES).expect("address space is there");
        let handle = engine
            .register(mapping)
            .expect("the kernel takes the range");
        (0..PAGES).for_each(|page| write_page(handle.mapping(), page, shuffled(region, page)));
        handle
    });
    wait_for_sharing(&engine);
    assert!(
        vmas(regions[1].mapping()).max(vmas(regions[0].mapping())) > PAGES / 2,
        "every page elsewhere"
    );
    (engine, regions)
}

/// Waits until each page of one region is shared with one of the other.
fn wait_for_sharing(engine: &Engine) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while engine.stats().pages_sharing != PAGES as u64 {
        let stats = engine.stats();
        assert!(engine.wait_full_scans(1, deadline), "{stats:?}");
    }
}

fn wait_for_passes(engine: &Engine) {
    let deadline = Instant::now() + Duration::from_secs(60);
    assert!(engine.wait_full_scans(4, deadline), "four passes in time");
}

#[test]
fn an_unmerge_gives_the_mappings_back() {
    let (engine, regions) = merged();
    engine.set_run(Run::Unmerge).expect("there is memory");
    for (index, region) in regions.iter().enumerate() {
        (0..PAGES).for_each(|page| assert_holds(region.mapping(), page, shuffled(index, page)));
        assert!(
            vmas(region.mapping()) <= 8,
            "{} mappings are left",
            vmas(region.mapping())
        );
    }
    // Healed memory is memory like any other: it merges again.
    engine.set_run(Run::Merge).expect("merging starts");
    wait_for_sharing(&engine);
    for (index, region) in regions.iter().enumerate() {
        (0..PAGES).for_each(|page| assert_holds(region.mapping(), page, shuffled(index, page)));
    }
}

#[test]
fn a_region_that_breaks_most_of_its_pages_gives_their_mappings_back() {
    let (engine, regions) = merged();
    let own = |page: usize| 1_000_000 + page as u64;
    for page in (0..PAGES).filter(|page| page % 64 != 0) {
        write_page(regions[1].mapping(), page, own(page));
    }
    wait_for_passes(&engine);
    assert!(
        vmas(regions[1].mapping()) <= 8 + 2 * PAGES / 64,
        "{}",
        vmas(regions[1].mapping())
    );
    assert!(engine.stats().vmas < 2 * PAGES as u64);
    for page in 0..PAGES {
        let content = if page % 64 == 0 {
            shuffled(1, page)
        } else {
            own(page)
        };
        assert_holds(regions[1].mapping(), page, content);
        assert_holds(regions[0].mapping(), page, shuffled(0, page));
    }
}

/// Pages that have no memory yet are not protected by themselves: there is nothing to protect.
#[test]
fn a_first_write_to_a_page_of_a_block_that_is_healed_is_kept() {
    const BLOCKS: usize = 32;
    const PAGES: usize = BLOCKS * 512;
    let engine = Engine::new(&Settings::default()).expect("this host has userfaultfd");
    let regions = [1, 389].map(|step| {
        let mapping = Mapping::new(PAGES * PAGE_SIZE_BYTES).expect("address space is there");
        let region = engine
            .register(mapping)
            .expect("the kernel takes the range");
        // Every other page stays without memory.
        let number = |page: usize| 1 + (page / 2 * step % (PAGES / 2)) as u64;
        (0..PAGES)
            .step_by(2)
            .for_each(|page| write_page(region.mapping(), page, number(page)));
        region
    });
    wait_for_passes(&engine);
    assert_eq!(engine.stats().pages_sharing, PAGES as u64 / 2);
    engine.set_run(Run::Stop).expect("merging stops");
    let [_, region] = &regions;
    (0..PAGES)
        .step_by(2)
        .for_each(|page| write_page(region.mapping(), page, 1_000_000 + page as u64));
    engine.set_run(Run::Merge).expect("merging starts");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for page in (0..PAGES / 2).map(|index| index * 1021 % (PAGES / 2) * 2 + 1) {
                write_word(region.mapping(), page, 5, page as u64);
                (0..200).for_each(|_| std::hint::spin_loop());
            }
        });
        wait_for_passes(&engine);
    });
    assert!(
        vmas(region.mapping()) < PAGES / 16,
        "{} mappings",
        vmas(region.mapping())
    );
    let is_lost = |&page: &usize| read_word(region.mapping(), page, 5) != page as u64;
    let lost = (1..PAGES).step_by(2).filter(is_lost);
    assert_eq!(lost.count(), 0, "first writes are lost");
}
