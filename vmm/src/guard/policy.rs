//! What to do about memory, and when to look next. Pure: figures in, an action out.
//!
//! A guest takes memory without asking, at the speed of its page faults. So there is a *line*
//! before the limit, and the room between two is what guests may take before a look and the next:
//! a reserve by the number of CPUs, and what the growth that was just seen comes to. Above the line
//! all guests are held still and VMs are ended until use is below it again. The next look is as
//! far off as the room up to the line lasts.

use std::time::Duration;

use crate::id::VmId;

/// Shortest time between two looks. A look takes some 50 us.
const LOOK_MIN: Duration = Duration::from_millis(1);
/// Longest, where there is a limit.
const LOOK_MAX: Duration = Duration::from_millis(500);
/// Time between two looks while an unmerge waits for memory.
const LOOK_STARVING: Duration = Duration::from_millis(20);
/// Time between two looks where nothing limits: somebody may set the limit of the cgroup.
const LOOK_UNLIMITED: Duration = Duration::from_secs(2);

/// What guests on one CPU take at most in a second, until more was seen: 4 us for a page.
const BYTES_PER_S_AND_CPU: u64 = 1 << 30;
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
    last: Option<(Duration, u64)>,
    growth_bytes_per_s: f64,
    starving_since: Option<Duration>,
}

impl Policy {
    pub(crate) fn new(cpus: usize) -> Policy {
        Policy {
            cpus: (cpus as u64).max(1),
            last: None,
            growth_bytes_per_s: 0.0,
            starving_since: None,
        }
    }

    /// What is to be kept free below `limit_bytes` whatever guests do.
    pub(crate) fn reserve_bytes(&self, limit_bytes: u64) -> u64 {
        let burst = bytes_in(self.fastest_known(), BLIND);
        burst
            .max(limit_bytes / RESERVE_DIVISOR)
            .min(limit_bytes / RESERVE_DIVISOR_MIN)
    }

    /// Takes note of a look made at `now`, counted from any fixed point.
    pub(crate) fn note(&mut self, now: Duration, sight: &Sight) {
        self.starving_since = sight
            .is_starving
            .then(|| self.starving_since.unwrap_or(now));
        let Some(filled) = sight.filled else {
            self.last = None;
            return;
        };
        if let Some((then, use_bytes)) = self.last {
            let seconds = now.saturating_sub(then).as_secs_f64();
            if seconds > 0.0 {
                let grown = filled.use_bytes.saturating_sub(use_bytes);
                // Growth of bytes fits a float's precision for all that a host can hold.
                #[expect(clippy::cast_precision_loss, reason = "a rate, not an account")]
                let seen = grown as f64 / seconds;
                // Bursts come in rows: half of one is still expected after a tenth of a second.
                let kept = self.growth_bytes_per_s * 0.5_f64.powf(seconds / 0.1);
                self.growth_bytes_per_s = kept.max(seen);
            }
        }
        self.last = Some((now, filled.use_bytes));
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
        let growing = bytes_in_f(self.growth_bytes_per_s, BLIND).min(reserve_bytes / 2);
        limit_bytes
            .saturating_sub(reserve_bytes)
            .saturating_sub(growing)
    }

    /// The guests stood still, and a VM was ended: what was seen before says nothing any more.
    pub(crate) fn begin_anew(&mut self) {
        self.last = None;
        self.growth_bytes_per_s = 0.0;
        self.starving_since = None;
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
        let room = self
            .line_bytes(filled.limit_bytes)
            .saturating_sub(filled.use_bytes);
        let bytes_per_ms = (self.fastest_known() / 1000).max(1);
        let lasts = Duration::from_millis(room / bytes_per_ms);
        let longest = if sight.is_starving {
            LOOK_STARVING
        } else {
            LOOK_MAX
        };
        lasts.clamp(LOOK_MIN, longest)
    }

    /// What guests take in a second at most, as far as anybody knows.
    fn fastest_known(&self) -> u64 {
        self.cpus.saturating_mul(BYTES_PER_S_AND_CPU)
    }
}

fn bytes_in(bytes_per_s: u64, time: Duration) -> u64 {
    let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    (bytes_per_s / 1_000_000).saturating_mul(micros)
}

fn bytes_in_f(bytes_per_s: f64, time: Duration) -> u64 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "saturates, and a rate is positive"
    )]
    let bytes_per_s = bytes_per_s as u64;
    bytes_in(bytes_per_s, time)
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
/// own, among those the first by name.
pub(crate) fn victim(candidates: &[Candidate]) -> Option<&Candidate> {
    candidates.iter().min_by(|a, b| {
        let by_priority = a.oom_priority.cmp(&b.oom_priority);
        by_priority
            .then(b.private_bytes.cmp(&a.private_bytes))
            .then_with(|| a.id.cmp(&b.id))
    })
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
