//! Token buckets with Firecracker's meaning (`src/vmm/src/rate_limiter/` there). Pure: the time is
//! told.
//!
//! A bucket holds `size` tokens, is full at first, and goes from empty to full in `refill_time`. An
//! operation takes its tokens or waits. `one_time_burst` is taken first, once; the bucket begins to
//! refill when that is used up.
//!
//! Two things are more exact than there, so that a limit is what it says:
//! - Whoever waits is told for how long. Firecracker tries again every 100 ms, so a bucket that is
//!   full in less gives less than its rate.
//! - An operation larger than the bucket waits for a full one and leaves a debt. Firecracker lets it
//!   pass at once, blocks for as long as its tokens take, and then has some of them again.

use std::time::{Duration, Instant};

use crate::config::{RateLimiterConfig, TokenBucketConfig};

/// Shortest wait, for buckets that are not full in about as little: each wait ends with a wake-up.
const WAIT_MIN: Duration = Duration::from_millis(10);

/// A bucket of tokens that refills at a constant rate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenBucket {
    size: u64,
    refill_ns: u64,
    burst: u64,
    /// Tokens times `refill_ns`, so that a nanosecond adds `size` and no fraction is lost. Below zero
    /// after an operation that was larger than the bucket.
    level: i128,
    updated: Instant,
}

impl TokenBucket {
    /// A full bucket; `None`, which is no limit, where size or refill time are 0, as in Firecracker.
    pub fn new(config: &TokenBucketConfig, now: Instant) -> Option<TokenBucket> {
        if config.size == 0 || config.refill_time == 0 {
            return None;
        }
        // Lossless for what `VmConfig::validate` lets through.
        let refill_ns = config.refill_time.saturating_mul(1_000_000);
        let mut bucket = TokenBucket {
            size: config.size,
            refill_ns,
            burst: config.one_time_burst.unwrap_or(0),
            level: 0,
            updated: now,
        };
        bucket.level = bucket.cost(config.size);
        Some(bucket)
    }

    fn cost(&self, tokens: u64) -> i128 {
        i128::from(tokens).saturating_mul(i128::from(self.refill_ns))
    }

    fn refill(&mut self, now: Instant) {
        let elapsed_ns = now.saturating_duration_since(self.updated).as_nanos();
        let elapsed_ns = i128::try_from(elapsed_ns).unwrap_or(i128::MAX);
        let added = elapsed_ns.saturating_mul(i128::from(self.size));
        self.level = self.level.saturating_add(added).min(self.cost(self.size));
        self.updated = self.updated.max(now);
    }

    /// How long `tokens` have to wait, from the last refill on; zero when they can be taken.
    fn wait(&self, tokens: u64) -> Duration {
        let rest = tokens.saturating_sub(self.burst);
        let missing = if rest == 0 {
            0
        } else {
            self.cost(rest.min(self.size)).saturating_sub(self.level)
        };
        if missing <= 0 {
            return Duration::ZERO;
        }
        let size = i128::from(self.size);
        let wait_ns = missing.saturating_add(size - 1) / size;
        let exact = Duration::from_nanos(u64::try_from(wait_ns).unwrap_or(u64::MAX));
        // A quarter of the bucket at most: what would be added to a full one is lost.
        exact.max(WAIT_MIN.min(Duration::from_nanos(self.refill_ns / 4)))
    }

    fn take(&mut self, tokens: u64, now: Instant) {
        let of_burst = tokens.min(self.burst);
        self.burst -= of_burst;
        if of_burst == tokens {
            // It refills from the moment on when the burst is used up.
            self.updated = self.updated.max(now);
            return;
        }
        self.level = self.level.saturating_sub(self.cost(tokens - of_burst));
    }
}

/// A limit of operations and of bytes a second, each or none of them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RateLimiter {
    bandwidth: Option<TokenBucket>,
    ops: Option<TokenBucket>,
}

impl RateLimiter {
    /// A limiter with full buckets; without `config` one that limits nothing.
    pub fn new(config: Option<&RateLimiterConfig>, now: Instant) -> RateLimiter {
        let bucket = |config: &Option<TokenBucketConfig>| {
            let config = config.as_ref();
            config.and_then(|config| TokenBucket::new(config, now))
        };
        config.map_or_else(RateLimiter::default, |config| RateLimiter {
            bandwidth: bucket(&config.bandwidth),
            ops: bucket(&config.ops),
        })
    }

