//! What to do about memory, and when to look next. Pure: figures in, an action out.
//!
//! A guest takes memory without asking, at the speed of its page faults. So there is a *line*
//! before the limit, and the room between two is what guests may take before a look and the next:
//! a reserve by the number of CPUs, and what the growth that was just seen comes to. Above the line
//! all guests are held still and VMs are ended until use is below it again.
//!
//! Of the room up to the line device queues are granted a half, and the next look is as far off as
//! the other half lasts. It lasts by the fastest growth that was ever seen here, twice over, and at
//! least by what guests are known to reach: a burst that was never seen before is met by the look
//! that comes at half of the room.

use std::time::Duration;

use super::gauge::Limit;
use crate::id::VmId;

/// Shortest time between two looks. A look takes some 50 us.
const LOOK_MIN: Duration = Duration::from_millis(1);
/// Longest, where there is a limit.
const LOOK_MAX: Duration = Duration::from_millis(500);
/// Time between two looks while an unmerge waits for memory.
const LOOK_STARVING: Duration = Duration::from_millis(20);
/// Time between two looks where nothing limits: somebody may set the limit of the cgroup, or move
/// the process into one that has a limit.
const LOOK_UNLIMITED: Duration = Duration::from_millis(500);

/// What guests on one CPU take at most in a second, until more was seen: 4 us for a page.
const BYTES_PER_S_AND_CPU: u64 = 1 << 30;
/// The same with huge pages: a page fault takes 2 MiB, as fast as memory is filled with zeros.
const HUGE_BYTES_PER_S_AND_CPU: u64 = 4 << 30;
/// Looks that follow each other sooner say nothing of growth: a cgroup's figure moves by batches of
/// pages.
const GROWTH_WINDOW: Duration = Duration::from_micros(500);
/// Shortest time over which growth tells a speed that is remembered.
const SPEED_WINDOW: Duration = Duration::from_millis(4);
/// In this time the fastest growth that was seen counts for half: who was fast may be again.
const SPEED_HALF_LIFE_S: f64 = 60.0;
/// How long guests may go on taking memory after they crossed the line unseen: the time between
/// two looks, and as much again for a guard that wakes up late.
const BLIND: Duration = Duration::from_millis(2);
/// Share of the limit that is kept free at least, as a divisor.
const RESERVE_DIVISOR: u64 = 24;
/// And at most; so small a limit can't be kept against guests that know no restraint.
const RESERVE_DIVISOR_MIN: u64 = 4;
/// Below this share of the limit memory is short, as a divisor.
const SHORT_DIVISOR: u64 = 8;
/// Share of time in percent that somebody stood still for want of memory, above which it is short.
const PRESSURE_SHORT: f64 = 5.0;
/// How long an unmerge may wait for memory before it is given that of a VM.
const STARVING_MAX: Duration = Duration::from_millis(200);

/// Memory, as one look shows it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Sight {
    /// In use, of the limit that is nearest; `None` where nothing limits.
    pub(crate) filled: Option<Filled>,
    /// Which limit that is.
    pub(crate) limit: Option<Limit>,
    /// What does not show in use: starts will take it for certain, or it was taken and not counted
    /// yet.
    pub(crate) spoken_for_bytes: u64,
    /// Domains of this process, each of which may have a grant of the same limit.
    pub(crate) domains: u64,
    /// Share of the last 10 s in percent that some task waited for memory (PSI, `some avg10`).
    pub(crate) pressure_percent: f64,
    /// The kernel says that the limit's group has run out of memory.
    pub(crate) is_out: bool,
    /// An unmerge waits for memory, and may have that of a VM.
    pub(crate) is_starving: bool,
}

/// How full something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Filled {
    pub(crate) use_bytes: u64,
    pub(crate) limit_bytes: u64,
}

impl Filled {
    /// What is left.
    pub(crate) fn headroom_bytes(self) -> u64 {
        self.limit_bytes.saturating_sub(self.use_bytes)
    }

