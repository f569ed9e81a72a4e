//! Unmerging with less memory than it takes.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crate::backing::fake::{FakeMemory, FakePage, FakePool};
use crate::base::budget::{Headroom, MemoryGauge, bytes_of};
use crate::base::pace::Pace;
use crate::base::sync;
use crate::merge::domain::Scanner;
use crate::pages::region::Region;
use crate::protocol::control::{Control, Run};
use crate::protocol::core::Shared;

const PAGES: u32 = 200;
const LONG: Duration = Duration::from_secs(120);

/// Counts the pages of the model.
#[derive(Debug)]
struct Recount {
    memories: Vec<FakeMemory>,
    pool: FakePool,
}

impl Recount {
    fn used_bytes(&self) -> u64 {
        let private = |memory: &FakeMemory| {
            let is_private = |&page: &u32| matches!(memory.page(page), FakePage::Private(_));
            (0..PAGES).filter(is_private).count()
        };
        let private: usize = self.memories.iter().map(private).sum();
        bytes_of(u32::try_from(private + self.pool.used_pages()).expect("few pages"))
    }
}

impl MemoryGauge for Recount {
    fn headroom(&self, budget_bytes: Option<u64>) -> Option<Headroom> {
        let as_of = Instant::now();
        let bytes = budget_bytes?.saturating_sub(self.used_bytes());
        Some(Headroom { bytes, as_of })
    }
}

struct World {
    shared: Arc<Shared<Scanner<FakeMemory>>>,
    memories: Vec<FakeMemory>,
    regions: Vec<Arc<Region<FakeMemory>>>,
    recount: Arc<Recount>,
}

/// `regions` regions of the same content, merged.
fn merged(regions: usize) -> World {
    let pool = FakePool::default();
    let scanner = Scanner::new(pool.clone(), 1000);
    let shared = Shared::new(scanner, Control::new(Run::Merge, Pace::default()));
    let memories: Vec<FakeMemory> = (0..regions)
        .map(|_| FakeMemory::new(PAGES, &pool))
        .collect();
    for memory in &memories {
        (0..PAGES).for_each(|page| memory.write(page, u64::from(page) + 1));
    }
    let register = |memory: &FakeMemory| shared.register(memory.clone(), None);
    let regions = memories.iter().map(register).collect();
    let recount = Arc::new(Recount {
        memories: memories.clone(),
        pool,
    });
    let world = World {
        shared: Arc::new(shared),
        memories,
        regions,
        recount,
    };
    for _ in 0..6 {
        while world.shared.batch(u32::MAX).passes == 0 {}
    }
    assert_eq!(world.recount.used_bytes(), bytes_of(PAGES), "all merged");
    world
}

impl World {
    fn set_budget(&self, pages: u32) {
        self.shared.budget.set_gauge(self.recount.clone());
        self.shared.budget.set_bytes(Some(bytes_of(pages)));
    }

    /// An unmerge on a thread of its own that waits for memory.
    fn starving_unmerge(&self) -> thread::JoinHandle<io::Result<()>> {
        self.shared.budget.set_patience(LONG);
        let theirs = Arc::clone(&self.shared);
        let unmerge = thread::spawn(move || theirs.unmerge_all());
        let deadline = Instant::now() + LONG;
        while self.shared.budget.waiting_bytes() == 0 {
            assert!(Instant::now() < deadline, "the unmerge does not wait");
            thread::yield_now();
        }
        unmerge
    }

    fn check_contents(&self, alive: &[usize]) {
        for &region in alive {
            for page in 0..PAGES {
                assert_eq!(self.memories[region].content(page), u64::from(page) + 1);
            }
        }
    }

    /// Pages that are mapped to the pool, by the model and by the engine's counters.
    fn sharers(&self) -> (usize, u64) {
        let shared = |memory: &FakeMemory| {
            let is_shared = |&page: &u32| matches!(memory.page(page), FakePage::Shared(_));
            (0..PAGES).filter(is_shared).count()
        };
        let stats = self.shared.stats();
        let counted = stats.pages_shared + stats.pages_sharing;
        (self.memories.iter().map(shared).sum(), counted)
    }
}