    /// Puts new, full buckets in place of those that `config` has; the others stay as they are, as with
    /// Firecracker's `PATCH`.
    pub fn update(&mut self, config: &RateLimiterConfig, now: Instant) {
        for (bucket, config) in [
            (&mut self.bandwidth, &config.bandwidth),
            (&mut self.ops, &config.ops),
        ] {
            if let Some(config) = config {
                *bucket = TokenBucket::new(config, now);
            }
        }
    }

    /// Takes one operation of `bytes` bytes.
    ///
    /// # Errors
    /// How long to wait before it makes sense to try again; nothing was taken then.
    pub fn take(&mut self, bytes: u64, now: Instant) -> Result<(), Duration> {
        let mut buckets = [(self.ops.as_mut(), 1), (self.bandwidth.as_mut(), bytes)];
        let mut longest = Duration::ZERO;
        for (bucket, tokens) in &mut buckets {
            if let Some(bucket) = bucket {
                bucket.refill(now);
                longest = longest.max(bucket.wait(*tokens));
            }
        }
        if longest > Duration::ZERO {
            return Err(longest);
        }
        for (bucket, tokens) in buckets {
            if let Some(bucket) = bucket {
                bucket.take(tokens, now);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn config(size: u64, one_time_burst: u64, refill_time: u64) -> TokenBucketConfig {
        TokenBucketConfig {
            size,
            one_time_burst: Some(one_time_burst),
            refill_time,
        }
    }

    fn bytes_limited(bucket: TokenBucketConfig, now: Instant) -> RateLimiter {
        let config = RateLimiterConfig {
            bandwidth: Some(bucket),
            ops: None,
        };
        RateLimiter::new(Some(&config), now)
    }

    const SECOND: Duration = Duration::from_millis(1000);

    #[test]
    fn a_bucket_without_size_or_refill_time_limits_nothing() {
        let now = Instant::now();
        for (size, refill_time) in [(0, 1000), (1000, 0)] {
            let mut limiter = bytes_limited(config(size, 0, refill_time), now);
            assert_eq!(limiter, RateLimiter::default());
            assert_eq!(limiter.take(u64::MAX, now), Ok(()));
        }
    }

    #[test]
    fn a_full_bucket_is_emptied_at_once_and_refills_at_its_rate() {
        let now = Instant::now();
        let mut limiter = bytes_limited(config(1000, 0, 1000), now);
        assert_eq!(limiter.take(600, now), Ok(()));
        assert_eq!(limiter.take(400, now), Ok(()));
        assert_eq!(limiter.take(500, now), Err(SECOND / 2));
        assert_eq!(limiter.take(500, now + SECOND / 4), Err(SECOND / 4));
        assert_eq!(limiter.take(500, now + SECOND / 2), Ok(()));
        // Not more than full, however long nobody takes any.
        assert_eq!(limiter.take(1000, now + 100 * SECOND), Ok(()));
        assert!(limiter.take(1, now + 100 * SECOND).is_err());
    }

    #[test]
    fn the_burst_is_taken_first_and_once_and_the_bucket_refills_after_it() {
        let now = Instant::now();
        let mut limiter = bytes_limited(config(100, 1000, 1000), now);
        assert_eq!(limiter.take(900, now), Ok(()));
        let later = now + 10 * SECOND;
        assert_eq!(limiter.take(200, later), Ok(()));
        assert_eq!(limiter.take(100, later), Err(SECOND));
        assert_eq!(limiter.take(100, later + SECOND), Ok(()));
    }

    #[test]
    fn what_waits_keeps_the_burst() {
        let now = Instant::now();
        let mut limiter = bytes_limited(config(100, 50, 1000), now);
        assert_eq!(limiter.take(150, now), Ok(()));
        let mut limiter = bytes_limited(config(100, 50, 1000), now);
        assert_eq!(limiter.take(40, now), Ok(()));
        assert_eq!(limiter.take(110, now), Ok(()));
        assert_eq!(limiter.take(100, now), Err(SECOND));
    }

    #[test]
    fn an_operation_larger_than_the_bucket_waits_for_a_full_one_and_is_paid_for_later() {
        let now = Instant::now();
        let mut limiter = bytes_limited(config(1000, 0, 1000), now);
        assert_eq!(limiter.take(3000, now), Ok(()));
        assert_eq!(limiter.take(1, now + SECOND), Err(SECOND + SECOND / 1000));
        assert_eq!(limiter.take(3000, now + 2 * SECOND), Err(SECOND));
        assert_eq!(limiter.take(3000, now + 3 * SECOND), Ok(()));
    }

    #[test]
    fn an_operation_that_waits_for_bytes_costs_no_operation() {
        let now = Instant::now();
        let both = RateLimiterConfig {
            bandwidth: Some(config(100, 0, 1000)),
            ops: Some(config(2, 0, 100_000)),
        };
        let mut limiter = RateLimiter::new(Some(&both), now);
        assert_eq!(limiter.take(100, now), Ok(()));
        limiter.take(100, now).unwrap_err();
        assert_eq!(limiter.take(100, now + SECOND), Ok(()));
        assert_eq!(limiter.take(0, now + SECOND), Err(49 * SECOND));
    }

    #[test]
    fn an_update_replaces_the_buckets_that_it_has_and_no_others() {
        let now = Instant::now();
        let both = RateLimiterConfig {
            bandwidth: Some(config(100, 0, 1000)),
            ops: Some(config(1, 0, 1000)),
        };
        let mut limiter = RateLimiter::new(Some(&both), now);
        assert_eq!(limiter.take(100, now), Ok(()));
        let no_bandwidth = RateLimiterConfig {
            bandwidth: Some(config(0, 0, 0)),
            ops: None,
        };
        limiter.update(&no_bandwidth, now);
        assert_eq!(limiter.take(1000, now), Err(SECOND));
        let more_ops = RateLimiterConfig {
            bandwidth: None,
            ops: Some(config(2, 0, 1000)),
        };
        limiter.update(&more_ops, now);
        assert_eq!(limiter.take(1000, now), Ok(()));
        assert_eq!(limiter.take(1000, now), Ok(()));
        assert_eq!(limiter.take(0, now), Err(SECOND / 2));
    }

    #[test]
    fn the_largest_values_that_a_configuration_may_have_do_not_overflow() {
        let now = Instant::now();
        let bucket = config(
            TokenBucketConfig::SIZE_MAX,
            u64::MAX,
            TokenBucketConfig::REFILL_TIME_MAX_MS,
        );
        let mut limiter = bytes_limited(bucket, now);
        assert_eq!(limiter.take(u64::MAX, now), Ok(()));
        assert_eq!(limiter.take(u64::MAX, now), Ok(()));
        limiter.take(1, now + 1_000_000 * SECOND).unwrap_err();
    }

    proptest! {
        /// Whoever always wants more gets what the bucket says, and within 2 % no less.
        #[test]
        fn a_greedy_client_gets_the_rate_and_no_more(
            size in 1_u64..1 << 30,
            refill_time in 1_u64..5_000,
            burst in 0_u64..1 << 20,
            sizes in prop::collection::vec(1_u64..1 << 20, 1..20),
        ) {
            let start = Instant::now();
            let mut limiter = bytes_limited(config(size, burst, refill_time), start);
            let largest = *sizes.iter().max().unwrap();
            let (mut now, mut taken) = (start, 0_u64);
            for &bytes in sizes.iter().cycle().take(2_000) {
                if let Err(wait) = limiter.take(bytes, now) {
                    now += wait;
                    prop_assert_eq!(limiter.take(bytes, now), Ok(()));
                }
                taken += bytes;
            }
            let refills = (now - start).as_secs_f64() * 1e3 / refill_time as f64;
            let given = size as f64 * refills;
            let most = given + (size + burst + largest) as f64 + 1.0;
            prop_assert!(taken as f64 <= most, "{taken} of {most}");
            let least = 0.98 * given - 1.0;
            prop_assert!(taken as f64 >= least, "{taken} of {least}");
        }
    }
}
