//! What a child process finds of a region: nothing.

mod guest;

use std::time::{Duration, Instant};

use dedup::{Engine, Mapping, PAGE_SIZE_BYTES, Pace, RegionHandle, Settings};
use guest::{flags, write_page};

const PAGES: usize = 2048;

fn settle(engine: &Engine) {
    let deadline = Instant::now() + Duration::from_secs(120);
    assert!(engine.wait_full_scans(4, deadline), "passes go by");
}

/// Pages with the same at the same place, at other places, of its own, and of zeros.
fn fill(region: &RegionHandle, number: usize) {
    for page in 0..PAGES {
        let content = match page {
            0..600 => 1 + page,
            600..700 => 0,
            700..1024 => 100_000 * (number + 1) + page,
            // In opposite orders, so that each takes a mapping.
            _ if number == 0 => 10_000 + page,
            _ => 10_000 + PAGES + 1024 - page,
        };
        write_page(region.mapping(), page, content as u64);
    }
}

#[test]
fn no_part_of_a_region_is_copied_by_a_fork() {
    let pace = Pace {
        sleep_millisecs: 0,
        ..Pace::default()
    };
    let settings = Settings {
        pace,
        ..Settings::default()
    };
    let engine = Engine::new(&settings).expect("this host has userfaultfd");
    let regions = [0, 1].map(|number| {
        let mapping = Mapping::new(PAGES * PAGE_SIZE_BYTES).expect("there is room");
        let region = engine
            .register(mapping)
            .expect("the kernel takes the range");
        fill(&region, number);
        region
    });
    settle(&engine);
    assert!(engine.stats().pages_sharing > 1000, "{:?}", engine.stats());
    let all: Vec<String> = regions
        .iter()
        .flat_map(|region| flags(region.mapping()))
        .collect();
    assert!(all.len() > 100, "{} mappings", all.len());
    let is_copied = |flags: &&String| !flags.split_whitespace().any(|flag| flag == "dc");
    assert_eq!(all.iter().find(is_copied), None);
}
