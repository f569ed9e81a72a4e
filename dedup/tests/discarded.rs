//! Pages that their owner gives up, on real memory.

mod guest;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use dedup::{AccessError, Engine, Mapping, PAGE_SIZE_BYTES, RegionHandle, Run, Settings};
use guest::{assert_holds, read_word, smaps_bytes, vmas, write_page};

const PAGES: usize = 512;
/// What every region holds: a content for each page.
const CONTENT: u64 = 1000;
/// What a guest writes over it.
const OWN: u64 = 7;

fn engine() -> Engine {
    Engine::new(&Settings::default()).expect("this host has userfaultfd")
}

fn settle(engine: &Engine) {
    let deadline = Instant::now() + Duration::from_secs(120);
    assert!(engine.wait_full_scans(4, deadline), "passes in time");
}

fn region_of(engine: &Engine, mapping: Mapping) -> RegionHandle {
    let registered = engine.register(mapping);
    registered.expect("the kernel takes the range")
}

fn fill(region: &RegionHandle) {
    (0..PAGES).for_each(|page| write_page(region.mapping(), page, CONTENT + page as u64));
}

/// Two regions that share all their pages.
fn sharing(engine: &Engine) -> [RegionHandle; 2] {
    engine.set_run(Run::Stop).expect("it only says so");
    let regions = [(); 2].map(|()| {
        let mapping = Mapping::new(PAGES * PAGE_SIZE_BYTES).expect("there is room");
        let region = region_of(engine, mapping);
        fill(&region);
        region
    });
    engine.set_run(Run::Merge).expect("it only says so");
    settle(engine);
    assert_eq!(engine.stats().pages_sharing, PAGES as u64);
    regions
}

#[test]
fn shared_pages_given_up_show_zeros_and_the_other_region_keeps_them() {
    let engine = engine();
    let [one, other] = sharing(&engine);
    let discarded = one.access().discard(10..100).expect("nothing is refused");
    assert_eq!(discarded, 90);
    (10..100).for_each(|page| assert_holds(one.mapping(), page, 0));
    (0..PAGES).for_each(|page| assert_holds(other.mapping(), page, CONTENT + page as u64));
    for page in [9, 100] {
        assert_holds(one.mapping(), page, CONTENT + page as u64);
    }
    assert_eq!(engine.stats().pages_discarded, 90);
    assert_eq!(engine.stats().pages_sharing, PAGES as u64 - 90);
}

#[test]
fn what_every_region_gives_up_leaves_the_pool() {
    let engine = engine();
    let regions = sharing(&engine);
    for region in &regions {
        region.access().discard(0..512).expect("nothing is refused");
        assert_eq!(vmas(region.mapping()), 1);
    }
    // A part of a huge page that the kernel could not punch goes with a later pass.
    let pool_bytes = || engine.process_memory().pool_bytes().expect("it is there");
    let deadline = Instant::now() + Duration::from_secs(120);
    while pool_bytes() > 0 {
        assert!(engine.wait_full_scans(1, deadline), "the pool keeps pages");
    }
}

#[test]
fn private_pages_given_up_take_no_memory_even_out_of_a_huge_page() {
    let engine = engine();
    for (mapping, left_pages) in [
        (Mapping::new(PAGES * PAGE_SIZE_BYTES), 12),
        (Mapping::with_huge_pages(PAGES * PAGE_SIZE_BYTES), 12),
    ] {
        let region = region_of(&engine, mapping.expect("there is room"));
        fill(&region);
        region
            .access()
            .discard(12..512)
            .expect("nothing is refused");
        let left_bytes = smaps_bytes(region.mapping(), "Anonymous");
        assert_eq!(left_bytes, left_pages * PAGE_SIZE_BYTES);
        (0..12).for_each(|page| assert_holds(region.mapping(), page, CONTENT + page as u64));
    }
}

/// The page under an own copy shows as soon as that copy is dropped by itself.
#[test]
fn a_reader_sees_what_was_given_up_or_zeros_and_nothing_else() {
    let engine = engine();
    let [one, _other] = sharing(&engine);
    let (mapping, access) = (one.mapping(), one.access());
    for _ in 0..200 {
        // Over the place of the other region's page, until it is given up.
        let page = (0..PAGES).find(|&page| read_word(mapping, page, 0) == CONTENT + page as u64);
        let Some(page) = page else { break };
        write_page(mapping, page, OWN);
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    let word = read_word(mapping, page, 0);
                    assert!(word == OWN || word == 0, "page {page} shows {word}");
                }
            });
            let number = u32::try_from(page).expect("few pages");
            let discarded = access.discard(number..number + 1);
            assert_eq!(discarded.expect("nothing is refused"), 1);
            is_over.store(true, Ordering::Relaxed);
        });
        assert_holds(mapping, page, 0);
    }
}

#[test]
fn pages_that_a_region_does_not_have_are_refused() {
    let engine = engine();
    let mapping = Mapping::new(8 * PAGE_SIZE_BYTES).expect("there is room");
    let access = region_of(&engine, mapping).access();
    let refused = access.discard(4..9).expect_err("it has 8 pages");
    assert!(
        matches!(refused, AccessError::Range { end: 9, .. }),
        "{refused}"
    );
}
