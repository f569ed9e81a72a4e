//! The engine against a naive model: random writes, passes, unmerges and exits.

use std::collections::HashMap;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::backing::Backing;
use crate::backing::fake::{Content, FakeMemory, FakePage, FakePool, Moment};
use crate::control::Pace;
use crate::scanner::Scanner;

const PAGES: u32 = 24;

#[derive(Clone, Debug)]
enum Step {
    Register,
    Write {
        region: usize,
        page: u32,
        pages: u32,
        content: Content,
        stride: u64,
    },
    Pass,
    Batch {
        pages: u32,
    },
    Unmerge,
    /// An unmerge that runs out of memory after some pages.
    StarvedUnmerge {
        region: usize,
        calls: u32,
    },
    /// A pass in which one region's mappings fail after some calls.
    FailingPass {
        region: usize,
        calls: u32,
    },
    Exit {
        region: usize,
    },
    ExitStopped {
        region: usize,
    },
    /// A pass in which guests write between the visit and the protection of pages.
    RacingPass {
        region: usize,
        page: u32,
        content: Content,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let region = any::<usize>();
    prop_oneof![
        1 => Just(Step::Register),
        8 => (region, 0..PAGES, 1..PAGES, 0..6u64, 0..2u64).prop_map(
            |(region, page, pages, content, stride)| Step::Write { region, page, pages, content, stride }
        ),
        8 => Just(Step::Pass),
        2 => (1..40u32).prop_map(|pages| Step::Batch { pages }),
        1 => Just(Step::Unmerge),
        1 => (region, 0..8u32).prop_map(|(region, calls)| Step::StarvedUnmerge { region, calls }),
        1 => (region, 0..4u32).prop_map(|(region, calls)| Step::FailingPass { region, calls }),
        4 => (region, 0..PAGES, 0..6u64).prop_map(
            |(region, page, content)| Step::RacingPass { region, page, content }
        ),
        1 => region.prop_map(|region| Step::Exit { region }),
        1 => region.prop_map(|region| Step::ExitStopped { region }),
    ]
}

struct Guest {
    region: Arc<Region<FakeMemory>>,
    memory: FakeMemory,
    expected: Vec<Content>,
}

struct World {
    shared: Shared<Scanner<FakeMemory>>,
    pool: FakePool,
    guests: Vec<Guest>,
    registered: u32,
}

impl World {
    fn new() -> World {
        let pool = FakePool::default();
        let mut scanner = Scanner::new(pool.clone(), 1000);
        scanner.huge_page_shared_pages_min = 1;
        scanner.heal_vmas_min = 3;
        let control = Control::new(Run::Merge, Pace::default());
        let mut world = World {
            shared: Shared::new(scanner, control),
            pool,
            guests: Vec::new(),
            registered: 0,
        };
        world.register();
        world.register();
        world
    }

    fn register(&mut self) {
        let memory = FakeMemory::new(PAGES, &self.pool);
        // Every other region has somebody who tells what was written to.
        let source = (self.registered % 2 == 1).then(|| memory.source());
        // Every third has a huge page, to be split before any of it is merged.
        let is_huge = self.registered.is_multiple_of(3);
        memory.is_huge.store(is_huge, Ordering::Relaxed);
        self.registered += 1;
        let region = self.shared.register(memory.clone(), source);
        self.guests.push(Guest {
            region,
            memory,
            expected: vec![0; PAGES as usize],
        });
    }

    fn pass(&self) {
        while self.shared.has_regions() && self.shared.batch(u32::MAX).passes == 0 {}
    }

    fn set_run(&self, run: Run) {
        sync::lock(&self.shared.control).run = run;
    }