    /// Whether a careful look, which costs more, is worth it.
    pub(crate) fn is_short(self) -> bool {
        self.headroom_bytes() < self.limit_bytes / SHORT_DIVISOR
    }
}

/// What to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Nothing.
    Rest,
    /// Have the worker merge without pauses.
    HurryWorker,
    /// Hold the guests, and end VMs until there is room.
    StopVictim,
}

/// The policy of one domain, with what it remembers of the last looks.
#[derive(Clone, Debug)]
pub(crate) struct Policy {
    cpus: u64,
    huge_pages: bool,
    last: Option<(Duration, u64)>,
    growth_bytes_per_s: f64,
    /// Where the growth began that is to tell a speed.
    window: Option<(Duration, u64)>,
    fastest_bytes_per_s: f64,
    starving_since: Option<Duration>,
}

impl Policy {
    pub(crate) fn new(cpus: usize) -> Policy {
        Policy {
            cpus: (cpus as u64).max(1),
            huge_pages: false,
            last: None,
            growth_bytes_per_s: 0.0,
            window: None,
            fastest_bytes_per_s: 0.0,
            starving_since: None,
        }
    }

    /// From now on guests may have huge pages.
    pub(crate) fn expect_huge_pages(&mut self) {
        self.huge_pages = true;
    }

    /// What is to be kept free below `limit_bytes` whatever guests do.
    pub(crate) fn reserve_bytes(&self, limit_bytes: u64) -> u64 {
        let burst = bytes_in(self.assumed(), BLIND);
        burst
            .max(limit_bytes / RESERVE_DIVISOR)
            .min(limit_bytes / RESERVE_DIVISOR_MIN)
    }

    /// The least limit of which `use_bytes` may be in use without a VM's end.
    pub(crate) fn least_limit_bytes(&self, use_bytes: u64) -> u64 {
        let by_burst = use_bytes.saturating_add(bytes_in(self.assumed(), BLIND));
        let by_share = above(use_bytes, RESERVE_DIVISOR);
        let at_most = above(use_bytes, RESERVE_DIVISOR_MIN);
        by_burst.max(by_share).min(at_most)
    }

    /// Takes note of a look made at `now`, counted from any fixed point.
    pub(crate) fn note(&mut self, now: Duration, sight: &Sight) {
        self.starving_since = sight
            .is_starving
            .then(|| self.starving_since.unwrap_or(now));
        let Some(filled) = sight.filled else {
            self.last = None;
            self.window = None;
            return;
        };
        self.note_speed(now, filled.use_bytes);
        if let Some((then, use_bytes)) = self.last {
            let time = now.saturating_sub(then);
            if time < GROWTH_WINDOW {
                return;
            }
            let seconds = time.as_secs_f64();
            let grown = filled.use_bytes.saturating_sub(use_bytes);
            // Growth of bytes fits a float's precision for all that a host can hold.
            #[expect(clippy::cast_precision_loss, reason = "a rate, not an account")]
            let seen = grown as f64 / seconds;
            // Bursts come in rows: half of one is still expected after a tenth of a second.
            let kept = self.growth_bytes_per_s * 0.5_f64.powf(seconds / 0.1);
            self.growth_bytes_per_s = kept.max(seen);
        }
        self.last = Some((now, filled.use_bytes));
    }

    /// Takes note of the fastest growth, over windows that are long enough to tell one.
    fn note_speed(&mut self, now: Duration, use_bytes: u64) {
        let Some((begun, at_first)) = self.window else {
            self.window = Some((now, use_bytes));
            return;
        };
        let time = now.saturating_sub(begun);
        if time < SPEED_WINDOW {
            return;
        }
        self.window = Some((now, use_bytes));
        let seconds = time.as_secs_f64();
        // Growth of bytes fits a float's precision for all that a host can hold.
        #[expect(clippy::cast_precision_loss, reason = "a rate, not an account")]
        let seen = use_bytes.saturating_sub(at_first) as f64 / seconds;
        let kept = self.fastest_bytes_per_s * 0.5_f64.powf(seconds / SPEED_HALF_LIFE_S);
        self.fastest_bytes_per_s = kept.max(seen);
    }

