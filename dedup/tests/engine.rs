//! The engine on real memory: real userfaultfd, real memfd, real copy-on-write.
#![expect(
    unsafe_code,
    reason = "plays the guest: reads and writes mapped memory"
)]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use dedup::{
    DirtySource, Engine, ExitPath, Mapping, PAGE_SIZE_BYTES, PAGE_WORDS, Pace, PageBuf, PageSet,
    RegionHandle, Run, Settings, Stats,
};

/// How long a loaded host may take for anything here; only a hang is longer.
const LONG: Duration = Duration::from_secs(120);

fn deadline() -> Instant {
    Instant::now() + LONG
}

fn engine(run: Run) -> Engine {
    Engine::new(&Settings {
        run,
        ..Settings::default()
    })
    .expect("this host has userfaultfd")
}

fn address(region: &RegionHandle, page: usize, word: usize) -> *mut u64 {
    assert!((page + 1) * PAGE_SIZE_BYTES <= region.mapping().size_bytes() && word < PAGE_WORDS);
    region
        .mapping()
        .as_ptr()
        .wrapping_add(page * PAGE_SIZE_BYTES + word * 8)
        .cast()
}

fn write_word(region: &RegionHandle, page: usize, word: usize, value: u64) {
    // SAFETY: `address` checked that the word lies inside the region, which is mapped.
    unsafe { address(region, page, word).write_volatile(value) }
}

fn read_word(region: &RegionHandle, page: usize, word: usize) -> u64 {
    // SAFETY: `address` checked that the word lies inside the region, which is mapped.
    unsafe { address(region, page, word).read_volatile() }
}

/// Fills each page with words that follow from its content's number; 0 gives a page of zeros.
fn fill(region: &RegionHandle, contents: impl IntoIterator<Item = u64>) {
    for (page, content) in contents.into_iter().enumerate() {
        for word in 0..PAGE_WORDS {
            write_word(region, page, word, content.wrapping_mul(word as u64 + 1));
        }
    }
}

fn assert_holds(region: &RegionHandle, contents: impl IntoIterator<Item = u64>) {
    for (page, content) in contents.into_iter().enumerate() {
        for word in 0..PAGE_WORDS {
            let expected = content.wrapping_mul(word as u64 + 1);
            assert_eq!(
                read_word(region, page, word),
                expected,
                "page {page} word {word}"
            );
        }
    }
}

fn region(engine: &Engine, pages: usize) -> RegionHandle {
    let mapping = Mapping::new(pages * PAGE_SIZE_BYTES).expect("address space is there");
    engine
        .register(mapping)
        .expect("the kernel takes the range")
}

fn settle(engine: &Engine) -> Stats {
    assert!(
        engine.wait_full_scans(4, deadline()),
        "four passes before the deadline"
    );
    engine.stats()
}

#[test]
fn equal_pages_of_two_regions_are_shared_and_still_read_the_same() {
    let engine = engine(Run::Merge);
    let regions = [region(&engine, 512), region(&engine, 512)];
    for region in &regions {
        fill(region, 1..=512);
    }
    let stats = settle(&engine);
    assert_eq!((stats.pages_shared, stats.pages_sharing), (512, 512));
    assert_eq!((stats.pages_unshared, stats.pages_volatile), (0, 0));
    for region in &regions {
        assert_holds(region, 1..=512);
        assert_eq!(region.stats().pages_merging, 512);
    }
    assert!(stats.saved_bytes > 450 * 4096, "{stats:?}");
}

#[test]
fn calls_that_page_faults_wait_for_are_counted() {
    let engine = engine(Run::Merge);
    let registered = engine.stats().mmap_write_locks;
    let regions = [region(&engine, 64), region(&engine, 64)];
    // A registration each, and one to keep it out of child processes.
    assert_eq!(engine.stats().mmap_write_locks, registered + 4);
    for region in &regions {
        fill(region, 1..=64);
    }
    assert_eq!(settle(&engine).pages_sharing, 64);
    let merged = engine.stats().mmap_write_locks;
    // The same again for each region, and a mapping.
    assert!(merged >= registered + 4 + 6, "{merged}");
    settle(&engine);
    assert_eq!(engine.stats().mmap_write_locks, merged, "at rest");
}

