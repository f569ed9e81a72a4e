//! The engine against a naive model: random writes, passes, unmerges and exits.

use std::collections::HashMap;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::backing::fake::{Content, FakeMemory, FakePage, FakePool};
use crate::backoff::Intervals;
use crate::control::Pace;
use crate::merge_now::MergeNowError;

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
    MergeNow {
        region: usize,
    },
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
        2 => region.prop_map(|region| Step::MergeNow { region }),
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
    shared: Shared<FakeMemory>,
    pool: FakePool,
    guests: Vec<Guest>,
    registered: u32,
}

impl World {
    fn new() -> World {
        let pool = FakePool::default();
        let mut scanner = Scanner::new(pool.clone(), 1000);
        // The model has no clock: each pass is an interval.
        scanner.intervals = Intervals::new(Duration::ZERO, Instant::now());
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
            Step::MergeNow { region } if count > 0 => self.merge_now(region % count),
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

    fn merge_now(&self, guest: usize) {
        let merged = self.shared.merge_now(&self.guests[guest].region);
        merged.expect("it is there and the engine merges");
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
    /// enough as a rule; a partner lost to a race or a failure costs another. Somebody waits for
    /// them, so no page is put off.
    fn check_settled(&self) {
        sync::lock(&self.shared.control).waiters += 1;
        for _ in 0..8 {
            self.pass();
        }
        sync::lock(&self.shared.control).waiters -= 1;
        self.check_recount();
    }

    /// The same with nobody waiting: pages that were busy get their turn later, but they do.
    fn check_settled_in_time(&self) {
        let mut calm_passes = 0;
        for _ in 0..1200 {
            self.pass();
            let is_calm = self.shared.stats().pages_volatile == 0;
            calm_passes = if is_calm { calm_passes + 1 } else { 0 };
            if calm_passes == 8 {
                break;
            }
        }
        self.check_recount();
    }

    fn check_recount(&self) {
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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]
    #[test]
    fn every_guest_reads_what_it_wrote_and_every_counter_can_be_recounted(
        steps in proptest::collection::vec(step(), 1..60),
        hurried: bool,
    ) {
        let mut world = World::new();
        for step in &steps {
            world.apply(step);
            world.check();
        }
        if hurried {
            world.check_settled();
        } else {
            world.check_settled_in_time();
        }
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
    for dying in [0, 1] {
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
        world
            .pool
            .free_after_write(world.guests[dying].memory.clone());
        world.pass();
        let survivor = &world.guests[1 - dying];
        for page in 0..PAGES {
            assert_eq!(
                survivor.memory.content(page),
                survivor.expected[page as usize]
            );
        }
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

/// Passes until a page that was written to in region 0 is merged again.
fn passes_until_merged(world: &World) -> u32 {
    (1..100)
        .find(|_| {
            world.pass();
            world.shared.stats().pages_sharing == u64::from(PAGES)
        })
        .expect("it is merged again")
}

#[test]
fn a_page_that_breaks_again_and_again_is_merged_less_and_less_often_until_it_calms() {
    // The first region is not watched, the second is.
    for busy in [0, 1] {
        let mut world = World::new();
        let write = |region, page, pages| Step::Write {
            region,
            page,
            pages,
            content: 3,
            stride: 1,
        };
        world.apply(&write(0, 0, PAGES));
        world.apply(&write(1, 0, PAGES));
        world.check_settled();
        let mut waits = Vec::new();
        for _ in 0..4 {
            world.apply(&write(busy, 7, 1));
            waits.push(passes_until_merged(&world));
        }
        assert!(waits.is_sorted() && waits[3] >= 16, "{busy}: {waits:?}");
        assert!(world.shared.stats().pages_skipped > 0);
        for _ in 0..600 {
            world.pass();
        }
        world.apply(&write(busy, 7, 1));
        assert!(passes_until_merged(&world) <= waits[0]);
        // Who waits for full scans does not wait for busy pages.
        for _ in 0..4 {
            world.apply(&write(busy, 7, 1));
            world.check_settled();
        }
    }
}

#[test]
fn a_page_that_changes_in_every_pass_is_left_out_of_most() {
    let mut world = World::new();
    for content in 1..80 {
        world.apply(&Step::Write {
            region: 0,
            page: 3,
            pages: 1,
            content,
            stride: 0,
        });
        world.pass();
    }
    let skipped = world.shared.stats().pages_skipped;
    assert!(skipped > 60, "{skipped} of 79 visits");
}

#[test]
fn a_region_is_merged_now_while_the_worker_rests() {
    // The first region is not watched, the second is.
    for late in [0, 1] {
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
        let merge_now = |region: usize| world.shared.merge_now(&world.guests[region].region);
        let first = merge_now(1 - late).expect("the engine merges");
        assert_eq!((first.pages_merging, first.pages_gained), (0, 0));
        let second = merge_now(late).expect("the engine merges");
        assert_eq!(second.pages_merging, u64::from(PAGES));
        assert_eq!(second.pages_gained, i64::from(PAGES));
        assert_eq!(second.pages_volatile, 0);
        world.check();
        world.set_run(Run::Stop);
        let stopped = world.shared.merge_now(&world.guests[late].region);
        assert_eq!(stopped, Err(MergeNowError::NotMerging));
    }
}

#[test]
fn a_region_that_exits_after_a_merge_now_leaves_nothing() {
    let mut world = World::new();
    world.apply(&Step::Write {
        region: 0,
        page: 0,
        pages: PAGES,
        content: 3,
        stride: 0,
    });
    let region = Arc::clone(&world.guests[0].region);
    world.shared.merge_now(&region).expect("the engine merges");
    assert!(world.pool.used_pages() > 0);
    assert_eq!(world.shared.exit(&region), ExitPath::HandedOver);
    let late = world.shared.merge_now(&region);
    assert_eq!(late, Err(MergeNowError::Exiting));
    world.shared.reap();
    assert_eq!(world.shared.stats().slots, 1);
    assert_eq!(world.pool.used_pages(), 0);
}
