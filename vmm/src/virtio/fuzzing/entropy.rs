//! A guest with an entropy device.

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::super::{Entropy, Throttle};
use super::{Guest, InTurn, served};
use crate::config::{RateLimiterConfig, TokenBucketConfig};

/// Any chains at all for an entropy device. Bit 0 of the first byte of `input` sets a limit, the
/// others are those of [`any_requests`](super::any_requests), and so is the rest.
#[expect(clippy::expect_used, reason = "only in tests and fuzz targets")]
pub fn entropy_requests(input: &[u8]) {
    let Some((&options, input)) = input.split_first() else {
        return;
    };
    let features = u64::from(options & 2 != 0) << VIRTIO_RING_F_EVENT_IDX;
    let bucket = TokenBucketConfig {
        size: 1000,
        one_time_burst: Some(2000),
        refill_time: 1,
    };
    let limit = RateLimiterConfig {
        bandwidth: Some(bucket),
        ops: None,
    };
    let throttle = Throttle::new(Some(&limit).filter(|_| options & 1 != 0)).expect("timer");
    let allowance = InTurn::new(options >> 2);
    let guest = Guest::with(Entropy::new(throttle, allowance.clone()), allowance);
    served(guest, |guest| guest.worker.serve(0), features, input);
}
