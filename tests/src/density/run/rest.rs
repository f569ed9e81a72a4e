//! When memory has come to rest: one rule for all engines. Pure.

/// Memory must not have fallen for so long, in seconds.
pub(crate) const CALM_S: f64 = 15.0;
/// What it may have fallen by all the same: this part of it, as a divisor,
const FALL_DIVISOR: u64 = 100;
/// or this much, whichever is more.
const FALL_BYTES: u64 = 1 << 20;

/// Whether memory is at rest at `now_s`, by `usage`: (seconds, bytes) in order. What was before
/// `since_s`, when the last guest was ready, does not count.
///
/// A rise is no unrest: whoever takes memory for ever would never be measured.
pub(crate) fn is_at_rest(usage: &[(f64, u64)], since_s: f64, now_s: f64) -> bool {
    let begin_s = now_s - CALM_S;
    if begin_s < since_s {
        return false;
    }
    let calm: Vec<u64> = usage
        .iter()
        .filter(|(at_s, _)| *at_s >= begin_s)
        .map(|(_, bytes)| *bytes)
        .collect();
    let (Some(&first), Some(&last)) = (calm.first(), calm.last()) else {
        return false;
    };
    first.saturating_sub(last) <= FALL_BYTES.max(first / FALL_DIVISOR)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A look each second, from 0 on.
    fn usage(mib: impl Fn(u64) -> u64, seconds: u32) -> Vec<(f64, u64)> {
        (0..=seconds)
            .map(|at_s| (f64::from(at_s), mib(u64::from(at_s)) * MIB))
            .collect()
    }

    #[test]
    fn level_memory_is_at_rest_after_the_calm_time() {
        let usage = usage(|_| 500, 40);
        assert!(!is_at_rest(&usage, 20.0, 34.9));
        assert!(is_at_rest(&usage, 20.0, 35.1));
    }

    #[test]
    fn memory_that_falls_is_not_at_rest() {
        let falling = usage(|at_s| 500 - at_s, 40);
        assert!(!is_at_rest(&falling, 0.0, 40.0));
        let slow = usage(|at_s| 500 - at_s / 10, 40);
        assert!(is_at_rest(&slow, 0.0, 40.0));
    }

    #[test]
    fn little_memory_may_fall_by_a_mebibyte() {
        let falling = usage(|at_s| 20 - at_s / 20, 40);
        assert!(is_at_rest(&falling, 0.0, 40.0));
    }

    #[test]
    fn memory_that_grows_is_at_rest() {
        assert!(is_at_rest(&usage(|at_s| 100 + at_s, 40), 0.0, 40.0));
    }

    #[test]
    fn without_looks_nothing_is_known() {
        assert!(!is_at_rest(&[], 0.0, 60.0));
    }
}
