//! A histogram of durations that costs the same whatever it counts.
//!
//! Log-linear, as HdrHistogram is: each power of two is cut into 32 buckets of equal width. The
//! crates `histogram` and `hdrhistogram` need an allocator or the standard library, and the guest is
//! built offline without any crate; so these are the few lines that it needs.

const SUB_BUCKET_BITS: u32 = 5;
/// Buckets in each power of two: a quantile is too high by less than one part in this many.
const SUB_BUCKETS: usize = 1 << SUB_BUCKET_BITS;
/// The powers of two that are cut into buckets of their own; smaller values are exact.
const OCTAVES: usize = (u64::BITS - SUB_BUCKET_BITS) as usize;
const BUCKETS: usize = (OCTAVES + 1) * SUB_BUCKETS;

/// Counts of 64-bit values, for quantiles with a bounded error. It has 15 KiB and never allocates.
///
/// [`quantile`](Self::quantile) is at least the exact one, and exceeds it by less than 1/32 (3.2 %).
/// The greatest value is exact.
#[derive(Debug, Clone)]
pub struct Histogram {
    buckets: [u64; BUCKETS],
    count: u64,
    max: u64,
}

impl Default for Histogram {
    fn default() -> Histogram {
        Histogram {
            buckets: [0; BUCKETS],
            count: 0,
            max: 0,
        }
    }
}

impl Histogram {
    /// Counts one value.
    pub fn record(&mut self, value: u64) {
        self.buckets[bucket_of(value)] += 1;
        self.count += 1;
        self.max = self.max.max(value);
    }

    /// Forgets all values.
    pub fn clear(&mut self) {
        // In place: a fresh one would be built on the stack first.
        self.buckets.fill(0);
        (self.count, self.max) = (0, 0);
    }

    /// Values counted.
    #[must_use]
    pub const fn count(&self) -> u64 {
        self.count
    }

    /// The greatest value; 0 if none was counted.
    #[must_use]
    pub const fn max(&self) -> u64 {
        self.max
    }

    /// The least value that at least `per_mille` thousandths of the values do not exceed, rounded up
    /// to the end of its bucket, at most [`max`](Self::max). 0 if none was counted.
    #[must_use]
    pub fn quantile(&self, per_mille: u16) -> u64 {
        let rank = (u128::from(self.count) * u128::from(per_mille)).div_ceil(1000);
        let mut seen = 0;
        for (bucket, count) in self.buckets.iter().enumerate() {
            seen += u128::from(*count);
            if *count > 0 && seen >= rank {
                return last_of(bucket).min(self.max);
            }
        }
        self.max
    }
}

/// The bucket of a value: the values below 64 have one each, then 32 share a power of two.
#[expect(
    clippy::cast_possible_truncation,
    reason = "the top bits of a value of octave n are 32 to 63, and 0 to 63 in octave 0"
)]
const fn bucket_of(value: u64) -> usize {
    let octave = (u64::BITS - SUB_BUCKET_BITS).saturating_sub(value.leading_zeros() + 1);
    octave as usize * SUB_BUCKETS + (value >> octave) as usize
}

/// The greatest value of a bucket.
const fn last_of(bucket: usize) -> u64 {
    let octave = (bucket / SUB_BUCKETS).saturating_sub(1);
    let top = (bucket - octave * SUB_BUCKETS) as u64;
    (top << octave) + ((1 << octave) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    /// Values of every magnitude, which uniform ones are not.
    fn any_value() -> impl Strategy<Value = u64> {
        (any::<u64>(), 0..u64::BITS).prop_map(|(value, shift)| value >> shift)
    }

    fn histogram(values: &[u64]) -> Histogram {
        let mut histogram = Histogram::default();
        values.iter().for_each(|&value| histogram.record(value));
        histogram
    }

    proptest! {
        #[test]
        fn quantiles_are_those_of_a_sorted_list_within_a_thirty_second(
            mut values in prop::collection::vec(any_value(), 1..400), per_mille in 0u16..=1000,
        ) {
            let histogram = histogram(&values);
            values.sort_unstable();
            let rank = (values.len() * usize::from(per_mille)).div_ceil(1000).max(1);
            let exact = values[rank - 1];
            let told = histogram.quantile(per_mille);
            prop_assert!(told >= exact, "{told} below {exact}");
            prop_assert!(told - exact <= exact / 32, "{told} above {exact}");
            prop_assert!(told <= histogram.max());
            prop_assert_eq!(histogram.max(), values[values.len() - 1]);
            prop_assert_eq!(histogram.count(), u64::try_from(values.len()).unwrap());
        }

        #[test]
        fn every_value_is_in_the_bucket_that_ends_at_or_after_it(value in any_value()) {
            let bucket = bucket_of(value);
            prop_assert!(bucket < BUCKETS);
            prop_assert!(value <= last_of(bucket));
            prop_assert!(bucket == 0 || value > last_of(bucket - 1));
        }
    }

    #[test]
    fn values_below_sixty_four_are_exact() {
        let values: Vec<u64> = (0..64).collect();
        assert!(
            values
                .iter()
                .all(|&value| last_of(bucket_of(value)) == value)
        );
    }

    #[test]
    fn the_greatest_value_of_all_has_the_last_bucket() {
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
        assert_eq!(last_of(BUCKETS - 1), u64::MAX);
    }

    #[test]
    fn nothing_counted_is_zero_and_so_is_everything_forgotten() {
        let mut histogram = histogram(&[]);
        assert_eq!((histogram.quantile(500), histogram.max()), (0, 0));
        histogram.record(5_000);
        histogram.clear();
        assert_eq!((histogram.count(), histogram.max()), (0, 0));
        assert_eq!(histogram.quantile(999), 0);
    }
}