    /// What to do about what was noted last.
    pub(crate) fn action(&self, now: Duration, sight: &Sight) -> Action {
        let starves = |since| now.saturating_sub(since) >= STARVING_MAX;
        if self.starving_since.is_some_and(starves) {
            return Action::StopVictim;
        }
        let Some(filled) = sight.filled else {
            return Action::Rest;
        };
        if sight.is_out || filled.use_bytes > self.line_bytes(filled.limit_bytes) {
            return Action::StopVictim;
        }
        let is_tight =
            filled.headroom_bytes() < self.reserve_bytes(filled.limit_bytes).saturating_mul(4);
        if filled.is_short() || is_tight || sight.pressure_percent > PRESSURE_SHORT {
            return Action::HurryWorker;
        }
        Action::Rest
    }

    /// What reservations must leave free below `limit_bytes`, so that they never cross the line.
    pub(crate) fn margin_bytes(&self, limit_bytes: u64) -> u64 {
        2 * self.reserve_bytes(limit_bytes)
    }

    /// Use above which VMs are ended.
    pub(crate) fn line_bytes(&self, limit_bytes: u64) -> u64 {
        let reserve_bytes = self.reserve_bytes(limit_bytes);
        // Bounded, so that an unmerge, which grows as fast as any guest, stays below the line.
        let growing = bytes_in(whole_bytes(self.growth_bytes_per_s), BLIND).min(reserve_bytes / 2);
        limit_bytes
            .saturating_sub(reserve_bytes)
            .saturating_sub(growing)
    }

    /// The guests stood still, and a VM was ended: what was seen before says nothing any more.
    pub(crate) fn begin_anew(&mut self) {
        self.last = None;
        self.window = None;
        self.growth_bytes_per_s = 0.0;
        self.starving_since = None;
    }

    /// What device queues may take until the next look; `None` where nothing limits.
    pub(crate) fn grant_bytes(&self, sight: &Sight) -> Option<u64> {
        let filled = sight.filled?;
        Some(self.room_bytes(filled, sight.spoken_for_bytes) / 2 / sight.domains.max(1))
    }

    /// What may be taken before the line, less what is spoken for.
    fn room_bytes(&self, filled: Filled, spoken_for_bytes: u64) -> u64 {
        self.line_bytes(filled.limit_bytes)
            .saturating_sub(filled.use_bytes)
            .saturating_sub(spoken_for_bytes)
    }

    /// How long to wait before the next look.
    pub(crate) fn next_look(&self, sight: &Sight) -> Duration {
        let Some(filled) = sight.filled else {
            return if sight.is_starving {
                LOOK_STARVING
            } else {
                LOOK_UNLIMITED
            };
        };
        let room_bytes = self.room_bytes(filled, sight.spoken_for_bytes) / 2;
        let bytes_per_ms = (self.fastest_known() / 1000).max(1);
        let lasts = Duration::from_millis(room_bytes / bytes_per_ms);
        let longest = if sight.is_starving {
            LOOK_STARVING
        } else {
            LOOK_MAX
        };
        lasts.clamp(LOOK_MIN, longest)
    }

    /// What guests take in a second at most, as far as anybody knows: twice what was seen, or what
    /// they are known to reach.
    fn fastest_known(&self) -> u64 {
        self.assumed()
            .max(whole_bytes(2.0 * self.fastest_bytes_per_s))
    }

    /// What guests are known to reach.
    fn assumed(&self) -> u64 {
        self.cpus.saturating_mul(if self.huge_pages {
            HUGE_BYTES_PER_S_AND_CPU
        } else {
            BYTES_PER_S_AND_CPU
        })
    }
}

fn bytes_in(bytes_per_s: u64, time: Duration) -> u64 {
    let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    (bytes_per_s / 1_000_000).saturating_mul(micros)
}

