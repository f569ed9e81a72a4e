//! Exponential back-off: a page that proves busy is tried exponentially less often.
//!
//! KSM's smart scan, with two differences. What counts against a page is a verdict that proved
//! wrong: it was merged, and written to soon after, or was found alone and has changed. And the age
//! goes down again, where KSM's only ever grows. Time is counted in *intervals*: of a watched
//! region [`INTERVAL`] long, of any other one pass.
//!
//! What is soon? A merge costs its guest two faults and the worker some system calls, some 30 us in
//! all. A guest of 64 MiB that rewrites its memory every second would lose half a core to merges
//! that last no second; so a merge should last [`WORTH`].

use std::time::{Duration, Instant};

/// How long an interval of a watched region is at least. Two of them are what a page pays for its
/// first broken merge, so it should be longer than the period of what is called hot.
pub(crate) const INTERVAL: Duration = Duration::from_millis(50);

/// Intervals that a merge in a watched region must last: 10 s.
pub(crate) const WORTH: u16 = 200;

/// Intervals that a page of a watched region must have been calm for before it gets a mapping of its
/// own: 10 s. Guests that boot together come to hold the same at the same places in that time.
pub(crate) const MAP_AFTER: u16 = WORTH;

/// Highest age: 512 intervals, 26 s, until the next try. Four times that is still told apart from
/// a wrapped stamp.
const AGE_MAX: u8 = 9;

/// Highest age of a page that merely changed between two visits, with nothing broken by it: KSM's
/// 8 scans. Each scan of a region without a dirty source costs the worker a read and a hash.
const AGE_CHANGING_MAX: u8 = 3;

/// The same in a watched region, where the guest pays too, for its first write after each look at
/// the dirty log: 64 intervals, 3 s. With 13 s, guests that had just booted held more pages unshared.
const AGE_BUSY_MAX: u8 = 6;

/// Most intervals between two looks at the dirty pages of a region: 800 ms.
const LOOK_WAIT_MAX: u32 = 16;

const STAMP_BITS: u32 = 12;
const STAMP_MASK: u16 = (1 << STAMP_BITS) - 1;

/// Number of an interval. Its low 12 bits are what a page remembers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Interval(pub(crate) u32);

impl Interval {
    fn stamp(self) -> u16 {
        u16::try_from(self.0 & u32::from(STAMP_MASK)).unwrap_or(0)
    }

    pub(crate) fn plus(self, intervals: u16) -> Interval {
        Interval(self.0.wrapping_add(u32::from(intervals)))
    }
}

/// What a page has to wait for, in 16 bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Backoff {
    /// 0: never proved busy.
    age: u8,
    /// When its state was last learnt: written to, or taken for calm.
    stamp: u16,
}

impl Backoff {
    pub(crate) fn from_bits(bits: u16) -> Backoff {
        Backoff {
            age: u8::try_from(bits >> STAMP_BITS).unwrap_or(AGE_MAX),
            stamp: bits & STAMP_MASK,
        }
    }

    pub(crate) fn bits(self) -> u16 {
        u16::from(self.age) << STAMP_BITS | self.stamp
    }

    /// Intervals that the page must be left alone for before it is tried; 0 for one that never
    /// proved busy, which is tried at the first pass that finds it calm.
    pub(crate) fn wait(self) -> u16 {
        if self.age == 0 { 0 } else { 1 << self.age }
    }

    /// Intervals since the stamp; a page not looked at for 4096 of them seems younger, which
    /// costs it one wait.
    pub(crate) fn elapsed(self, now: Interval) -> u16 {
        now.stamp().wrapping_sub(self.stamp) & STAMP_MASK
    }

    pub(crate) fn is_due(self, now: Interval) -> bool {
        self.elapsed(now) >= self.wait()
    }

    /// Whether nobody need hear of writes to the page, because they would end no rest worth having:
    /// it is in the first half of its wait.
    pub(crate) fn is_ignored(self, now: Interval) -> bool {
        self.elapsed(now) < self.wait() / 2
    }

    /// The page was taken for calm.
    pub(crate) fn calmed(self, now: Interval) -> Backoff {
        let stamp = now.stamp();
        Backoff { stamp, ..self }
    }

    /// The page was written to before it was ever taken for calm again.
    pub(crate) fn stirred(self, now: Interval) -> Backoff {
        self.calmed(now)
    }

    /// In a watched region: the page was written to at two looks in a row, or has changed from one
    /// visit to the next. The next wait is twice as long, and as long as what lay between the two,
    /// which on a loaded host may be a second; but no page waits for longer than it was busy, so
    /// looks in one interval count once.
    pub(crate) fn busy(self, now: Interval) -> Backoff {
        let between = self.elapsed(now).min(1 << AGE_BUSY_MAX);
        match between.checked_ilog2() {
            Some(bits) => {
                let least = u8::try_from(bits).unwrap_or(AGE_BUSY_MAX);
                self.older(AGE_BUSY_MAX, now).at_least(least)
            }
            None => self,
        }
    }

