//! The entropy device, as Firecracker's `entropy` describes it.

use serde::{Deserialize, Serialize};

use super::RateLimiterConfig;

/// A source of random bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EntropyConfig {
    /// How fast the guest may have random bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiterConfig>,
}