#[test]
fn a_write_breaks_the_sharing_for_the_writer_alone() {
    let engine = engine(Run::Merge);
    let (one, other) = (region(&engine, 64), region(&engine, 64));
    fill(&one, 7..71);
    fill(&other, 7..71);
    assert_eq!(settle(&engine).pages_sharing, 64);
    write_word(&one, 5, 100, 0xdead);
    assert_eq!(read_word(&other, 5, 100), 12 * 101);
    assert_eq!(read_word(&one, 5, 100), 0xdead);
    assert_eq!(read_word(&one, 5, 99), 12 * 100);
    let stats = settle(&engine);
    assert_eq!(
        (
            stats.pages_shared,
            stats.pages_sharing,
            stats.pages_unshared
        ),
        (64, 63, 1)
    );
}

/// A content that repeats inside a region is kept once for each place, so that nobody takes a mapping
/// for each of its pages.
#[test]
fn a_content_that_repeats_takes_no_mappings() {
    // A worker that is faster than the guests maps what is there of a block as runs.
    let engine = engine(Run::Stop);
    let regions = [(); 4].map(|()| region(&engine, 512));
    for region in &regions {
        fill(region, [7; 512]);
    }
    engine.set_run(Run::Merge).expect("it only says so");
    settle(&engine);
    let stats = settle(&engine);
    assert_eq!((stats.pages_shared, stats.pages_sharing), (512, 3 * 512));
    assert_eq!(stats.vmas, 4, "{stats:?}");
    let locks_before = engine.stats().mmap_write_locks;
    // Settling what was written to and is equal again takes no mapping call.
    engine.set_run(Run::Stop).expect("it only says so");
    for region in &regions {
        (0..512)
            .step_by(3)
            .for_each(|page| write_word(region, page, 0, 7));
    }
    engine.set_run(Run::Merge).expect("it only says so");
    let stats = settle(&engine);
    assert_eq!((stats.pages_shared, stats.pages_sharing), (512, 3 * 512));
    assert_eq!(stats.mmap_write_locks, locks_before);
}

#[test]
fn zero_pages_are_given_back_without_a_pool_page() {
    let engine = engine(Run::Merge);
    let region = region(&engine, 100);
    fill(&region, [0; 100]);
    let stats = settle(&engine);
    assert_eq!(
        (stats.pages_zero, stats.pages_shared, stats.vmas),
        (100, 0, 1)
    );
    assert_holds(&region, [0; 100]);
    write_word(&region, 3, 3, 3);
    assert_eq!(settle(&engine).pages_zero, 99);
}

#[test]
fn a_shared_page_that_becomes_zero_never_shows_the_pool_again() {
    let engine = engine(Run::Merge);
    let (one, other) = (region(&engine, 16), region(&engine, 16));
    fill(&one, [9; 16]);
    fill(&other, [9; 16]);
    settle(&engine);
    fill(&one, [0; 16]);
    let stats = settle(&engine);
    assert_eq!(stats.pages_zero, 16);
    assert_holds(&one, [0; 16]);
    assert_holds(&other, [9; 16]);
}

#[test]
fn unmerge_restores_private_memory_and_leaves_the_pool_empty() {
    let engine = engine(Run::Merge);
    let regions = [
        region(&engine, 256),
        region(&engine, 256),
        region(&engine, 256),
    ];
    for region in &regions {
        fill(region, (0..256).map(|page| page % 50));
    }
    assert!(settle(&engine).pages_sharing > 490);
    engine.set_run(Run::Unmerge).expect("there is memory");
    let stats = engine.stats();
    assert_eq!(
        (stats.pages_shared, stats.pages_sharing, stats.pages_zero),
        (0, 0, 0)
    );
    assert_eq!((stats.pool_bytes, stats.full_scans), (0, 0));
    for region in &regions {
        assert_holds(region, (0..256).map(|page| page % 50));
    }
    engine.set_run(Run::Merge).expect("merging can go on");
    assert!(settle(&engine).pages_sharing > 490);
}

