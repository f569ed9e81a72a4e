//! What `huge_page_shared_pages_min` does: memory given back against what the guest pays, by the
//! share of each huge page that could be merged: `cargo bench -p dedup --bench huge_threshold`.
#![expect(
    unsafe_code,
    reason = "plays the guest: reads and writes mapped memory"
)]

use std::error::Error;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use dedup::{
    DirtySource, Engine, Mapping, PAGE_SIZE_BYTES, PAGE_WORDS, Pace, PageSet, RegionHandle, Run,
    Settings,
};
use serde_json::{Value, json};

const HUGE_PAGE_PAGES: usize = 512;
const HUGE_PAGES: usize = 32;
const PAGES: usize = HUGE_PAGES * HUGE_PAGE_PAGES;

/// Of each huge page, the share of pages that another region has too, in percent.
const SHARED_PERCENT: [usize; 5] = [5, 25, 50, 75, 100];
/// Values of the setting; 256 is the default.
const THRESHOLDS: [u32; 4] = [1, 64, 256, 512];

const ACCESSES: usize = 4_000_000;

type Outcome<T> = Result<T, Box<dyn Error>>;

/// A seeded generator (xorshift).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 11).unwrap_or(0) % bound
    }
}

/// Which pages of a region both have: `percent` of each huge page, at random places.
fn shared_places(percent: usize) -> Vec<bool> {
    let mut random = Random(7);
    let mut places = Vec::with_capacity(PAGES);
    for _ in 0..HUGE_PAGES {
        let shared = HUGE_PAGE_PAGES * percent / 100;
        let mut block: Vec<bool> = (0..HUGE_PAGE_PAGES).map(|page| page < shared).collect();
        for last in (1..block.len()).rev() {
            block.swap(last, random.below(last + 1));
        }
        places.extend(block);
    }
    places
}

fn word(mapping: &Mapping, page: usize, word: usize) -> *mut u64 {
    let start: *mut u64 = mapping.as_ptr().cast();
    start.wrapping_add(page * PAGE_WORDS + word)
}

fn filled(region: u64, places: &[bool]) -> Outcome<Mapping> {
    let mapping = Mapping::with_huge_pages(PAGES * PAGE_SIZE_BYTES)?;
    for (page, &is_shared) in places.iter().enumerate() {
        let owner = if is_shared { 0 } else { region };
        let mut content = (owner * PAGES as u64 + page as u64 + 1) * 0x9e37_79b9_7f4a_7c15;
        for index in 0..PAGE_WORDS {
            content ^= content << 13;
            content ^= content >> 7;
            content ^= content << 17;
            // SAFETY: a word of the mapping, which nobody else uses yet.
            unsafe { word(&mapping, page, index).write_volatile(content) };
        }
    }
    if huge_pages(&mapping)? < HUGE_PAGES {
        return Err("needs /sys/kernel/mm/transparent_hugepage/enabled: madvise or always".into());
    }
    Ok(mapping)
}

/// Huge pages that a mapping lies in, by `/proc/self/smaps`.
fn huge_pages(mapping: &Mapping) -> Outcome<usize> {
    let start = mapping.as_ptr().addr();
    let end = start + mapping.size_bytes();
    let mut inside = false;
    let mut kib = 0;
    for line in fs::read_to_string("/proc/self/smaps")?.lines() {
        let head = line.split(' ').next().unwrap_or_default();
        if let Some((from, to)) = head.split_once('-') {
            if let (Ok(from), Ok(to)) = (
                usize::from_str_radix(from, 16),
                usize::from_str_radix(to, 16),
            ) {
                inside = from < end && start < to;
            }
        } else if inside && let Some(text) = line.strip_prefix("AnonHugePages:") {
            kib += text.trim().trim_end_matches(" kB").parse::<usize>()?;
        }
    }
    Ok(kib * 1024 / (HUGE_PAGE_PAGES * PAGE_SIZE_BYTES))
}

/// Which words are accessed.
#[derive(Clone, Copy)]
enum Spread {
    /// Any: data comes from memory, and so does what the address is translated by.
    AllLines,
    /// One line of each page: data comes from a cache, so that what is left is translation.
    OneLine,
}

/// Nanoseconds of a random access, each after the one before it: a read, and a write of the same
/// where the page is the region's own. Writes to shared pages would break the sharing; what that
/// costs is another question (`versus_ksm`, `churn`).
fn access_ns(mapping: &Mapping, places: &[bool], spread: Spread) -> f64 {
    for page in 0..PAGES {
        // SAFETY: a word of the mapping. What was swapped is faulted in first.
        unsafe { word(mapping, page, 0).read_volatile() };
    }
    let mut random = Random(11);
    let begun = Instant::now();
    for _ in 0..ACCESSES {
        let place = random.below(PAGES * PAGE_WORDS);
        let page = place / PAGE_WORDS;
        let index = match spread {
            Spread::AllLines => place % PAGE_WORDS,
            // Another line in each page, or all would compete for a few places in the caches.
            Spread::OneLine => page * 8 % PAGE_WORDS,
        };
        let address = word(mapping, page, index);
        // SAFETY: a word of the mapping, which no other thread writes to.
        let value = unsafe { address.read_volatile() };
        if !places[page] {
            // SAFETY: as above.
            unsafe { address.write_volatile(value) };
        }
        // The next address waits for this value.
        random.0 ^= value & 1;
        random.0 |= 1 << 40;
    }
    let accesses = u32::try_from(ACCESSES).unwrap_or(u32::MAX);
    begun.elapsed().as_secs_f64() * 1e9 / f64::from(accesses)
}

