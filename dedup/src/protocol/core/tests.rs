//! The engine against a naive model: random writes, passes, unmerges and exits.

use std::collections::HashMap;
use std::ops::Range;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::backing::fake::{Call, Content, FakeMemory, FakePage, FakePool, Moment};
use crate::base::pace::Pace;
use crate::base::page::HUGE_PAGE_PAGES;
use crate::merge::domain::Scanner;
use crate::pages::backoff::Intervals;
use crate::protocol::merge_now::MergeNowError;

/// Pages of each block that guests write to.
const PAGES: u32 = 24;

/// Where the pages lie that guests write to, block after block.
fn page_at(index: u32) -> u32 {
    index / PAGES * HUGE_PAGE_PAGES + index % PAGES
}

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
    /// A guest gives pages up: the first, and how many. One kind of call may fail after some calls.
    Discard(usize, (u32, u32), Option<(Call, u32)>),
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
    /// A pass, and then an unmerge perhaps, while a device uses pages. It writes to the first, or fails.
    PinnedPass {
        region: usize,
        page: u32,
        pages: u32,
        written: Option<Content>,
        unmerge: bool,
    },
}

/// Steps in a world of so many blocks a region. Pages are named by their index, for `page_at`.
fn step(blocks: u32) -> impl Strategy<Value = Step> {
    let pages = PAGES * blocks;
    let region = any::<usize>();
    let failing = proptest::sample::select(&Call::ALL[..]);
    let kind = proptest::option::of(failing.clone());
    prop_oneof![
        1 => Just(Step::Register),
        8 => (region, 0..pages, 1..pages, 0..6u64, 0..2u64).prop_map(
            |(region, page, pages, content, stride)| Step::Write { region, page, pages, content, stride }
        ),
        2 => (1..6u64, 0..pages, 2..9usize).prop_map(
            |(content, first, step)| Step::Patch { content, first, step }
        ),
        8 => Just(Step::Pass),
        2 => region.prop_map(|region| Step::MergeNow { region }),
        2 => (1..40u32).prop_map(|pages| Step::Batch { pages }),
        4 => (region, (0..pages, 1..pages), proptest::option::of((failing, 0..4u32))).prop_map(
            |(region, pages, failing)| Step::Discard(region, pages, failing)
        ),
        1 => Just(Step::Unmerge),
        1 => (region, 0..8u32).prop_map(|(region, calls)| Step::StarvedUnmerge { region, calls }),
        4 => (region, kind, 0..4u32).prop_map(
            |(region, kind, calls)| Step::FailingPass { region, kind, calls }
        ),
        4 => (region, 0..pages, 0..6u64).prop_map(
            |(region, page, content)| Step::RacingPass { region, page, content }
        ),
        4 => (region, 0..pages, 1..pages, proptest::option::of(0..6u64), any::<bool>()).prop_map(
            |(region, page, pages, written, unmerge)| Step::PinnedPass { region, page, pages, written, unmerge }
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
    blocks: u32,
}

impl World {
    /// Two regions of `PAGES` pages.
    fn new() -> World {
        World::of_blocks(1)
    }

    /// Two regions of so many blocks, of which the last one is not whole.
    fn of_blocks(blocks: u32) -> World {
        let pool = FakePool::default();
        let mut scanner = Scanner::new(pool.clone(), 1000);
        scanner.huge_page_shared_pages_min = 1;
        scanner.heal_vmas_min = 3;
        scanner.base_pages_min = 4;
        scanner.map_after = 8;
        // The model has no clock: each pass is an interval.
        scanner.intervals = Intervals::new(Duration::ZERO, Instant::now());
        let control = Control::new(Run::Merge, Pace::default());
        let mut world = World {
            shared: Shared::new(scanner, control),
            pool,
            guests: Vec::new(),
            registered: 0,
            blocks,
        };
        world.register();
        world.register();
        world
    }

    /// Pages of a region that guests write to.
    fn pages(&self) -> u32 {
        PAGES * self.blocks
    }

    /// All pages from one that guests write to on, to the last of so many.
    fn span(&self, page: u32, pages: u32) -> Range<u32> {
        let last = self.pages().min(page + pages) - 1;
        page_at(page)..page_at(last) + 1
    }

    fn register(&mut self) {
        let region_pages = page_at(self.pages() - 1) + 1;
        let memory = FakeMemory::new(region_pages, &self.pool);
        // Every other region has somebody who tells what was written to.
        let source = (self.registered % 2 == 1).then(|| memory.source());
        // Every third has a huge page, to be split before any of it is merged.
        let is_huge = self.blocks == 1 && self.registered.is_multiple_of(3);
        memory.is_huge.store(is_huge, Ordering::Relaxed);
        self.registered += 1;
        let region = self.shared.register(memory.clone(), source);
        self.guests.push(Guest {
            region,
            memory,
            expected: vec![0; region_pages as usize],
        });
    }

    /// Two regions with the same content.
    fn filled() -> World {
        let mut world = World::new();
        for region in 0..2 {
            world.apply(&Step::Write {
                region,
                page: 0,
                pages: PAGES,
                content: 3,
                stride: 1,
            });
        }
        world
    }

    fn pass(&self) {
        self.changes_of_pass();
    }

    /// One pass. Returns how many pages' states it changed.
    fn changes_of_pass(&self) -> u64 {
        let mut changes = 0;
        while self.shared.has_regions() {
            let batch = self.shared.batch(u32::MAX);
            changes += batch.changes;
            if batch.passes > 0 {
                break;
            }
        }
        changes
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
                    page..self.pages().min(page + pages),
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
            Step::Discard(region, (page, pages), failing) if count > 0 => {
                let _ = self.discard(region % count, &self.span(page, pages), failing);
            }
            Step::Unmerge => self.unmerge(),
            Step::StarvedUnmerge { region, calls } if count > 0 => {
                self.starved_unmerge(region % count, calls);
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
                self.racing_pass(region % count, page_at(page), content);
            }
            Step::PinnedPass {
                region,
                page,
                pages,
                written,
                unmerge,
            } if count > 0 => {
                let pages = self.span(page, pages);
                self.pinned_pass(region % count, &pages, written, unmerge);
            }
            Step::Exit { region } if count > 0 => {
                let guest = self.guests.swap_remove(region % count);
                self.shared.exit(&guest.region);
                self.pass();
            }
            Step::ExitStopped { region } if count > 0 => {
                self.exit_stopped(region % count);
            }
            _ => {}
        }
    }

    fn starved_unmerge(&self, guest: usize, calls: u32) {
        let memory = &self.guests[guest].memory;
        memory.calls_left.store(calls, Ordering::Relaxed);
        let starved = self.shared.unmerge_all();
        memory.calls_left.store(u32::MAX, Ordering::Relaxed);
        if starved.is_ok() {
            assert_eq!(self.pool.used_pages(), 0);
        }
    }

    fn racing_pass(&mut self, guest: usize, page: u32, content: Content) {
        let guest = &mut self.guests[guest];
        guest.memory.write_before_protection(page, content);
        guest.expected[page as usize] = content;
        let memory = guest.memory.clone();
        self.pass();
        memory.finish_racing_writes();
    }

    fn exit_stopped(&mut self, guest: usize) {
        self.set_run(Run::Stop);
        let guest = self.guests.swap_remove(guest);
        self.shared.exit(&guest.region);
        self.shared.reap();
        self.set_run(Run::Merge);
    }

    fn write(&mut self, guest: usize, pages: Range<u32>, content: Content, stride: u64) {
        let guest = &mut self.guests[guest];
        for index in pages {
            // Equal blocks at other numbers are equal page by page.
            let content = if content == 0 {
                0
            } else {
                content + u64::from(index % PAGES) * stride
            };
            let page = page_at(index);
            guest.memory.write(page, content);
            guest.expected[page as usize] = content;
        }
    }

    fn patch(&mut self, content: Content, first: u32, step: usize) {
        let pages = self.pages();
        for (own, guest) in (1000..).step_by(1000).zip(&mut self.guests) {
            for index in 0..pages {
                let is_own = index >= first && ((index - first) as usize).is_multiple_of(step);
                let content = u64::from(index % PAGES) + if is_own { own } else { content };
                let page = page_at(index);
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
            for (page, &expected) in (0..).zip(&guest.expected) {
                assert_eq!(guest.memory.content(page), expected, "page {page}");
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
        let used_pages = self.pool.used_pages() as u64;
        // A place is also kept if filling it failed, because a part of it may have been filled.
        let kept_pages = self.shared.lock_scanner().stable.kept_pages();
        let can_be_used = stats.pages_shared..=stats.pages_shared + kept_pages;
        assert!(can_be_used.contains(&used_pages), "{used_pages} {stats:?}");
        assert!(stats.slots <= self.guests.len() as u64);
    }

    /// After a few passes without writes all counters are those of a recount by content. Two are
    /// enough as a rule; a partner lost to a race or a failure costs another, as does each block that
    /// is built anew. Somebody waits for them, so no page is put off.
    fn check_settled(&self) {
        sync::lock(&self.shared.control).waiters += 1;
        let mut quiet_passes = 0;
        for _ in 0..40 {
            let is_quiet = self.changes_of_pass() == 0;
            quiet_passes = if is_quiet { quiet_passes + 1 } else { 0 };
            if quiet_passes == 4 {
                break;
            }
        }
        sync::lock(&self.shared.control).waiters -= 1;
        self.check_recount();
    }

    /// The same with nobody waiting: pages that were busy get their turn later, but they do.
    fn check_settled_in_time(&self) {
        let mut calm_passes = 0;
        for _ in 0..1200 {
            let is_quiet = self.changes_of_pass() == 0;
            let is_calm = self.shared.stats().pages_volatile == 0 && !self.is_to_map();
            calm_passes = if is_calm { calm_passes + 1 } else { 0 };
            if calm_passes >= 40 || (calm_passes >= 8 && is_quiet) {
                break;
            }
        }
        self.check_recount();
    }

    /// Whether a page waits to be mapped elsewhere.
    fn is_to_map(&self) -> bool {
        let scanner = self.shared.lock_scanner();
        let mut watches = scanner.attached.values().flat_map(|it| &it.watch);
        watches.any(|watch| watch.to_map.next_from(0).is_some())
    }

    /// Single pages of zeros may be left over places.
    fn check_settled_but_for_zeros(&self) {
        for _ in 0..8 {
            self.pass();
        }
        self.check();
        assert_eq!(self.shared.stats().pages_volatile, 0);
    }

    /// No block of places is left.
    fn check_pool_is_free(&self) {
        let scanner = sync::lock(&self.shared.scanner);
        for number in 0..self.blocks {
            assert_eq!(scanner.stable.layouts.blocks_of(number), []);
        }
    }

    /// What has an equal anywhere is merged, unless it is left out for want of VMAs.
    fn check_recount(&self) {
        let mut copies: HashMap<Content, u64> = HashMap::new();
        for guest in &self.guests {
            for &content in &guest.expected {
                *copies.entry(content).or_default() += 1;
            }
        }
        let mut written = 0;
        for (region, guest) in self.guests.iter().enumerate() {
            for (page, content) in (0..).zip(&guest.expected) {
                let behind = guest.memory.page(page);
                written += u64::from(!matches!(behind, FakePage::Absent | FakePage::Zeros));
                let is_private = matches!(behind, FakePage::Private(_));
                // Zeros over places are given back once they are enough.
                assert!(
                    !is_private || *content == 0 || copies[content] == 1,
                    "page {page} of region {region} with {content} is not merged: {}",
                    self.known()
                );
            }
        }
        let stats = self.shared.stats();
        assert_eq!(stats.pages_volatile, 0, "{stats:?}");
        assert_eq!(stats.pages_over_vma_budget, 0, "{stats:?}");
        assert_eq!(
            stats.pages_shared + stats.pages_sharing + stats.pages_unshared,
            written,
            "{}",
            self.known()
        );
    }

    /// What the engine knows of each page, and what lies behind it.
    fn known(&self) -> String {
        use std::fmt::Write as _;
        let mut scanner = self.shared.lock_scanner();
        let mut text = String::new();
        for guest in &self.guests {
            let id = guest.region.id();
            for page in (0..self.pages()).map(page_at) {
                let is_pending = scanner.pending(id).map(|pending| pending.contains(page));
                let items = scanner.items(id);
                let (state, under) = (items.state(page), items.pool_page_under(page));
                let behind = guest.memory.page(page);
                let _ = write!(
                    text,
                    "\n{id:?} {page} {behind:?} {state:?} {under:?} {is_pending:?}"
                );
            }
        }
        text
    }
}

/// Histories to try, where the environment (`PROPTEST_CASES`) does not say.
const CASES: u32 = 4000;

fn cases() -> u32 {
    let given = std::env::var("PROPTEST_CASES").ok();
    given.and_then(|text| text.parse().ok()).unwrap_or(CASES)
}

/// Plays a history, lets the world settle, and has everybody leave.
fn play(mut world: World, steps: &[Step], hurried: bool) {
    for step in steps {
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
    assert_eq!(world.shared.stats().slots, 0);
    assert_eq!(world.pool.used_pages(), 0);
    world.check_pool_is_free();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases()))]
    #[test]
    fn every_guest_reads_what_it_wrote_and_every_counter_can_be_recounted(
        steps in proptest::collection::vec(step(1), 1..60),
        hurried: bool,
    ) {
        play(World::new(), &steps, hurried);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases().div_ceil(10)))]
    #[test]
    fn regions_of_several_blocks_read_what_they_wrote(
        steps in proptest::collection::vec(step(2), 1..60),
    ) {
        play(World::of_blocks(2), &steps, true);
    }
}

mod basing;
mod discarding;
mod elsewhere;
mod failing;
mod mappings;
mod orders;
mod pinning;
mod scenarios;
mod unmerging;
