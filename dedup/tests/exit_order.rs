//! The order of an exit, on real memory: a worker starves for memory inside a region, and the
//! region's own exit is all that could feed it.
//!
//! Built with the feature `lock-before-free`, in which an exit takes the region lock before it gives
//! its memory back, the same test must find the deadlock.
#![expect(unsafe_code, reason = "plays the guest: writes to mapped memory")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use dedup::{Engine, Headroom, Mapping, MemoryGauge, PAGE_SIZE_BYTES, RegionHandle, Run, Settings};

const PAGES: usize = 256;

/// How long a loaded host may take for anything here; only a deadlock is longer.
const DEADLINE: Duration = Duration::from_secs(120);
/// How long an allocation waits for memory. Where there must be a deadlock, nobody need wait so long
/// for it.
const STARVING: Duration = if cfg!(feature = "lock-before-free") {
    Duration::from_secs(10)
} else {
    DEADLINE
};

/// An entry of `/proc/self/pagemap`: the page is in memory.
const PAGEMAP_PRESENT: u64 = 1 << 63;

/// Memory that there is none of until one page is given back. Who asks waits for that, as an
/// allocation waits in the kernel: without a look at any flag.
#[derive(Debug)]
struct OnePage {
    address: usize,
    is_asked: AtomicBool,
    is_deadlocked: AtomicBool,
}

impl OnePage {
    fn is_in_memory(&self) -> bool {
        let mut entry = [0; 8];
        let offset = self.address / PAGE_SIZE_BYTES * entry.len();
        File::open("/proc/self/pagemap")
            .and_then(|pagemap| pagemap.read_exact_at(&mut entry, offset as u64))
            .expect("every process may read where its pages are");
        u64::from_ne_bytes(entry) & PAGEMAP_PRESENT != 0
    }
}

impl MemoryGauge for OnePage {
    fn headroom(&self, _budget_bytes: Option<u64>) -> Option<Headroom> {
        self.is_asked.store(true, Ordering::SeqCst);
        if !wait_for(STARVING, || !self.is_in_memory()) {
            // The test goes on, to fail instead of hanging.
            self.is_deadlocked.store(true, Ordering::SeqCst);
        }
        None
    }
}

fn poll_until(condition: impl FnMut() -> bool) -> bool {
    wait_for(DEADLINE, condition)
}

fn wait_for(time: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + time;
    while !condition() {
        if Instant::now() > deadline {
            return false;
        }
        thread::yield_now();
    }
    true
}

/// A region whose first page is its own, and whose others are the same in every region.
fn region(engine: &Engine, own: u64) -> RegionHandle {
    let mapping = Mapping::new(PAGES * PAGE_SIZE_BYTES).expect("address space is there");
    let region = engine
        .register(mapping)
        .expect("the kernel takes the range");
    for page in 0..PAGES {
        let content = if page == 0 { own } else { page as u64 };
        let start = region
            .mapping()
            .as_ptr()
            .wrapping_add(page * PAGE_SIZE_BYTES);
        // SAFETY: the page lies inside the mapping, which is writable and aligned to pages.
        unsafe { start.cast::<u64>().write_volatile(content) }
    }
    region
}

#[test]
#[cfg_attr(feature = "lock-before-free", should_panic(expected = "deadlock"))]
fn an_unmerge_that_starves_inside_a_region_is_fed_by_the_exit_of_that_region() {
    let settings = Settings {
        // Nothing moves until both are there, so that the unmerge comes to the first one first.
        run: Run::Stop,
        ..Settings::default()
    };
    let engine = Arc::new(Engine::new(&settings).expect("this host has userfaultfd"));
    let [victim, other] = [1001, 1002].map(|own| region(&engine, own));
    engine.set_run(Run::Merge).expect("merging needs no memory");
    let are_merged = || engine.stats().pages_sharing >= PAGES as u64 - 1;
    assert!(poll_until(are_merged), "{:?}", engine.stats());
    engine.set_run(Run::Stop).expect("stopping needs no memory");

    let memory = Arc::new(OnePage {
        address: victim.mapping().as_ptr().addr(),
        is_asked: AtomicBool::new(false),
        is_deadlocked: AtomicBool::new(false),
    });
    assert!(memory.is_in_memory(), "the page that the exit will free");
    engine.set_memory_gauge(memory.clone());
    let unmerge = thread::spawn({
        let engine = engine.clone();
        move || engine.set_run(Run::Unmerge)
    });
    let is_asked = || memory.is_asked.load(Ordering::SeqCst);
    assert!(poll_until(is_asked), "the unmerge asks for memory");
    victim.exit();
    let unmerged = unmerge.join().expect("the unmerge ends");
    let is_deadlocked = memory.is_deadlocked.load(Ordering::SeqCst);
    assert!(
        !is_deadlocked,
        "deadlock: the exit waits for the unmerge, which waits for its memory"
    );
    unmerged.expect("the other region got its copies");
    assert_eq!(engine.stats().pages_sharing, 0);
    other.exit();
    let is_empty = || engine.stats().slots == 0;
    assert!(poll_until(is_empty), "slots are left");
}