    fn apply(&mut self, step: &Step) {
        let count = self.guests.len();
        match *step {
            Step::Register => self.register(),
            Step::Write {
                region,
                page,
                pages,
                content,
                stride,
            } if count > 0 => {
                let guest = &mut self.guests[region % count];
                for page in page..PAGES.min(page + pages) {
                    let content = if content == 0 {
                        0
                    } else {
                        content + u64::from(page) * stride
                    };
                    guest.memory.write(page, content);
                    guest.expected[page as usize] = content;
                }
            }
            Step::Pass => self.pass(),
            Step::Batch { pages } => {
                self.shared.batch(pages);
            }
            Step::Unmerge => self.unmerge(),
            Step::StarvedUnmerge { region, calls } if count > 0 => {
                let memory = self.guests[region % count].memory.clone();
                memory.calls_left.store(calls, Ordering::Relaxed);
                let starved = self.shared.unmerge_all();
                memory.calls_left.store(u32::MAX, Ordering::Relaxed);
                if starved.is_ok() {
                    assert_eq!(self.pool.used_pages(), 0);
                }
            }
            Step::FailingPass { region, calls } if count > 0 => {
                let memory = self.guests[region % count].memory.clone();
                memory.calls_left.store(calls, Ordering::Relaxed);
                self.pass();
                memory.calls_left.store(u32::MAX, Ordering::Relaxed);
            }
            Step::RacingPass {
                region,
                page,
                content,
            } if count > 0 => {
                let guest = &mut self.guests[region % count];
                guest.memory.write_before_protection(page, content);
                guest.expected[page as usize] = content;
                let memory = guest.memory.clone();
                self.pass();
                memory.finish_racing_writes();
            }
            Step::Exit { region } if count > 0 => {
                let guest = self.guests.swap_remove(region % count);
                self.shared.exit(&guest.region);
                self.pass();
            }
            Step::ExitStopped { region } if count > 0 => {
                self.set_run(Run::Stop);
                let guest = self.guests.swap_remove(region % count);
                self.shared.exit(&guest.region);
                self.shared.reap();
                self.set_run(Run::Merge);
            }
            _ => {}
        }
    }

    fn unmerge(&self) {
        self.shared.unmerge_all().expect("the model has memory");
        assert_eq!(
            self.pool.used_pages(),
            0,
            "the pool is empty after an unmerge"
        );
        let stats = self.shared.stats();
        assert_eq!(
            (stats.pages_shared, stats.pages_sharing, stats.pages_zero),
            (0, 0, 0)
        );
    }

    fn check(&self) {
        let mut sharers: HashMap<u32, u64> = HashMap::new();
        for guest in &self.guests {
            for page in 0..PAGES {
                assert_eq!(guest.memory.content(page), guest.expected[page as usize]);
                if let FakePage::Shared(pool_page) = guest.memory.page(page) {
                    *sharers.entry(pool_page.0).or_default() += 1;
                }
            }
            assert!(guest.memory.is_unprotected(), "a vCPU would sleep for ever");
        }
        let stats = self.shared.stats();
        // What guests broke since their last visit is still counted; nothing else may differ.
        assert!(sharers.len() as u64 <= stats.pages_shared);
        assert!(sharers.values().sum::<u64>() <= stats.pages_shared + stats.pages_sharing);
        assert_eq!(
            self.pool.used_pages() as u64,
            stats.pages_shared,
            "{stats:?}"
        );
        assert!(stats.slots <= self.guests.len() as u64);
    }

    /// After a few passes without writes all counters are those of a recount by content. Two are
    /// enough as a rule; a partner lost to a race or a failure costs another.
    fn check_settled(&self) {
        for _ in 0..8 {
            self.pass();
        }
        let mut copies: HashMap<Content, u64> = HashMap::new();
        let mut written = 0;
        for guest in &self.guests {
            for page in 0..PAGES {
                match guest.memory.page(page) {
                    FakePage::Absent => {}
                    _ => written += 1,
                }
                *copies.entry(guest.expected[page as usize]).or_default() += 1;
            }
        }
        copies.remove(&0);
        let duplicates: u64 = copies.values().map(|count| count - 1).sum();
        let stats = self.shared.stats();
        assert_eq!(stats.pages_sharing, duplicates, "{stats:?}");
        assert_eq!(stats.pages_volatile, 0, "{stats:?}");
        assert_eq!(
            stats.pages_shared + stats.pages_sharing + stats.pages_unshared,
            written
        );
    }
}

/// Histories to try, where the environment (`PROPTEST_CASES`) does not say.
const CASES: u32 = 4000;

fn cases() -> u32 {
    let given = std::env::var("PROPTEST_CASES").ok();
    given.and_then(|text| text.parse().ok()).unwrap_or(CASES)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases()))]
    #[test]
    fn every_guest_reads_what_it_wrote_and_every_counter_can_be_recounted(
        steps in proptest::collection::vec(step(), 1..60)
    ) {
        let mut world = World::new();
        for step in &steps {
            world.apply(step);
            world.check();
        }
        world.check_settled();
        world.unmerge();
        for guest in world.guests.drain(..) {
            world.shared.exit(&guest.region);
        }
        world.shared.reap();
        prop_assert_eq!(world.shared.stats().slots, 0);
        prop_assert_eq!(world.pool.used_pages(), 0);
    }
}