#[test]
fn a_region_that_leaves_takes_its_references_along() {
    let engine = engine(Run::Merge);
    let (one, other) = (region(&engine, 128), region(&engine, 128));
    fill(&one, 1..=128);
    fill(&other, 1..=128);
    settle(&engine);
    assert_eq!(one.exit(), ExitPath::HandedOver);
    let until = deadline();
    while engine.stats().slots > 1 {
        assert!(Instant::now() < until, "the worker finishes the slot");
        thread::yield_now();
    }
    assert_holds(&other, 1..=128);
    let stats = settle(&engine);
    assert_eq!((stats.pages_shared, stats.pages_sharing), (128, 0));
}

#[test]
fn a_stopped_engine_leaks_no_slot() {
    let engine = engine(Run::Stop);
    let never_scanned = region(&engine, 8);
    assert_eq!(never_scanned.exit(), ExitPath::Fast);
    engine.set_run(Run::Merge).expect("merging starts");
    let scanned = region(&engine, 8);
    fill(&scanned, [1; 8]);
    settle(&engine);
    engine.set_run(Run::Stop).expect("merging stops");
    scanned.exit();
    let until = deadline();
    while engine.stats().slots > 0 || engine.stats().pages_shared > 0 {
        assert!(
            Instant::now() < until,
            "the stopped worker still finishes slots"
        );
        thread::yield_now();
    }
}

#[test]
fn the_vma_budget_is_never_exceeded() {
    let budget = 40;
    let settings = Settings {
        vma_budget: Some(budget),
        ..Settings::default()
    };
    let engine = Engine::new(&settings).expect("this host has userfaultfd");
    let (one, other) = (region(&engine, 1024), region(&engine, 1024));
    fill(&one, 1..=1024);
    fill(&other, (1..=1024).rev());
    let stats = settle(&engine);
    assert!(stats.vmas <= u64::from(budget), "{stats:?}");
    assert!(
        stats.pages_over_vma_budget > 0 && stats.pages_sharing > 0,
        "{stats:?}"
    );
    assert_holds(&one, 1..=1024);
    assert_holds(&other, (1..=1024).rev());
}

/// Writers bump each page's counter in two places and see at once whether a bump got lost or torn.
#[test]
fn no_write_is_lost_while_pages_are_merged_and_unmerged_under_their_writers() {
    const PAGES: usize = 256;
    const CYCLES: usize = 200;
    let engine = Engine::new(&Settings::default()).expect("this host has userfaultfd");
    engine.set_pace(Pace {
        pages_to_scan: 100_000,
        sleep_millisecs: 0,
        ..Pace::default()
    });
    let regions = [(); 2].map(|()| region(&engine, PAGES));
    let (stop, rounds) = (AtomicBool::new(false), [const { AtomicU64::new(0) }; 2]);
    let rounds_of = || {
        rounds
            .each_ref()
            .map(|rounds| rounds.load(Ordering::Relaxed))
    };
    thread::scope(|scope| {
        let _stop = SetOnDrop(&stop);
        for (region, rounds) in regions.iter().zip(&rounds) {
            scope.spawn(|| write_and_check(region, PAGES, &stop, rounds));
        }
        for _ in 0..CYCLES {
            let before = rounds_of();
            assert!(engine.wait_full_scans(2, deadline()), "two passes in time");
            poll_until(|| {
                rounds_of()
                    .iter()
                    .zip(before)
                    .all(|(now, before)| *now > before)
            });
            engine.set_run(Run::Unmerge).expect("there is memory");
            engine.set_run(Run::Merge).expect("merging can go on");
        }
    });
    assert!(settle(&engine).pages_sharing > 0);
    for region in &regions {
        let mut page: PageBuf = [0; PAGE_WORDS];
        region.mapping().read_page(0, &mut page);
        assert_eq!(page[0], page[PAGE_WORDS - 1]);
    }
}

/// Lets the threads of a scope end, also where the test fails.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn write_and_check(region: &RegionHandle, pages: usize, stop: &AtomicBool, rounds: &AtomicU64) {
    let mut round = 0u64;
    while !stop.load(Ordering::Relaxed) {
        // Some pages rest for a few rounds, so that there are calm ones to merge.
        for page in (0..pages).filter(|page| page % 4 != 0 || round.is_multiple_of(64)) {
            let before = read_word(region, page, 0);
            assert_eq!(
                read_word(region, page, PAGE_WORDS - 1),
                before,
                "page {page}"
            );
            if page % 4 == 0 || page % 4 == 1 || round.is_multiple_of(512) {
                write_word(region, page, 0, before + 1);
                write_word(region, page, PAGE_WORDS - 1, before + 1);
                assert_eq!(read_word(region, page, 0), before + 1, "page {page}");
            }
        }
        round += 1;
        rounds.store(round, Ordering::Relaxed);
    }
}

