//! Everything at once on real memory: regions of all kinds come and go, their guests write and check
//! each page that they read, while the engine is told to merge, to stop and to unmerge.
#![expect(
    unsafe_code,
    reason = "plays the guests: reads and writes mapped memory"
)]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use dedup::{
    DirtySource, Engine, Mapping, PAGE_SIZE_BYTES, PAGE_WORDS, Pace, PageSet, RegionHandle, Run,
    Settings,
};

const PAGES: usize = 3 * 512 + 100;
const REGIONS: usize = 6;
const VMA_BUDGET: u32 = 1500;

/// One test at a time: what fails, fails in the whole process.
static ALONE: Mutex<()> = Mutex::new(());

/// A generator of numbers (splitmix64).
#[derive(Clone)]
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end as u64).expect("below a usize")
    }
}

#[derive(Clone, Debug)]
struct Written(Arc<Mutex<PageSet>>);

impl DirtySource for Written {
    fn collect(&self, dirty: &mut PageSet, _ignored: &PageSet) -> std::io::Result<()> {
        let mut written = self.0.lock().expect("nobody panics with it");
        let empty = PageSet::new(written.pages());
        let taken = std::mem::replace(&mut *written, empty);
        drop(written);
        (0..taken.pages())
            .filter(|&page| taken.contains(page))
            .for_each(|page| dirty.insert(page));
        Ok(())
    }
}

/// A region and what its guest knows of it.
struct Guest {
    region: RegionHandle,
    written: Option<Written>,
    /// Number of each page's content; 0 for zeros.
    contents: Vec<u64>,
    numbers: Numbers,
}

impl Guest {
    fn new(engine: &Engine, seed: u64) -> Guest {
        let mut numbers = Numbers(seed);
        let size_bytes = PAGES * PAGE_SIZE_BYTES;
        let mapping = match numbers.below(2) {
            0 => Mapping::new(size_bytes),
            _ => Mapping::with_huge_pages(size_bytes),
        };
        let mapping = mapping.expect("address space is there");
        let written = (numbers.below(2) == 0).then(|| {
            let none = PageSet::new(u32::try_from(PAGES).expect("few pages"));
            Written(Arc::new(Mutex::new(none)))
        });
        let registered = match &written {
            Some(written) => engine.register_watched(mapping, Box::new(written.clone())),
            None => engine.register(mapping),
        };
        let region = registered.expect("the kernel takes the range");
        Guest {
            region,
            written,
            contents: vec![0; PAGES],
            numbers,
        }
    }

    fn word(&self, page: usize, word: usize) -> *mut u64 {
        let words = self.region.mapping().as_ptr().cast::<u64>();
        words.wrapping_add(page * PAGE_WORDS + word)
    }

    fn check(&self, page: usize) {
        let content = self.contents[page];
        for index in 0..PAGE_WORDS {
            // SAFETY: the word lies inside the region, which is mapped.
            let found = unsafe { self.word(page, index).read_volatile() };
            let expected = content.wrapping_mul(index as u64 + 1);
            assert_eq!(found, expected, "page {page} word {index}: {content}");
        }
    }

    fn write(&mut self, page: usize, content: u64) {
        for index in 0..PAGE_WORDS {
            let value = content.wrapping_mul(index as u64 + 1);
            // SAFETY: the word lies inside the region, which is mapped.
            unsafe { self.word(page, index).write_volatile(value) };
        }
        self.contents[page] = content;
        if let Some(written) = &self.written {
            let page = u32::try_from(page).expect("few pages");
            written
                .0
                .lock()
                .expect("nobody panics with it")
                .insert(page);
        }
    }

    /// Gives pages up. What it could not give up it still has.
    fn give_up(&mut self, pages: std::ops::Range<usize>) {
        let count = u32::try_from(pages.len()).expect("few pages");
        let first = u32::try_from(pages.start).expect("few pages");
        let discarded = self.region.access().discard(first..first + count);
        if discarded.is_ok_and(|discarded| discarded == count) {
            pages.for_each(|page| self.contents[page] = 0);
            return;
        }
        for page in pages {
            // SAFETY: the word lies inside the region, which is mapped.
            let shows = unsafe { self.word(page, 0).read_volatile() };
            self.contents[page] = if shows == 0 { 0 } else { self.contents[page] };
        }
    }

    /// One thing that a guest does.
    fn step(&mut self) {
        let page = self.numbers.below(PAGES);
        match self.numbers.below(100) {
            0..40 => self.check(page),
            // The same run everywhere.
            40..42 => (page..PAGES.min(page + 200)).for_each(|page| {
                self.check(page);
                self.write(page, 1000 + page as u64);
            }),
            // The same content everywhere.
            42..55 => self.write(page, 1 + page as u64 % 7),
            // Shuffled.
            55..60 => self.write(page, 1000 + self.numbers.clone().below(PAGES) as u64),
            60..62 => (page..PAGES.min(page + 300)).for_each(|page| self.write(page, 0)),
            62..68 => self.write(page, 0),
            68..70 => self.give_up(page..PAGES.min(page + 200)),
            70 => self.give_up(page..page + 1),
            71..80 => {
                let own = self.numbers.next();
                self.write(page, own);
            }
            80 => (page..PAGES.min(page + 500)).for_each(|page| {
                let own = self.numbers.next();
                self.write(page, own);
            }),
            _ => {
                self.check(page);
                let content = self.contents[page];
                // The same once more: a silent write.
                self.write(page, content);
            }
        }
    }

    fn check_all(&self) {
        (0..PAGES).for_each(|page| self.check(page));
    }

    fn range(&self) -> std::ops::Range<usize> {
        let start = self.region.mapping().as_ptr().addr();
        start..start + self.region.mapping().size_bytes()
    }
}