    fn at_least(self, age: u8) -> Backoff {
        let age = self.age.max(age);
        Backoff { age, ..self }
    }

    fn older(self, age_max: u8, now: Interval) -> Backoff {
        let age = self.age.max((self.age + 1).min(age_max));
        let stamp = now.stamp();
        Backoff { age, stamp }
    }

    /// The page was taken for calm, at the stamp, and written to. Calm for less than four times
    /// what it had to wait for, or for less than `worth`, it was not worth it: the next wait is
    /// twice as long, and longer than what the page was just seen to rest. Calm for longer, it is
    /// another page now: it starts afresh, yet not at once, because writes come in bursts.
    pub(crate) fn broken(self, now: Interval, worth: u16) -> Backoff {
        let (calm, wait) = (self.elapsed(now), self.wait());
        let age = if calm < worth {
            let rest_bits = u16::BITS - (calm + wait).leading_zeros();
            (self.age + 1).max(u8::try_from(rest_bits).unwrap_or(AGE_MAX))
        } else if calm < wait.saturating_mul(4).max(4) {
            self.age + 1
        } else {
            1
        };
        Backoff {
            age: age.min(AGE_MAX),
            stamp: now.stamp(),
        }
    }

    /// The page was taken for calm and found to be alone, and may have been written to: a dirty
    /// log also names pages that were only read. Whether it [`changed`](Backoff::changed), its
    /// next visit will tell.
    pub(crate) fn disturbed(self, now: Interval, worth: u16) -> Backoff {
        let is_calm = self.elapsed(now) >= worth.max(self.wait().saturating_mul(4)).max(4);
        Backoff {
            age: if is_calm { self.age.min(1) } else { self.age },
            stamp: now.stamp(),
        }
    }

    /// Two visits in a row found different contents.
    pub(crate) fn changed(self, now: Interval) -> Backoff {
        self.older(AGE_CHANGING_MAX, now)
    }
}

/// When the dirty pages of a watched region are asked for: once an interval, and exponentially less
/// often while that leads to nothing. A look takes the worker some 50 us, and then the guest 3 us for
/// its next write to each page that it writes to all the time.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Looks {
    last: Option<Interval>,
    /// Intervals from the last look to the next.
    wait: u32,
    /// Whether the pass in hand has looked, and visits the region.
    pub(crate) is_due: bool,
}

impl Looks {
    /// A pass comes to the region: decides whether it looks.
    pub(crate) fn begin(&mut self, intervals: &Intervals, hurried: bool) {
        let now = intervals.current;
        let elapsed = self.last.map(|last| now.0.wrapping_sub(last.0));
        self.is_due = hurried || elapsed.is_none_or(|elapsed| elapsed >= self.wait);
        if self.is_due {
            self.last = Some(now);
            // Where each pass is an interval, somebody counts passes.
            let wait_max = if intervals.length.is_zero() {
                1
            } else {
                LOOK_WAIT_MAX
            };
            self.wait = (self.wait * 2).clamp(1, wait_max);
        }
    }

    /// A page has changed its state, or is to be tried: the next interval looks.
    pub(crate) fn hasten(&mut self) {
        self.wait = 1;
    }
}

/// Counts the intervals of watched regions.
#[derive(Debug)]
pub(crate) struct Intervals {
    length: Duration,
    current: Interval,
    begun: Instant,
}

impl Intervals {
    /// `length` zero makes each pass an interval, for tests.
    pub(crate) fn new(length: Duration, now: Instant) -> Intervals {
        Intervals {
            length,
            current: Interval(0),
            begun: now,
        }
    }

    pub(crate) fn current(&self) -> Interval {
        self.current
    }

