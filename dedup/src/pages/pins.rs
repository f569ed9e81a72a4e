//! Pages that their owner has pinned, and the range that is being replaced: who waits for whom.
//!
//! A device that was given a page's frame (`O_DIRECT`, io_uring's fixed buffers, a FUSE file with
//! direct I/O) uses it until its I/O ends. Write protection does not stop it, and it does not follow
//! a new page at the same address. So the engine must not compare or replace such a page. The kernel
//! does not tell user space which pages it has pinned: the owner tells the engine.
//!
//! - A pin counts first. Then it waits until no range that overlaps it is being replaced. Then it
//!   gives each page memory of its own.
//! - The worker names a range before it protects it, and learns what is pinned in it. It leaves that
//!   as it is, and a pin that comes later waits for the release. The worker never waits for a pin.
//!
//! Rejected: naming the range after protection. A pin would meet the protection in a page fault of
//! the thread that does the I/O. And pins of shared pages that a device only reads: an unmerge would
//! have to wait for them, because its copies are other frames.

use std::io;
use std::ops::Range;

use thiserror::Error;

use crate::base::mutant::{self, Mutant};
use crate::base::page::PageRange;
use crate::base::sync::{self, Condvar, Mutex};

/// Why pages were not pinned or discarded.
#[derive(Debug, Error)]
pub enum AccessError {
    /// Pages that the region does not have.
    #[error("pages {start}..{end}: not a part of a region of {pages} pages")]
    Range {
        /// First page.
        start: u32,
        /// Page after the last.
        end: u32,
        /// Pages of the region.
        pages: u32,
    },
    /// The region is being given back.
    #[error("its memory is being given back")]
    Exiting,
    /// The kernel refused, or there is no memory.
    #[error("cannot change pages: {0}")]
    Kernel(#[from] io::Error),
}

impl AccessError {
    /// Checks pages against a region of so many.
    pub(crate) fn check(asked: &Range<u32>, pages: u32) -> Result<(), AccessError> {
        let (start, end) = (asked.start, asked.end);
        let is_part = start <= end && end <= pages;
        is_part
            .then_some(())
            .ok_or(AccessError::Range { start, end, pages })
    }
}

#[derive(Debug)]
struct State {
    pinned: Vec<PageRange>,
    /// At most one, because only the holder of the worker mutex replaces pages.
    replacing: Option<PageRange>,
    /// Ranges named so far: who waits for one does not wait for the next, which knows of its pin.
    replacements: u64,
    /// Pins that wait.
    waiting: u32,
}

/// The pins of one region.
#[derive(Debug)]
pub(crate) struct Pins {
    state: Mutex<State>,
    /// A replacement has ended.
    ended: Condvar,
}

/// A range whose pages may be replaced, but for those that were pinned before. Ends on drop.
#[derive(Debug)]
pub(crate) struct Replacing<'a> {
    pins: &'a Pins,
    pinned: Vec<PageRange>,
}

fn overlap(one: &PageRange, other: &PageRange) -> bool {
    one.start < other.end && other.start < one.end
}

impl Pins {
    pub(crate) fn new() -> Pins {
        let state = State {
            pinned: Vec::new(),
            replacing: None,
            replacements: 0,
            waiting: 0,
        };
        Pins {
            state: Mutex::new(state),
            ended: Condvar::new(),
        }
    }

    /// Pins pages, and waits for the replacement in hand if it has one of them.
    pub(crate) fn add(&self, pages: &PageRange) {
        let mut state = sync::lock(&self.state);
        state.pinned.push(pages.clone());
        let in_hand = state.replacements;
        let is_replacing = |state: &State| {
            let range = state.replacing.as_ref();
            state.replacements == in_hand && range.is_some_and(|range| overlap(range, pages))
        };
        while is_replacing(&state) && !mutant::is(Mutant::PinUnwaited) {
            state.waiting += 1;
            state = sync::wait(&self.ended, state);
            state.waiting -= 1;
        }
    }

    /// Takes back one [`Pins::add`] of the same pages.
    pub(crate) fn remove(&self, pages: &PageRange) {
        let pinned = &mut sync::lock(&self.state).pinned;
        if let Some(at) = pinned.iter().position(|range| range == pages) {
            pinned.swap_remove(at);
        }
    }