#[test]
fn a_page_that_gets_its_shared_content_back_is_shared_again_without_a_new_mapping() {
    let engine = engine(Run::Merge);
    let (one, other) = (region(&engine, 256), region(&engine, 256));
    fill(&one, 1..=256);
    fill(&other, 1..=256);
    let vmas = settle(&engine).vmas;
    for round in 1..4 {
        for page in (0..256).step_by(2) {
            write_word(&one, page, 9, round);
        }
        let broken = settle(&engine);
        assert_eq!(broken.pages_sharing, 128, "{broken:?}");
        fill(&one, 1..=256);
        let restored = settle(&engine);
        assert_eq!((restored.pages_sharing, restored.vmas), (256, vmas));
        assert_holds(&one, 1..=256);
        assert_holds(&other, 1..=256);
    }
}

/// Tells what the test wrote.
#[derive(Clone, Debug, Default)]
struct Written(Arc<Mutex<Vec<u32>>>);

impl DirtySource for Written {
    fn collect(&self, dirty: &mut PageSet, _ignored: &PageSet) -> std::io::Result<()> {
        let mut written = self.0.lock().expect("nobody panicked");
        written.drain(..).for_each(|page| dirty.insert(page));
        Ok(())
    }
}

#[test]
fn pages_that_move_down_under_their_own_entries_leave_no_writer_asleep() {
    let engine = engine(Run::Stop);
    let written = Written::default();
    let mapping = Mapping::new(64 * PAGE_SIZE_BYTES).expect("address space is there");
    let region = engine.register_watched(mapping, Box::new(written.clone()));
    let region = Arc::new(region.expect("the kernel takes the range"));
    let put = |page: usize, content: u64| {
        for word in 0..PAGE_WORDS {
            write_word(&region, page, word, content.wrapping_mul(word as u64 + 1));
        }
        let page = u32::try_from(page).expect("few pages");
        written.0.lock().expect("nobody panicked").push(page);
    };
    (10..20).for_each(|page| put(page, 100 + page as u64));
    engine.set_run(Run::Merge).expect("merging starts");
    settle(&engine);
    engine.set_run(Run::Stop).expect("merging stops");
    (10..18).for_each(|page| put(page, 102 + page as u64));
    put(18, 999);
    engine.set_run(Run::Merge).expect("merging starts");
    settle(&engine);
    for page in 10..20 {
        let (done, wrote) = mpsc::channel();
        let region = Arc::clone(&region);
        thread::spawn(move || {
            write_word(&region, page, 0, 5);
            done.send(()).expect("somebody waits");
        });
        let woke = wrote.recv_timeout(LONG);
        assert_eq!(woke, Ok(()), "the writer of page {page} sleeps");
    }
}

#[test]
fn a_worker_with_a_cap_takes_its_share_of_a_cpu_and_no_more() {
    let pace = Pace {
        // Few: what a batch in hand took before the clock was read counts in the first figure.
        pages_to_scan: 100,
        sleep_millisecs: 0,
        max_cpu_percent: 10,
        ..Pace::default()
    };
    let settings = Settings {
        pace,
        ..Settings::default()
    };
    let engine = Engine::new(&settings).expect("this host has userfaultfd");
    // Nobody tells what was written, so each pass reads everything.
    let region = region(&engine, 20_000);
    fill(&region, 1..=20_000);
    let cpu = || Duration::from_micros(engine.stats().worker_cpu_us);
    let (begun, before) = (Instant::now(), cpu());
    let enough = before + Duration::from_millis(30);
    poll_until(|| cpu() >= enough);
    // Time that the worker did not get makes it longer, never shorter.
    let (wall, used) = (begun.elapsed(), cpu() - before);
    assert!(used < wall / 6, "{used:?} of {wall:?}");
}

/// Returns once `condition` holds; a test that waits too long fails.
fn poll_until(condition: impl Fn() -> bool) {
    let deadline = deadline();
    while !condition() {
        assert!(Instant::now() < deadline);
        thread::sleep(Duration::from_millis(2));
    }
}