/// The least limit that leaves `use_bytes` below a reserve of one part in `divisor`.
fn above(use_bytes: u64, divisor: u64) -> u64 {
    use_bytes
        .saturating_add(use_bytes / (divisor - 1))
        .saturating_add(divisor)
}

fn whole_bytes(bytes: f64) -> u64 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "saturates, and a rate is positive"
    )]
    let bytes = bytes as u64;
    bytes
}

/// A VM that could be ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Candidate {
    pub(crate) id: VmId,
    pub(crate) oom_priority: i32,
    /// What its end gives back at once.
    pub(crate) private_bytes: u64,
}

/// The VM to end: that with the lowest priority, among those the one with the most memory of its
/// own, among those the first by name. Its place in `candidates`.
pub(crate) fn victim(candidates: &[Candidate]) -> Option<usize> {
    let numbered = candidates.iter().enumerate();
    let first = numbered.min_by(|(_, a), (_, b)| {
        let by_priority = a.oom_priority.cmp(&b.oom_priority);
        by_priority
            .then(b.private_bytes.cmp(&a.private_bytes))
            .then_with(|| a.id.cmp(&b.id))
    });
    first.map(|(place, _)| place)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    fn sight(use_bytes: u64, limit_bytes: u64) -> Sight {
        let filled = Filled {
            use_bytes,
            limit_bytes,
        };
        Sight {
            filled: Some(filled),
            ..Sight::default()
        }
    }

    fn action(use_mib: u64, limit_mib: u64) -> Action {
        let mut policy = Policy::new(2);
        let sight = sight(use_mib * MIB, limit_mib * MIB);
        policy.note(Duration::ZERO, &sight);
        policy.action(Duration::ZERO, &sight)
    }

    #[test]
    fn the_steps_come_one_after_the_other_as_memory_fills() {
        assert_eq!(action(100, 1000), Action::Rest);
        assert_eq!(action(900, 1000), Action::HurryWorker);
        assert_eq!(action(980, 1000), Action::StopVictim);
        assert_eq!(action(2000, 1000), Action::StopVictim);
        assert_eq!(action(1, 0), Action::StopVictim);
    }

    #[test]
    fn nothing_is_done_where_nothing_limits() {
        let mut policy = Policy::new(2);
        let sight = Sight {
            pressure_percent: 99.0,
            ..Sight::default()
        };
        policy.note(Duration::ZERO, &sight);
        assert_eq!(policy.action(Duration::ZERO, &sight), Action::Rest);
        assert_eq!(policy.next_look(&sight), LOOK_UNLIMITED);
    }

    #[test]
    fn pressure_and_the_kernels_word_count_where_the_figures_look_well() {
        let policy = Policy::new(2);
        let mut sight = sight(100 * MIB, 1000 * MIB);
        sight.pressure_percent = 10.0;
        assert_eq!(policy.action(Duration::ZERO, &sight), Action::HurryWorker);
        sight.is_out = true;
        assert_eq!(policy.action(Duration::ZERO, &sight), Action::StopVictim);
    }

    #[test]
    fn who_starves_gets_a_vm_after_a_while_and_not_at_once() {
        let mut policy = Policy::new(2);
        let mut sight = sight(100 * MIB, 1000 * MIB);
        sight.is_starving = true;
        let at = Duration::from_secs(7);
        policy.note(at, &sight);
        assert_eq!(policy.action(at, &sight), Action::Rest);
        let later = at + STARVING_MAX;
        policy.note(later, &sight);
        assert_eq!(policy.action(later, &sight), Action::StopVictim);
        sight.is_starving = false;
        policy.note(later, &sight);
        assert_eq!(policy.action(later, &sight), Action::Rest);
    }

    #[test]
    fn reservations_end_below_the_line_however_fast_they_grow() {
        for limit_mib in [1, 10, 100, 1000, 100_000] {
            let limit_bytes = limit_mib * MIB;
            let mut policy = Policy::new(4);
            policy.note(Duration::ZERO, &sight(0, limit_bytes));
            let full = limit_bytes - policy.margin_bytes(limit_bytes);
            let sight = sight(full, limit_bytes);
            policy.note(Duration::from_micros(1), &sight);
            let action = policy.action(Duration::from_micros(1), &sight);
            assert_ne!(action, Action::StopVictim, "{limit_mib} MiB");
        }
    }

    #[test]
    fn fast_growth_draws_the_line_earlier_and_is_forgotten() {
        let mut policy = Policy::new(2);
        let before = policy.line_bytes(1000 * MIB);
        let ms = Duration::from_millis;
        policy.note(ms(0), &sight(0, 1000 * MIB));
        policy.note(ms(10), &sight(100 * MIB, 1000 * MIB));
        // 10 GiB a second.
        assert!(policy.line_bytes(1000 * MIB) <= before - 19 * MIB);
        for at in 1..100 {
            policy.note(ms(10 + at * 100), &sight(100 * MIB, 1000 * MIB));
        }
        assert_eq!(policy.line_bytes(1000 * MIB), before);
    }

    /// Plays guests that are idle at `used_mib`, then take `bytes_per_s` from just after a look on;
    /// each look comes as late as a guard wakes up. Most that is in use when they are held.
    fn most_in_use(policy: &mut Policy, used_mib: u64, bytes_per_s: u64, limit_mib: u64) -> u64 {
        const LATE: Duration = Duration::from_millis(1);
        let mut now = Duration::ZERO;
        let mut seen = sight(used_mib * MIB, limit_mib * MIB);
        loop {
            policy.note(now, &seen);
            let used = seen.filled.unwrap().use_bytes;
            if policy.action(now, &seen) == Action::StopVictim {
                return used;
            }
            let time = policy.next_look(&seen) + LATE;
            now += time;
            seen = sight(used + bytes_in(bytes_per_s, time), limit_mib * MIB);
        }
    }

    #[test]
    fn huge_pages_are_seen_to_be_taken_before_the_limit() {
        // Two threads at 2.3 GiB a second each.
        let bytes_per_s = 2 * 2_355 * MIB;
        for limit_mib in [512, 1024, 4096] {
            for used_mib in [16, limit_mib / 2, limit_mib * 3 / 4] {
                let mut policy = Policy::new(2);
                policy.expect_huge_pages();
                let used = most_in_use(&mut policy, used_mib, bytes_per_s, limit_mib);
                assert!(used <= limit_mib * MIB, "{} of {limit_mib} MiB", used / MIB);
            }
        }
    }

    #[test]
    fn a_burst_twice_as_fast_as_was_ever_seen_is_met() {
        for (limit_mib, used_mib) in [(512, 16), (1024, 512), (4096, 100)] {
            let mut policy = Policy::new(2);
            let used = most_in_use(&mut policy, used_mib, 4 << 30, limit_mib);
            assert!(used <= limit_mib * MIB, "{} of {limit_mib} MiB", used / MIB);
        }
    }

    #[test]
    fn looks_come_sooner_for_a_while_where_fast_growth_was_seen() {
        let mut policy = Policy::new(2);
        let calm = sight(500 * MIB, 4000 * MIB);
        let before = policy.next_look(&calm);
        let ms = Duration::from_millis;
        policy.note(ms(0), &sight(100 * MIB, 4000 * MIB));
        policy.note(ms(100), &sight(500 * MIB, 4000 * MIB));
        policy.note(ms(2000), &calm);
        // 4000 MiB a second, twice over, instead of 2 GiB.
        assert!(policy.next_look(&calm) * 2 < before);
        policy.note(Duration::from_secs(900), &calm);
        assert_eq!(policy.next_look(&calm), before);
    }

    #[test]
    fn growth_over_less_than_a_window_tells_no_speed() {
        let mut policy = Policy::new(2);
        policy.note(Duration::ZERO, &sight(0, 4000 * MIB));
        policy.note(Duration::from_micros(50), &sight(MIB, 4000 * MIB));
        let speed = policy.fastest_known();
        assert_eq!(speed, Policy::new(2).fastest_known());
    }

    #[test]
    fn queues_of_all_domains_are_granted_half_of_the_room_and_starts_come_first() {
        let policy = Policy::new(2);
        let mut seen = sight(100 * MIB, 1000 * MIB);
        let room = policy.line_bytes(1000 * MIB) - 100 * MIB;
        assert_eq!(policy.grant_bytes(&seen), Some(room / 2));
        seen.domains = 3;
        assert_eq!(policy.grant_bytes(&seen), Some(room / 2 / 3));
        let before = policy.next_look(&seen);
        seen.spoken_for_bytes = 700 * MIB;
        assert_eq!(policy.grant_bytes(&seen), Some((room - 700 * MIB) / 2 / 3));
        assert!(policy.next_look(&seen) < before);
        seen.spoken_for_bytes = 1000 * MIB;
        assert_eq!(policy.grant_bytes(&seen), Some(0));
        assert_eq!(policy.grant_bytes(&Sight::default()), None);
    }

    proptest! {
        #[test]
        fn guests_at_the_assumed_speed_never_reach_the_limit_between_two_looks(
            limit_mib in 64..100_000_u64, percent in 0..100_u64, cpus in 1..8_usize,
        ) {
            let policy = Policy::new(cpus);
            let limit_bytes = limit_mib * MIB;
            let sight = sight(limit_bytes / 100 * percent, limit_bytes);
            prop_assume!(policy.action(Duration::ZERO, &sight) != Action::StopVictim);
            let taken = bytes_in(policy.fastest_known(), policy.next_look(&sight));
            prop_assert!(sight.filled.unwrap().use_bytes + taken <= limit_bytes);
        }

        #[test]
        fn the_least_limit_for_some_use_ends_nobody_and_little_less_would(
            use_bytes in 1..1_u64 << 44, cpus in 1..64_usize,
        ) {
            let policy = Policy::new(cpus);
            let least = policy.least_limit_bytes(use_bytes);
            prop_assert!(policy.line_bytes(least) >= use_bytes, "{}", least);
            prop_assert!(policy.line_bytes(least - least.min(256)) < use_bytes, "{}", least);
        }

        #[test]
        fn more_use_never_makes_the_action_milder_or_the_next_look_later(
            limit_mib in 1..100_000_u64, a in 0..120_u64, b in 0..120_u64,
        ) {
            let policy = Policy::new(2);
            let limit_bytes = limit_mib * MIB;
            let at = |percent| sight(limit_bytes / 100 * percent, limit_bytes);
            let (less, more) = (at(a.min(b)), at(a.max(b)));
            let severity = |sight| policy.action(Duration::ZERO, sight) as u8;
            prop_assert!(severity(&less) <= severity(&more));
            prop_assert!(policy.next_look(&more) <= policy.next_look(&less));
        }

        #[test]
        fn the_victim_is_the_least_important_and_of_those_the_largest(
            vms in proptest::collection::vec((-2..3_i32, 0..4_u64), 0..10)
        ) {
            let candidates: Vec<Candidate> = vms
                .iter()
                .zip(0..)
                .map(|(&(oom_priority, private_bytes), number)| Candidate {
                    id: format!("vm{number}").parse().unwrap(),
                    oom_priority,
                    private_bytes,
                })
                .collect();
            match victim(&candidates) {
                None => prop_assert!(vms.is_empty()),
                Some(chosen) => for other in &candidates {
                    let chosen = &candidates[chosen];
                    prop_assert!(chosen.oom_priority <= other.oom_priority);
                    prop_assert!(
                        chosen.oom_priority < other.oom_priority
                            || chosen.private_bytes >= other.private_bytes
                    );
                },
            }
        }
    }
}