    /// Whether a page of `range` is pinned just now.
    pub(crate) fn has_any(&self, range: &PageRange) -> bool {
        let state = sync::lock(&self.state);
        state.pinned.iter().any(|pages| overlap(pages, range))
    }

    /// Names a range that is to be protected and replaced. For the holder of the worker mutex.
    pub(crate) fn begin_replacing(&self, range: &PageRange) -> Replacing<'_> {
        let mut state = sync::lock(&self.state);
        state.replacing = Some(range.clone());
        state.replacements += 1;
        let pinned = state.pinned.iter();
        let pinned = pinned.filter(|pages| overlap(pages, range)).cloned();
        Replacing {
            pins: self,
            pinned: pinned.collect(),
        }
    }
}

impl Replacing<'_> {
    /// Whether a page was pinned when the range was named.
    pub(crate) fn is_pinned(&self, page: u32) -> bool {
        !mutant::is(Mutant::PinUnlooked) && self.pinned.iter().any(|pages| pages.contains(&page))
    }

    /// Whether any page of the range was.
    pub(crate) fn any_pinned(&self) -> bool {
        !self.pinned.is_empty()
    }
}

impl Drop for Replacing<'_> {
    fn drop(&mut self) {
        let mut state = sync::lock(&self.pins.state);
        state.replacing = None;
        if state.waiting > 0 {
            self.pins.ended.notify_all();
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    #[test]
    fn only_pages_pinned_before_their_range_was_named_are_left_alone() {
        let pins = Pins::new();
        pins.add(&(4..6));
        pins.add(&(9..12));
        let replacing = pins.begin_replacing(&(0..10));
        let pinned: Vec<u32> = (0..10).filter(|&page| replacing.is_pinned(page)).collect();
        assert_eq!(pinned, [4, 5, 9]);
        drop(replacing);
        pins.remove(&(4..6));
        assert!(!pins.has_any(&(0..9)));
        assert!(pins.begin_replacing(&(0..10)).any_pinned());
    }

    #[test]
    fn pins_count_one_by_one() {
        let pins = Pins::new();
        pins.add(&(4..6));
        pins.add(&(4..6));
        pins.remove(&(4..6));
        assert!(pins.begin_replacing(&(5..6)).is_pinned(5));
        pins.remove(&(4..6));
        assert!(!pins.has_any(&(5..6)));
    }

    #[test]
    fn a_pin_waits_for_one_replacement_and_not_for_those_that_know_of_it() {
        let pins = Pins::new();
        let replacing = pins.begin_replacing(&(0..10));
        std::thread::scope(|scope| {
            let pin = scope.spawn(|| pins.add(&(3..4)));
            let deadline = Instant::now() + Duration::from_secs(120);
            while sync::lock(&pins.state).waiting == 0 {
                assert!(Instant::now() < deadline, "nobody waits");
                std::thread::yield_now();
            }
            let mut state = sync::lock(&pins.state);
            // The next range is named before the pin comes to look.
            state.replacing = Some(0..10);
            state.replacements += 1;
            pins.ended.notify_all();
            drop(state);
            pin.join().expect("nobody panics");
        });
        drop(replacing);
        assert_eq!(sync::lock(&pins.state).waiting, 0);
    }

    #[test]
    fn a_pin_elsewhere_waits_for_no_replacement() {
        let pins = Pins::new();
        let replacing = pins.begin_replacing(&(0..10));
        pins.add(&(10..11));
        drop(replacing);
    }

    #[test]
    fn a_pin_waits_until_the_replacement_in_hand_has_ended() {
        let pins = Pins::new();
        let replacing = pins.begin_replacing(&(0..10));
        std::thread::scope(|scope| {
            let pin = scope.spawn(|| pins.add(&(3..4)));
            let deadline = Instant::now() + Duration::from_secs(120);
            while !pins.has_any(&(3..4)) {
                assert!(Instant::now() < deadline, "nobody pins");
                std::thread::yield_now();
            }
            assert!(!pin.is_finished());
            assert!(!replacing.is_pinned(3), "it came later");
            drop(replacing);
        });
        assert!(pins.begin_replacing(&(0..10)).is_pinned(3));
    }
}
