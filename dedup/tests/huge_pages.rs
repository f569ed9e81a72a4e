//! Transparent huge pages under the engine: which are split, and what comes back.
#![expect(unsafe_code, reason = "plays the guest: writes to mapped memory")]

use std::fs;
use std::time::{Duration, Instant};

use dedup::{Engine, Mapping, PAGE_SIZE_BYTES, PAGE_WORDS, RegionHandle, Settings, Stats};

const HUGE_PAGE_PAGES: usize = 512;

/// Two regions of one huge page each, whose first `equal_pages` pages are equal, after merging.
fn merged(equal_pages: usize, settings: &Settings) -> (Engine, [RegionHandle; 2], Stats) {
    let engine = Engine::new(settings).expect("this host has userfaultfd");
    let regions = [0, 1].map(|region| {
        let mapping = Mapping::with_huge_pages(HUGE_PAGE_PAGES * PAGE_SIZE_BYTES)
            .expect("address space is there");
        let region_of = |page| if page < equal_pages { 0 } else { region };
        for page in 0..HUGE_PAGE_PAGES {
            let content = 1 + page as u64 * 2 + region_of(page);
            for word in 0..PAGE_WORDS {
                let address = mapping.as_ptr().cast::<u64>().wrapping_add(page * PAGE_WORDS + word);
                // SAFETY: the word lies inside the mapping, which nobody else uses yet.
                unsafe { address.write_volatile(content * (word as u64 + 1)) };
            }
        }
        assert_eq!(
            huge_bytes(&mapping),
            HUGE_PAGE_PAGES * PAGE_SIZE_BYTES,
            "this test needs transparent huge pages (/sys/kernel/mm/transparent_hugepage/enabled: madvise or always)"
        );
        engine.register(mapping).expect("the kernel takes the range")
    });
    let deadline = Instant::now() + Duration::from_secs(60);
    assert!(engine.wait_full_scans(4, deadline), "four passes in time");
    let stats = engine.stats();
    (engine, regions, stats)
}

/// Bytes of a mapping that lie in huge pages, by `/proc/self/smaps`.
fn huge_bytes(mapping: &Mapping) -> usize {
    let start = mapping.as_ptr().addr();
    let end = start + mapping.size_bytes();
    let smaps = fs::read_to_string("/proc/self/smaps").expect("smaps is there");
    let mut inside = false;
    let mut bytes = 0;
    for line in smaps.lines() {
        let head = line.split(' ').next().unwrap_or_default();
        if let Some((from, to)) = head.split_once('-')
            && let (Ok(from), Ok(to)) = (
                usize::from_str_radix(from, 16),
                usize::from_str_radix(to, 16),
            )
        {
            inside = from < end && start < to;
        } else if inside && let Some(kib) = line.strip_prefix("AnonHugePages:") {
            let kib = kib.trim().trim_end_matches(" kB");
            bytes += kib.parse::<usize>().expect("a number") * 1024;
        }
    }
    bytes
}

/// Huge pages that the kernel has split since it started.
fn split_pages() -> u64 {
    let vmstat = fs::read_to_string("/proc/vmstat").expect("vmstat is there");
    let line = vmstat
        .lines()
        .find_map(|line| line.strip_prefix("thp_split_page "));
    line.expect("the kernel counts splits")
        .parse()
        .expect("a number")
}

#[test]
fn a_huge_page_with_little_to_share_stays_whole() {
    let (_engine, regions, stats) = merged(100, &Settings::default());
    assert_eq!(stats.pages_sharing, 0, "{stats:?}");
    for region in &regions {
        assert_eq!(
            huge_bytes(region.mapping()),
            HUGE_PAGE_PAGES * PAGE_SIZE_BYTES
        );
    }
}

#[test]
fn a_huge_page_with_enough_to_share_is_split_and_gives_its_pages_back() {
    let before = split_pages();
    let (_engine, regions, stats) = merged(300, &Settings::default());
    assert_eq!(stats.pages_sharing, 300, "{stats:?}");
    assert!(
        split_pages() >= before + 2,
        "both are split at once, not when memory is short"
    );
    for region in &regions {
        assert_eq!(huge_bytes(region.mapping()), 0);
    }
}

#[test]
fn how_much_is_enough_is_a_setting() {
    let settings = Settings {
        huge_page_shared_pages_min: Some(100),
        ..Settings::default()
    };
    let (_engine, _regions, stats) = merged(100, &settings);
    assert_eq!(stats.pages_sharing, 100, "{stats:?}");
}

#[test]
fn huge_pages_that_are_equal_as_a_whole_are_shared_as_a_whole() {
    let (engine, regions, stats) = merged(HUGE_PAGE_PAGES, &Settings::default());
    assert_eq!(stats.pages_sharing, HUGE_PAGE_PAGES as u64, "{stats:?}");
    let [one, other] = regions;
    assert_eq!((one.stats().vmas, other.stats().vmas), (1, 1));
    drop((one, other, engine));
}
