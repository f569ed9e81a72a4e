//! Transparent huge pages under the engine: which are split, and what comes back.

mod guest;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use dedup::{
    DirtySource, Engine, Mapping, PAGE_SIZE_BYTES, Pace, PageSet, RegionHandle, Run, Settings,
    Stats,
};
use guest::{smaps_bytes, write_page};

const HUGE_PAGE_PAGES: usize = 512;

fn deadline() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

/// A huge page whose first `equal_pages` pages are those of every other such, and the rest its own.
fn huge_page(region: u64, equal_pages: usize) -> Mapping {
    huge_pages(1, |page| {
        let owner = if page < equal_pages { 0 } else { region };
        1 + page as u64 + 1000 * owner
    })
}

/// Memory in huge pages alone, with a content for each page of 4 KiB.
///
/// The kernel gives base pages while its free memory is in pieces. It puts some together for each
/// try, and tries less often after each failure: a host with a full page cache needs many.
fn huge_pages(count: usize, content: impl Fn(usize) -> u64) -> Mapping {
    let until = deadline();
    loop {
        let mapping = Mapping::with_huge_pages(count * HUGE_PAGE_PAGES * PAGE_SIZE_BYTES)
            .expect("address space is there");
        for page in 0..count * HUGE_PAGE_PAGES {
            write_page(&mapping, page, content(page));
        }
        // At least: mappings of other tests may adjoin, and be one with it for the kernel.
        if huge_bytes(&mapping) >= mapping.size_bytes() {
            return mapping;
        }
        assert!(
            Instant::now() < until,
            "this test needs transparent huge pages (/sys/kernel/mm/transparent_hugepage/enabled: madvise or always)"
        );
    }
}

/// Two regions of one huge page each, after merging.
fn merged(equal_pages: usize, settings: &Settings) -> (Engine, [RegionHandle; 2], Stats) {
    let engine = Engine::new(settings).expect("this host has userfaultfd");
    let regions = [1, 2].map(|region| {
        let mapping = huge_page(region, equal_pages);
        engine
            .register(mapping)
            .expect("the kernel takes the range")
    });
    assert!(engine.wait_full_scans(4, deadline()), "four passes in time");
    let stats = engine.stats();
    (engine, regions, stats)
}

/// Bytes of a mapping that lie in huge pages.
fn huge_bytes(mapping: &Mapping) -> usize {
    smaps_bytes(mapping, "AnonHugePages")
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
    let (_engine, regions, stats) = merged(300, &Settings::default());
    assert_eq!(stats.pages_sharing, 300, "{stats:?}");
    for region in &regions {
        assert_eq!(huge_bytes(region.mapping()), 0);
        // At once, not when memory is short.
        let private_bytes = smaps_bytes(region.mapping(), "Anonymous");
        assert_eq!(private_bytes, (HUGE_PAGE_PAGES - 300) * PAGE_SIZE_BYTES);
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

/// Tells what the test itself wrote.
#[derive(Clone, Debug, Default)]
struct Written(Arc<Mutex<Vec<u32>>>);

impl DirtySource for Written {
    fn collect(&self, dirty: &mut PageSet, _ignored: &PageSet) -> std::io::Result<()> {
        let written = std::mem::take(&mut *self.0.lock().expect("nobody panics with it"));
        written.into_iter().for_each(|page| dirty.insert(page));
        Ok(())
    }
}

#[test]
fn pages_that_were_too_few_count_when_more_become_equal() {
    let engine = Engine::new(&Settings::default()).expect("this host has userfaultfd");
    let regions = [1, 2].map(|region| {
        let written = Written::default();
        let handle = engine.register_watched(huge_page(region, 200), Box::new(written.clone()));
        (handle.expect("the kernel takes the range"), written)
    });
    assert!(engine.wait_full_scans(4, deadline()), "four passes in time");
    assert_eq!(engine.stats().pages_sharing, 0, "too few to split for");
    for (region, written) in &regions {
        for page in 200..400 {
            write_page(region.mapping(), page, 7000 + page as u64);
        }
        written
            .0
            .lock()
            .expect("nobody panics with it")
            .extend(200..400);
    }
    assert!(engine.wait_full_scans(6, deadline()), "six passes in time");
    assert_eq!(engine.stats().pages_sharing, 400, "{:?}", engine.stats());
}

/// A region of two huge pages, of contents that no other has.
fn two_huge_pages(region: u64) -> Mapping {
    huge_pages(2, |page| 1_000_000 * region + page as u64)
}

#[test]
fn each_huge_page_is_judged_by_itself_when_merged_now() {
    let asleep = Pace {
        sleep_millisecs: 1_000_000,
        ..Pace::default()
    };
    let settings = Settings {
        pace: asleep,
        ..Settings::default()
    };
    let engine = Engine::new(&settings).expect("this host has userfaultfd");
    let regions = [1, 2].map(|region| {
        let written = Written::default();
        let handle = engine.register_watched(two_huge_pages(region), Box::new(written.clone()));
        (handle.expect("the kernel takes the range"), written)
    });
    assert!(engine.wait_full_scans(4, deadline()), "four passes in time");
    // Half of the first huge page, and less of the second.
    for (region, written) in &regions {
        (256..712).for_each(|page| write_page(region.mapping(), page, 7000 + page as u64));
        let mut written = written.0.lock().expect("nobody panics with it");
        written.extend(256..712);
    }
    // The second finds its equals in the first, which is merged with them when it is looked at again.
    for (region, _) in [&regions[0], &regions[1], &regions[0]] {
        region.merge_now().expect("the engine merges");
    }
    let stats = engine.stats();
    assert_eq!(stats.pages_sharing, 256, "{stats:?}");
}

#[test]
fn each_huge_page_of_partners_is_judged_by_itself() {
    let settings = Settings {
        run: Run::Stop,
        ..Settings::default()
    };
    let engine = Engine::new(&settings).expect("this host has userfaultfd");
    // The same 300 pages, which lie in two huge pages of the region that is visited first.
    let regions = [(1, 256), (2, 0)].map(|(region, from)| {
        let mapping = two_huge_pages(region);
        (0..300).for_each(|page| write_page(&mapping, from + page, 7000 + page as u64));
        engine
            .register(mapping)
            .expect("the kernel takes the range")
    });
    engine.set_run(Run::Merge).expect("merging starts");
    assert!(engine.wait_full_scans(4, deadline()), "four passes in time");
    let stats = engine.stats();
    assert_eq!(stats.pages_sharing, 256, "{stats:?}");
    assert!(
        huge_bytes(regions[0].mapping()) >= HUGE_PAGE_PAGES * PAGE_SIZE_BYTES,
        "the second is whole"
    );
}