#[test]
fn an_exit_while_the_cursor_rests_on_the_region_leaves_it_to_the_worker() {
    let mut world = World::new();
    world.apply(&Step::Write {
        region: 0,
        page: 0,
        pages: PAGES,
        content: 3,
        stride: 1,
    });
    world.pass();
    assert_eq!(
        world.shared.exit(&world.guests[0].region),
        ExitPath::HandedOver
    );
    assert_eq!(world.shared.stats().slots, 2);
    world.shared.batch(1);
    assert_eq!(
        world.shared.stats().slots,
        1,
        "the handed-over slot is finished first"
    );
}

#[test]
fn a_second_exit_of_a_region_does_nothing() {
    let world = World::new();
    assert_eq!(world.shared.exit(&world.guests[0].region), ExitPath::Fast);
    assert_eq!(
        world.shared.exit(&world.guests[0].region),
        ExitPath::HandedOver
    );
    assert_eq!(world.shared.stats().slots, 1);
}

#[test]
fn a_region_that_frees_its_pages_in_the_middle_of_a_merge_gives_nobody_its_zeros() {
    for (dying, moment) in [0, 1]
        .into_iter()
        .flat_map(|dying| [(dying, Moment::Fill), (dying, Moment::Compare)])
    {
        let mut world = World::new();
        for region in [0, 1] {
            world.apply(&Step::Write {
                region,
                page: 0,
                pages: PAGES,
                content: 3,
                stride: 1,
            });
        }
        // Calm from the next pass on, in which the pages of both are merged.
        world.pass();
        let (region, memory) = (
            Arc::clone(&world.guests[dying].region),
            world.guests[dying].memory.clone(),
        );
        if dying == 1 {
            // Equal to what the dying founder's page shows once it is freed.
            world.guests[0].memory.write_before_protection(5, 0);
            world.guests[0].expected[5] = 0;
        }
        // The first two steps of an exit; the third would wait for the merge.
        world.pool.interrupt(moment, move || {
            region.set_exiting();
            memory.free_all();
        });
        world.pass();
        let survivor = &world.guests[1 - dying];
        survivor.memory.finish_racing_writes();
        for page in 0..PAGES {
            assert_eq!(
                survivor.memory.content(page),
                survivor.expected[page as usize]
            );
        }
        assert!(survivor.memory.is_unprotected());
    }
}

#[test]
fn a_page_that_was_somebodys_partner_in_its_own_visit_is_counted_once() {
    let mut world = World::new();
    world.register();
    let write = |region, page, content| {
        let (pages, stride) = (1, 0);
        Step::Write {
            region,
            page,
            pages,
            content,
            stride,
        }
    };
    let [first, second, last] = [0, 1, 2];
    world.apply(&write(first, 5, 3));
    world.apply(&write(second, 0, 3));
    world.apply(&write(second, 1, 3));
    world.pass();
    // The second region's pages find the first's, which has changed: they stay in the index.
    world.shared.batch(1);
    world.apply(&write(first, 5, 99));
    world.shared.batch(1);
    // The last one leaves when it is next. The pass goes on at the first region, and the second
    // region's pages meet their own entries.
    world.apply(&Step::ExitStopped { region: last });
    world.check_settled();
}

#[test]
fn a_merge_that_fails_half_way_leaves_no_page_in_the_pool() {
    let mut world = World::new();
    for region in [0, 1] {
        world.apply(&Step::Write {
            region,
            page: 0,
            pages: 5,
            content: 3,
            stride: 1,
        });
    }
    world.pass();
    // Page 2 changes under the merge, which falls into two parts; mapping the first one fails.
    world.guests[1].memory.write_before_protection(2, 77);
    world.guests[1].expected[2] = 77;
    world.guests[0]
        .memory
        .calls_left
        .store(0, Ordering::Relaxed);
    world.pass();
    world.check();
    world.guests[0]
        .memory
        .calls_left
        .store(u32::MAX, Ordering::Relaxed);
    world.check_settled();
}

