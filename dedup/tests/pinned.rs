//! Devices that use pages by their frames, while the engine merges: FUSE with direct I/O, `O_DIRECT`.

mod guest;
#[expect(dead_code, reason = "shared with tests that use more of it")]
#[path = "../../tests/tests/hung_storage/held_file.rs"]
mod held_file;

use std::fs::File;
use std::io::Seek;
use std::os::unix::fs::OpenOptionsExt;
use std::thread;
use std::time::{Duration, Instant};

use dedup::{Engine, Mapping, PAGE_SIZE_BYTES, PAGE_WORDS, Pace, RegionHandle, Run, Settings};
use guest::{assert_holds, read_file, read_word, write_page};
use held_file::{HeldFile, Reads, Silence};

/// Few enough for one request of FUSE.
const PAGES: u32 = 16;
/// Told by the number of a page of the file.
const FILE_CONTENT: u64 = 1000;

fn deadline() -> Instant {
    Instant::now() + Duration::from_secs(120)
}

fn engine(run: Run) -> Engine {
    let pace = Pace {
        sleep_millisecs: 0,
        ..Pace::default()
    };
    let settings = Settings {
        run,
        pace,
        ..Settings::default()
    };
    Engine::new(&settings).expect("this host has userfaultfd")
}

fn fill(region: &RegionHandle) {
    for page in 0..region.mapping().pages() as usize {
        write_page(region.mapping(), page, 1 + page as u64);
    }
}

/// Two regions with the same pages.
fn equal_regions(engine: &Engine, pages: u32) -> [RegionHandle; 2] {
    [0, 1].map(|_| {
        let mapping = Mapping::new(pages as usize * PAGE_SIZE_BYTES).expect("there is room");
        let region = engine
            .register(mapping)
            .expect("the kernel takes the range");
        fill(&region);
        region
    })
}

/// A file with pages of another content.
fn file_bytes(pages: u32) -> Vec<u8> {
    let word = |page: u64, word: u64| ((FILE_CONTENT + page) * (word + 1)).to_le_bytes();
    let words = 0..PAGE_WORDS as u64;
    let page = |page| words.clone().flat_map(move |at| word(page, at));
    (0..u64::from(pages)).flat_map(page).collect()
}

fn settle(engine: &Engine) {
    assert!(engine.wait_full_scans(4, deadline()), "passes go by");
}

/// The first region holds the file, the second what both held.
fn assert_read(regions: &[RegionHandle; 2], pages: u32) {
    for page in 0..pages as usize {
        assert_holds(regions[0].mapping(), page, FILE_CONTENT + page as u64);
        assert_holds(regions[1].mapping(), page, 1 + page as u64);
    }
}

/// Reads a file of FUSE into the first of two equal regions, all of whose pages the engine would
/// merge during the read. Returns whether any of them was merged in that time.
fn read_while_merging(engine: &Engine, regions: &[RegionHandle; 2], is_pinned: bool) -> bool {
    let file = HeldFile::mount(file_bytes(PAGES), Reads::Direct);
    file.hold(Silence::ReadsBehind(0));
    let access = regions[0].access();
    let pin = is_pinned.then(|| access.pin(0..PAGES).expect("there is memory"));
    let mut opened = File::open(file.path()).expect("it is mounted");
    let is_merged = thread::scope(|scope| {
        let read = scope.spawn(|| read_file(regions[0].mapping(), PAGES as usize, &mut opened));
        let deadline = deadline();
        while !file.is_waited_for() {
            assert!(Instant::now() < deadline, "nobody reads");
            thread::yield_now();
        }
        engine.set_run(Run::Merge).expect("merging cannot fail");
        settle(engine);
        let is_merged = regions[0].stats().pages_merging > 0;
        file.let_go();
        read.join().expect("the file is read");
        is_merged
    });
    drop(pin);
    is_merged
}

#[test]
fn what_a_file_of_fuse_is_read_into_is_merged_after_the_read_and_not_during_it() {
    let engine = engine(Run::Stop);
    let regions = equal_regions(&engine, PAGES);
    assert!(!read_while_merging(&engine, &regions, true));
    assert_read(&regions, PAGES);
    // Unpinned, they are merged like any other.
    fill(&regions[0]);
    settle(&engine);
    assert_eq!(engine.stats().pages_sharing, u64::from(PAGES));
}

/// What the pin is for: should this fail one day, the kernel does it better, and pins can go.
#[test]
fn without_a_pin_what_is_read_during_a_merge_is_lost() {
    let engine = engine(Run::Stop);
    let regions = equal_regions(&engine, PAGES);
    assert!(read_while_merging(&engine, &regions, false));
    assert_eq!(
        read_word(regions[0].mapping(), 0, 0),
        1,
        "the content from before"
    );
}

#[test]
fn shared_pages_that_a_device_writes_to_are_made_private_first() {
    let engine = engine(Run::Merge);
    let regions = equal_regions(&engine, PAGES);
    settle(&engine);
    assert_eq!(engine.stats().pages_sharing, u64::from(PAGES));
    assert!(!read_while_merging(&engine, &regions, true));
    assert_read(&regions, PAGES);
}

/// Real direct reads, one after the other, while the engine merges as fast as it can.
#[test]
fn direct_reads_are_whole_while_the_engine_merges() {
    const BIG: u32 = 256;
    const ROUNDS: u32 = 100;
    let path = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("direct_reads");
    std::fs::write(&path, file_bytes(BIG)).expect("there is room");
    let mut options = File::options();
    let opened = options.read(true).custom_flags(libc::O_DIRECT).open(&path);
    let mut file = match opened {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => {
            eprintln!("skipped: no direct I/O in {}", path.display());
            return;
        }
        Err(error) => panic!("{error}"),
    };
    let engine = engine(Run::Merge);
    let regions = equal_regions(&engine, BIG);
    let access = regions[0].access();
    for round in 0..ROUNDS {
        fill(&regions[0]);
        if round % 3 == 0 {
            settle(&engine);
        }
        let pin = access.pin(0..BIG).expect("there is memory");
        file.rewind().expect("a file");
        read_file(regions[0].mapping(), BIG as usize, &mut file);
        drop(pin);
        assert_read(&regions, BIG);
    }
    std::fs::remove_file(&path).expect("it is there");
}