/// VMAs that lie in a range, by `/proc/self/maps`.
fn vmas(range: &std::ops::Range<usize>) -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("maps is there");
    let inside = |line: &&str| {
        let addresses = line.split(' ').next().unwrap_or_default();
        let parse = |text| usize::from_str_radix(text, 16).expect("an address");
        let (from, to) = addresses.split_once('-').expect("a range");
        parse(from) < range.end && range.start < parse(to)
    };
    maps.lines().filter(inside).count()
}

fn run_guests(guests: &mut [Guest], engine: &Engine, numbers: &mut Numbers) {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for guest in guests.iter_mut() {
            let stop = &stop;
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    guest.step();
                    if guest.numbers.below(64) == 0 {
                        std::thread::yield_now();
                    }
                }
            });
        }
        // A guest that panics must not leave the others running.
        struct Stop<'a>(&'a AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let _stop = Stop(&stop);
        for _ in 0..4 {
            let deadline = Instant::now() + Duration::from_millis(150);
            engine.wait_full_scans(20, deadline);
            match numbers.below(6) {
                0 => {
                    let _ = engine.set_run(Run::Unmerge);
                    let _ = engine.set_run(Run::Merge);
                }
                // In use or not: both are orders that come now and then.
                order @ 1..3 => {
                    let _ = engine.try_set_hurry(order == 1);
                }
                _ => {}
            }
        }
    });
}

/// What a recount finds that differs from the engine's counters.
fn differences(guests: &[Guest], engine: &Engine) -> Vec<String> {
    let stats = engine.stats();
    let (vma_count, of_regions) = guests.iter().fold((0, 0), |(vma_count, merging), guest| {
        let of_region = guest.region.stats().pages_merging;
        (vma_count + vmas(&guest.range()), merging + of_region)
    });
    let pool_bytes = engine.process_memory().pool_bytes().expect("fstat");
    let checks = [
        (
            vma_count as u64 <= stats.vmas + guests.len() as u64,
            format!("{vma_count} VMAs"),
        ),
        (
            of_regions == stats.pages_shared + stats.pages_sharing,
            format!("{of_regions} pages of regions"),
        ),
        (
            pool_bytes == stats.pool_bytes,
            format!("{pool_bytes} bytes of the pool"),
        ),
    ];
    let wrong = checks.into_iter().filter(|(is_right, _)| !is_right);
    wrong
        .map(|(_, text)| format!("{text}: {stats:?}"))
        .collect()
}

fn assert_settles(guests: &[Guest], engine: &Engine) {
    let deadline = Instant::now() + Duration::from_secs(120);
    assert!(engine.wait_full_scans(6, deadline), "six passes in time");
    let stats = engine.stats();
    assert!(stats.vmas <= u64::from(VMA_BUDGET), "{stats:?}");
    // Counted until it agrees: the worker may be merging between two looks, and pages that could
    // not be punched go with a later sweep.
    loop {
        let found = differences(guests, engine);
        if found.is_empty() {
            break;
        }
        assert!(engine.wait_full_scans(1, deadline), "{found:?}");
    }
    guests.iter().for_each(Guest::check_all);
}

/// A number from the environment, for longer tests and other ones.
fn number(name: &str) -> Option<u64> {
    Some(std::env::var(name).ok()?.parse().expect("a number"))
}

fn rounds(rounds: u64, seed: u64, mut before: impl FnMut(u64), mut after: impl FnMut()) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let settings = Settings {
        vma_budget: Some(VMA_BUDGET),
        pace: Pace {
            pages_to_scan: 512,
            sleep_millisecs: 1,
            ..Pace::default()
        },
        huge_page_shared_pages_min: Some(64),
        ..Settings::default()
    };
    let engine = Engine::new(&settings).expect("this host has userfaultfd");
    let mut numbers = Numbers(seed);
    let mut guests: Vec<Guest> = (0..REGIONS)
        .map(|_| Guest::new(&engine, numbers.next()))
        .collect();
    for round in 0..rounds {
        before(round);
        run_guests(&mut guests, &engine, &mut numbers);
        if numbers.below(3) == 0 {
            let guest = numbers.below(REGIONS);
            let _ = guests[guest].region.merge_now();
        }
        after();
        engine.set_run(Run::Merge).expect("merging starts");
        assert_settles(&guests, &engine);
        let leaving = numbers.below(REGIONS);
        guests[leaving] = Guest::new(&engine, numbers.next());
    }
    engine.set_run(Run::Unmerge).expect("there is memory");
    guests.iter().for_each(Guest::check_all);
    let stats = engine.stats();
    assert_eq!(
        (stats.pages_shared, stats.pages_sharing, stats.pages_zero),
        (0, 0, 0)
    );
    drop(guests);
}

#[test]
fn what_guests_read_is_what_they_wrote_whatever_the_engine_does() {
    rounds(
        number("ROUNDS").unwrap_or(6),
        number("SEED").unwrap_or(1),
        |_| (),
        || (),
    );
}

#[cfg(feature = "failpoints")]
#[test]
fn what_guests_read_is_what_they_wrote_whatever_fails() {
    const POINTS: [&str; 11] = [
        "mmap",
        "stage",
        "stage_copies",
        "stage_zeros",
        "register_again",
        "madvise",
        "userfaultfd",
        "pool_write",
        "mremap",
        "fallocate",
        "pagemap",
    ];
    rounds(
        number("ROUNDS").unwrap_or(7),
        number("SEED").unwrap_or(2),
        |round| {
            for point in POINTS {
                fail::cfg(point, "3%return").expect("a known action");
            }
            let point = POINTS[usize::try_from(round).expect("few") % POINTS.len()];
            fail::cfg(point, "40%return").expect("a known action");
        },
        || POINTS.into_iter().for_each(fail::remove),
    );
}