#[test]
fn an_unmerge_that_fits_the_budget_only_just_is_made() {
    let world = merged(3);
    // All private, and the pool until its last sharer leaves.
    world.set_budget(PAGES * 4);
    world.shared.budget.set_patience(Duration::ZERO);
    world.shared.unmerge_all().unwrap();
    assert_eq!(world.recount.used_bytes(), bytes_of(PAGES * 3));
    world.check_contents(&[0, 1, 2]);
}

#[test]
fn an_unmerge_that_does_not_fit_fails_within_the_budget_and_with_exact_counters() {
    let world = merged(4);
    world.set_budget(PAGES * 3);
    world.shared.budget.set_patience(Duration::ZERO);
    let error = world.shared.unmerge_all().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::OutOfMemory);
    assert!(error.to_string().contains("memory budget"), "{error}");
    assert!(world.recount.used_bytes() <= bytes_of(PAGES * 3));
    let (mapped, counted) = world.sharers();
    assert_eq!(mapped as u64, counted, "what is still merged is counted");
    assert!(mapped > 0);
    world.check_contents(&[0, 1, 2, 3]);
}

#[test]
fn a_starving_unmerge_is_fed_by_the_exit_of_another_region() {
    let world = merged(3);
    // Enough for two regions and the pool.
    world.set_budget(PAGES * 3);
    let unmerge = world.starving_unmerge();
    // Already unmerged, while the unmerge is inside of another.
    world.shared.exit(&world.regions[0]);
    unmerge.join().unwrap().unwrap();
    world.check_contents(&[1, 2]);
    assert_eq!(world.recount.used_bytes(), bytes_of(PAGES * 2));
    world.shared.reap();
    assert_eq!(world.shared.stats().slots, 2);
}

#[test]
fn a_starving_unmerge_lets_go_of_the_very_region_that_exits() {
    let world = merged(2);
    world.set_budget(PAGES + 50);
    let unmerge = world.starving_unmerge();
    // The exit waits for the region lock that the unmerge holds while it starves.
    world.shared.exit(&world.regions[0]);
    // Its pages are free, so there is room for all of the other.
    world.shared.budget.set_bytes(Some(bytes_of(PAGES * 3)));
    unmerge.join().unwrap().unwrap();
    world.check_contents(&[1]);
}

#[test]
fn a_starving_unmerge_ends_with_the_next_order() {
    let world = merged(2);
    world.set_budget(PAGES + 100);
    let unmerge = world.starving_unmerge();
    world.shared.budget.cancel_waiters();
    let error = unmerge.join().unwrap().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::Interrupted);
    let (mapped, counted) = world.sharers();
    assert_eq!(mapped as u64, counted);
}

#[test]
fn merging_goes_on_with_an_empty_budget_and_empties_it_further() {
    let pool = FakePool::default();
    let scanner = Scanner::new(pool.clone(), 1000);
    let shared = Shared::new(scanner, Control::new(Run::Merge, Pace::default()));
    let memories = [0, 1].map(|_| FakeMemory::new(PAGES, &pool));
    for memory in &memories {
        (0..PAGES).for_each(|page| memory.write(page, u64::from(page) + 1));
        shared.register(memory.clone(), None);
    }
    let recount = Arc::new(Recount {
        memories: memories.to_vec(),
        pool,
    });
    shared.budget.set_gauge(recount.clone());
    shared.budget.set_bytes(Some(0));
    for _ in 0..40 {
        while shared.batch(u32::MAX).passes == 0 {}
    }
    assert_eq!(sync::lock(&shared.control).run, Run::Merge);
    assert_eq!(recount.used_bytes(), bytes_of(PAGES));
}