#[test]
fn two_pages_that_change_alike_under_a_merge_do_not_found_a_page_under_their_old_name() {
    let mut world = World::new();
    for region in [0, 1] {
        world.apply(&Step::Write {
            region,
            page: 0,
            pages: 3,
            content: 3,
            stride: 1,
        });
    }
    world.pass();
    for guest in [0, 1] {
        world.guests[guest].memory.write_before_protection(1, 3);
        world.guests[guest].expected[1] = 3;
    }
    world.pass();
    world.check_settled();
}

#[test]
fn a_shared_page_that_the_kernel_is_moving_keeps_its_stable_page() {
    let mut world = World::new();
    for region in [0, 1] {
        world.apply(&Step::Write {
            region,
            page: 0,
            pages: PAGES,
            content: 3,
            stride: 1,
        });
    }
    world.check_settled();
    for guest in &world.guests {
        guest.memory.moving.store(true, Ordering::Relaxed);
    }
    world.pass();
    for guest in &world.guests {
        guest.memory.moving.store(false, Ordering::Relaxed);
    }
    world.check();
    world.check_settled();
}

/// Two regions with the same content, merged.
fn merged_world() -> World {
    let mut world = World::new();
    for region in [0, 1] {
        world.apply(&Step::Write {
            region,
            page: 0,
            pages: PAGES,
            content: 3,
            stride: 1,
        });
    }
    world.check_settled();
    assert_ne!(world.pool.used_pages(), 0);
    world
}

#[test]
fn a_second_unmerge_returns_when_nothing_is_merged_even_if_the_first_is_under_way() {
    let world = merged_world();
    let (pool, shared) = (world.pool.clone(), Arc::new(world.shared));
    let (second, merged_pages) = std::sync::mpsc::channel();
    world.pool.interrupt(Moment::Unshare, {
        let (pool, shared) = (pool.clone(), Arc::clone(&shared));
        move || {
            let returned = Arc::new(std::sync::Barrier::new(2));
            std::thread::spawn({
                let returned = Arc::clone(&returned);
                move || {
                    returned.wait();
                    shared.set_run(Run::Unmerge).expect("the model has memory");
                    second.send(pool.used_pages()).expect("somebody listens");
                }
            });
            returned.wait();
            // Were it to return too early, it would do so about now.
            poll_until(Duration::from_millis(100), || false);
        }
    });
    shared.set_run(Run::Unmerge).expect("the model has memory");
    let merged_pages = merged_pages.recv_timeout(Duration::from_secs(10));
    assert_eq!(merged_pages, Ok(0));
}

#[test]
fn an_unmerge_that_fails_does_not_undo_a_newer_order() {
    let world = merged_world();
    let memory = world.guests[0].memory.clone();
    let shared = Arc::new(world.shared);
    world.pool.interrupt(Moment::Unshare, {
        let shared = Arc::clone(&shared);
        move || {
            shared.set_run(Run::Merge).expect("it only says so");
            memory.calls_left.store(0, Ordering::Relaxed);
        }
    });
    shared
        .set_run(Run::Unmerge)
        .expect_err("there is no memory left");
    assert_eq!(sync::lock(&shared.control).run, Run::Merge);
}

#[test]
fn an_unmerge_that_fails_leaves_the_engine_stopped_and_its_pages_accounted_for() {
    let world = merged_world();
    world.guests[0]
        .memory
        .calls_left
        .store(2, Ordering::Relaxed);
    world
        .shared
        .set_run(Run::Unmerge)
        .expect_err("memory for two pages only");
    assert_eq!(sync::lock(&world.shared.control).run, Run::Stop);
    world.check();
    world.guests[0]
        .memory
        .calls_left
        .store(u32::MAX, Ordering::Relaxed);
    world.set_run(Run::Merge);
    world.check_settled();
}

fn poll_until(limit: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    while Instant::now() < deadline {
        if condition() {
            return true;
        }
        std::thread::yield_now();
    }
    false
}