    /// A pass has ended at `now`.
    pub(crate) fn end_pass(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.begun);
        if self.length.is_zero() {
            self.current = self.current.plus(1);
            return;
        }
        let whole = elapsed.as_nanos() / self.length.as_nanos();
        if whole > 0 {
            self.current = Interval(
                self.current
                    .0
                    .wrapping_add(u32::try_from(whole).unwrap_or(u32::MAX)),
            );
            self.begun = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn looks_become_rarer_while_they_lead_to_nothing() {
        let mut intervals = Intervals::new(INTERVAL, Instant::now());
        let mut looks = Looks::default();
        let mut looked_at = Vec::new();
        for interval in 0..60 {
            intervals.current = Interval(interval);
            // Two passes in each interval.
            for _ in 0..2 {
                looks.begin(&intervals, false);
                looked_at.extend(looks.is_due.then_some(interval));
            }
            if interval == 50 || interval == 51 {
                looks.hasten();
            }
        }
        assert_eq!(looked_at, [0, 1, 3, 7, 15, 31, 47, 51, 52, 54, 58]);
        looks.begin(&intervals, true);
        assert!(looks.is_due, "somebody waits");
    }

    /// Merges that a page written to every `period` intervals goes through in `intervals`.
    fn merges(period: u32, intervals: u32, worth: u16) -> u32 {
        let (mut backoff, mut merged, mut count) = (Backoff::default(), false, 0);
        for now in (0..intervals).map(Interval) {
            if now.0.is_multiple_of(period) {
                backoff = if merged {
                    backoff.broken(now, worth)
                } else {
                    backoff.stirred(now)
                };
                merged = false;
            } else if !merged && backoff.is_due(now) {
                (backoff, merged) = (backoff.calmed(now), true);
                count += 1;
            }
        }
        count
    }

    proptest! {
        #[test]
        fn what_is_packed_comes_back(bits: u16) {
            prop_assert_eq!(Backoff::from_bits(bits).bits(), bits);
        }

        #[test]
        fn a_page_is_due_when_it_says(age in 0..=AGE_MAX, since in any::<u32>(), later in 0..2000u16) {
            let since = Interval(since);
            let backoff = Backoff { age, stamp: since.stamp() };
            let now = since.plus(later);
            prop_assert_eq!(backoff.is_due(now), later >= backoff.wait());
            prop_assert_eq!(backoff.is_ignored(now), later < backoff.wait() / 2);
        }

        #[test]
        fn ages_stay_in_their_bits(
            steps in proptest::collection::vec((0..6u8, 0..5000u16), 0..100)
        ) {
            let (mut backoff, mut now) = (Backoff::default(), Interval(u32::MAX - 9000));
            for (step, later) in steps {
                now = now.plus(later);
                backoff = match step {
                    4 => backoff.disturbed(now, WORTH),
                    5 => backoff.busy(now),
                    0 => backoff.calmed(now),
                    1 => backoff.stirred(now),
                    2 => backoff.broken(now, WORTH),
                    _ => backoff.changed(now),
                };
                prop_assert!(backoff.age <= AGE_MAX);
                prop_assert_eq!(Backoff::from_bits(backoff.bits()), backoff);
            }
        }

        #[test]
        fn a_page_that_rests_for_too_short_is_merged_a_few_times_only(period in 2..200u32) {
            let merges = merges(period, 40 * period, WORTH);
            prop_assert!(merges <= 3, "{merges} merges in 40 periods");
        }

        #[test]
        fn a_page_that_rests_for_long_is_merged_each_time(period in 210..1000u32) {
            let merges = merges(period, 40 * period, WORTH);
            prop_assert!(merges >= 38, "{merges} merges in 40 periods");
        }

        #[test]
        fn without_a_worth_a_merge_must_last_longer_than_the_wait(period in 2..400u32) {
            let merges = merges(period, 40 * period, 0);
            if period < 8 {
                prop_assert!(merges <= 4, "{merges} merges in 40 periods");
            } else {
                prop_assert!(merges >= 38 || period < 16, "{merges} merges in 40 periods");
            }
        }
    }

    #[test]
    fn an_age_goes_down_once_the_page_has_calmed() {
        let mut now = Interval(100);
        let mut backoff = Backoff::default();
        for _ in 0..6 {
            backoff = backoff.calmed(now).broken(now, 0);
        }
        assert_eq!(backoff.wait(), 64);
        backoff = backoff.calmed(now);
        now = now.plus(64 * 4);
        assert_eq!(backoff.broken(now, WORTH).wait(), 2);
        assert_eq!(backoff.broken(now, 2 * WORTH).wait(), 512);
    }

    #[test]
    fn a_page_that_changes_is_skipped_as_often_as_ksm_skips_it() {
        let mut backoff = Backoff::default();
        for _ in 0..9 {
            backoff = backoff.changed(Interval(5));
        }
        assert_eq!(backoff.wait(), 8);
        assert!(!backoff.is_due(Interval(12)));
        assert!(backoff.is_due(Interval(13)));
    }

    #[test]
    fn no_page_waits_for_longer_than_it_was_busy() {
        let mut now = Interval(8);
        let mut backoff = Backoff::default().stirred(Interval(7));
        for _ in 0..20 {
            backoff = (0..9).fold(backoff, |backoff, _| backoff.busy(now));
            let was_busy = now.0 - 7;
            assert!(u32::from(backoff.wait()) <= was_busy.max(2) + 2, "{now:?}");
            now = now.plus(backoff.wait());
        }
        assert_eq!(backoff.wait(), 1 << AGE_BUSY_MAX);
        let once = Backoff::default().stirred(Interval(7)).busy(Interval(27));
        assert_eq!(once.wait(), 16, "a busy second tells as much as many looks");
    }

    #[test]
    fn intervals_are_as_long_as_passes_at_least() {
        let start = Instant::now();
        let mut intervals = Intervals::new(INTERVAL, start);
        for pass in 1..=20 {
            intervals.end_pass(start + INTERVAL / 10 * pass);
        }
        assert_eq!(intervals.current(), Interval(2));
        intervals.end_pass(start + INTERVAL * 12);
        assert_eq!(intervals.current(), Interval(12));
    }
}