/// By [`Spread::AllLines`] and [`Spread::OneLine`].
fn both_ns(mapping: &Mapping, places: &[bool]) -> [f64; 2] {
    [Spread::AllLines, Spread::OneLine].map(|spread| access_ns(mapping, places, spread))
}

/// A guest that writes nothing once it is filled.
#[derive(Debug)]
struct Silent;

impl DirtySource for Silent {
    fn collect(&self, _dirty: &mut PageSet, _ignored: &PageSet) -> std::io::Result<()> {
        Ok(())
    }
}

/// One round of one threshold over memory of one kind.
#[derive(Clone, Copy)]
struct Round {
    saved_mib: f64,
    huge_pages: f64,
    access_ns: [f64; 2],
    vmas: f64,
}

#[expect(clippy::cast_precision_loss, reason = "figures of a report")]
fn measured(threshold: u32, places: &[bool]) -> Outcome<Round> {
    let settings = Settings {
        pace: Pace {
            sleep_millisecs: 0,
            ..Pace::default()
        },
        huge_page_shared_pages_min: Some(threshold),
        ..Settings::default()
    };
    let engine = Engine::new(&settings)?;
    let regions: Vec<RegionHandle> = [1, 2]
        .into_iter()
        .map(|region| Ok(engine.register_watched(filled(region, places)?, Box::new(Silent))?))
        .collect::<Outcome<_>>()?;
    if !engine.wait_full_scans(6, Instant::now() + Duration::from_secs(60)) {
        return Err("six passes take more than a minute".into());
    }
    engine.set_run(Run::Stop)?;
    let stats = engine.stats();
    let left: usize = regions
        .iter()
        .map(|region| huge_pages(region.mapping()))
        .sum::<Outcome<usize>>()?;
    Ok(Round {
        saved_mib: stats.saved_bytes as f64 / f64::from(1 << 20),
        huge_pages: left as f64,
        access_ns: both_ns(regions[1].mapping(), places),
        vmas: stats.vmas as f64,
    })
}

fn median<T>(rounds: &[T], of: impl Fn(&T) -> f64) -> f64 {
    let mut figures: Vec<f64> = rounds.iter().map(of).collect();
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

/// What the command line asks for.
struct Options {
    json: Option<PathBuf>,
    rounds: usize,
}

fn options() -> Outcome<Options> {
    let (mut json, mut rounds) = (None, 3);
    let mut words = std::env::args().skip(1);
    while let Some(option) = words.next() {
        match option.as_str() {
            "--bench" => {}
            "--json" => json = Some(words.next().ok_or("--json: a file is missing")?.into()),
            "--rounds" => {
                let count = words.next().ok_or("--rounds: a count is missing")?;
                rounds = count.parse()?;
            }
            other => return Err(format!("{other}: unknown (--json FILE, --rounds N)").into()),
        }
    }
    Ok(Options {
        json,
        rounds: rounds.max(1),
    })
}

/// Prints what each threshold makes of memory of one kind.
fn compare(percent: usize, rounds: usize, report: &mut Vec<Value>) -> Outcome<()> {
    let places = shared_places(percent);
    let mut unmerged_ns = Vec::new();
    let mut by_threshold = vec![Vec::new(); THRESHOLDS.len()];
    for _ in 0..rounds {
        unmerged_ns.push(both_ns(&filled(1, &places)?, &places));
        for (threshold, rounds) in THRESHOLDS.into_iter().zip(&mut by_threshold) {
            rounds.push(measured(threshold, &places)?);
        }
    }
    for (threshold, rounds) in THRESHOLDS.into_iter().zip(&by_threshold) {
        let figure = |of: fn(&Round) -> f64| median(rounds, of);
        let (saved_mib, left) = (figure(|r| r.saved_mib), figure(|r| r.huge_pages));
        let vmas = figure(|r| r.vmas);
        let ns = [figure(|r| r.access_ns[0]), figure(|r| r.access_ns[1])];
        let relative = [0, 1].map(|spread| ns[spread] / median(&unmerged_ns, |ns| ns[spread]));
        println!(
            "{percent:>6} % {threshold:>9} {saved_mib:>10.1} {left:>10.0} {vmas:>7.0} {:>9.1} {:>6.2} {:>9.1} {:>6.2}",
            ns[0], relative[0], ns[1], relative[1]
        );
        report.push(json!({
            "shared_percent": percent,
            "huge_page_shared_pages_min": threshold,
            "saved_mib": saved_mib,
            "huge_pages_left": left,
            "vmas": vmas,
            "access_ns": { "all_lines": ns[0], "one_line": ns[1] },
            "access_to_unmerged": { "all_lines": relative[0], "one_line": relative[1] },
        }));
    }
    Ok(())
}

fn bench() -> Outcome<()> {
    let options = options()?;
    println!(
        "2 regions of {} huge pages, of each of which a share is in both. Time of a random\n\
         access, and to that of unmerged huge pages: to any line of memory, and to one line of each page.",
        HUGE_PAGES
    );
    println!("  shared threshold  saved MiB  huge left    VMAs  any line, ns     one line, ns");
    let mut report = Vec::new();
    for percent in SHARED_PERCENT {
        compare(percent, options.rounds, &mut report)?;
    }
    if let Some(path) = options.json {
        let text = serde_json::to_string_pretty(&json!({ "huge_threshold": report }))?;
        fs::write(path, text + "\n")?;
    }
    Ok(())
}

fn main() -> ExitCode {
    match bench() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("huge_threshold: error: {error}");
            ExitCode::FAILURE
        }
    }
}
