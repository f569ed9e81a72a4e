//! The engine against a naive model: random writes, passes, unmerges and exits.

use std::collections::HashMap;
use std::ops::Range;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::backing::fake::{Call, Content, FakeMemory, FakePage, FakePool, Moment};
use crate::backoff::Intervals;
use crate::control::Pace;
use crate::merge_now::MergeNowError;
use crate::page::PoolPage;
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
    /// Everybody writes the same, but for scattered pages.
    Patch {
        content: Content,
        first: u32,
        step: usize,
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
    /// A pass in which one kind of call, or every kind, fails for one region after some calls.
    FailingPass {
        region: usize,
        kind: Option<Call>,
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
    let kind = proptest::option::of(proptest::sample::select(&Call::ALL[..]));
    prop_oneof![
        1 => Just(Step::Register),
        8 => (region, 0..PAGES, 1..PAGES, 0..6u64, 0..2u64).prop_map(
            |(region, page, pages, content, stride)| Step::Write { region, page, pages, content, stride }
        ),
        2 => (1..6u64, 0..PAGES, 2..9usize).prop_map(
            |(content, first, step)| Step::Patch { content, first, step }
        ),
        8 => Just(Step::Pass),
        2 => region.prop_map(|region| Step::MergeNow { region }),
        2 => (1..40u32).prop_map(|pages| Step::Batch { pages }),
        1 => Just(Step::Unmerge),
        1 => (region, 0..8u32).prop_map(|(region, calls)| Step::StarvedUnmerge { region, calls }),
        4 => (region, kind, 0..4u32).prop_map(
            |(region, kind, calls)| Step::FailingPass { region, kind, calls }
        ),
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
                self.write(
                    region % count,
                    page..PAGES.min(page + pages),
                    content,
                    stride,
                );
            }
            Step::Patch {
                content,
                first,
                step,
            } => self.patch(content, first, step),
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
            Step::FailingPass {
                region,
                kind,
                calls,
            } if count > 0 => {
                self.failing_pass(region % count, kind, calls);
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

    fn write(&mut self, guest: usize, pages: Range<u32>, content: Content, stride: u64) {
        let guest = &mut self.guests[guest];
        for page in pages {
            let content = if content == 0 {
                0
            } else {
                content + u64::from(page) * stride
            };
            guest.memory.write(page, content);
            guest.expected[page as usize] = content;
        }
    }

    fn patch(&mut self, content: Content, first: u32, step: usize) {
        for (own, guest) in (1000..).step_by(1000).zip(&mut self.guests) {
            for page in 0..PAGES {
                let is_own = (first..PAGES).step_by(step).any(|own| own == page);
                let content = u64::from(page) + if is_own { own } else { content };
                guest.memory.write(page, content);
                guest.expected[page as usize] = content;
            }
        }
    }

    fn failing_pass(&self, guest: usize, kind: Option<Call>, calls: u32) {
        let kinds = kind.as_ref().map_or(&Call::ALL[..], std::slice::from_ref);
        let memory = self.guests[guest].memory.clone();
        memory.fail(kinds, calls);
        self.pass();
        memory.recover();
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

    /// No place in the pool is taken.
    fn check_pool_is_free(&self) {
        let mut scanner = sync::lock(&self.shared.scanner);
        let all = scanner.stable.take_run(1000);
        assert_eq!(all, Some((PoolPage(0), 1000)));
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
        world.check_pool_is_free();
    }
}

mod bridging;
mod failing;
mod orders;
mod scenarios;
