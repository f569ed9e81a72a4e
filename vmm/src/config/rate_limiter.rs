//! A rate limiter, as Firecracker describes one.

use serde::{Deserialize, Serialize};

/// Firecracker's `RateLimiter`: what is absent is not limited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimiterConfig {
    /// A bucket whose tokens are bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucketConfig>,
    /// A bucket whose tokens are operations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucketConfig>,
}

/// Firecracker's `TokenBucket`. One of size or refill time 0 limits nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenBucketConfig {
    /// Tokens that it holds.
    pub size: u64,
    /// Tokens that are there at first, beside those of the full bucket, and not again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub one_time_burst: Option<u64>,
    /// Milliseconds in which an empty bucket becomes full.
    pub refill_time: u64,
}

impl TokenBucketConfig {
    /// Largest size: Firecracker's API has signed 64 bits for it.
    pub const SIZE_MAX: u64 = i64::MAX.unsigned_abs();
    /// Longest refill time in milliseconds: as nanoseconds it fits into signed 64 bits, too.
    pub const REFILL_TIME_MAX_MS: u64 = TokenBucketConfig::SIZE_MAX / 1_000_000;
}
