//! Rate limits.

use std::time::{Duration, Instant};

use super::*;
use crate::config::{RateLimiterConfig, TokenBucketConfig};
use crate::events::EventLoop;

#[test]
fn a_frame_that_is_lost_costs_no_tokens() {
    let mut bench = bench_with(0, Arc::new(Unbounded), |config| {
        config.rx_rate_limiter = limit(100, 1 << 40);
    });
    bench.offer(RX, &[(DATA, 64, WRITE)]);
    bench.wire.bring(frame(&[1; 80]));
    bench.wire.bring(frame(&[2; 20]));
    bench.guest.worker.serve(RX);
    assert_eq!(bench.used(RX), [(0, 32)]);
}

fn limit(size: u64, refill_time: u64) -> Option<RateLimiterConfig> {
    let bucket = TokenBucketConfig {
        size,
        one_time_burst: None,
        refill_time,
    };
    Some(RateLimiterConfig {
        bandwidth: Some(bucket),
        ops: None,
    })
}

#[test]
fn each_direction_has_a_limit_of_its_own_that_a_reset_does_not_lift() {
    let never = 1 << 40;
    let mut bench = bench_with(0, Arc::new(Unbounded), |config| {
        config.rx_rate_limiter = limit(100, never);
        config.tx_rate_limiter = limit(200, never);
    });
    let run = |bench: &mut Bench| {
        for _ in 0..3 {
            bench.offer(TX, &[(DATA, 64, 0)]);
            bench.offer(RX, &[(DATA + 0x1000, 100, WRITE)]);
            bench.wire.bring(frame(&[1; 52]));
            bench.guest.worker.serve(RX);
            bench.guest.worker.serve(TX);
        }
    };
    run(&mut bench);
    assert_eq!((bench.used(RX).len(), bench.used(TX).len()), (1, 3));
    bench.start_over(0);
    run(&mut bench);
    assert_eq!((bench.used(RX).len(), bench.used(TX).len()), (0, 0));
}

#[test]
fn the_event_loop_delivers_what_comes_and_what_waits_for_tokens() {
    let mut bench = bench_with(0, Arc::new(Unbounded), |config| {
        config.rx_rate_limiter = limit(64, 5);
        config.tx_rate_limiter = limit(64, 5);
    });
    for _ in 0..8 {
        bench.offer(RX, &[(DATA + 0x1000, 100, WRITE)]);
        bench.offer(TX, &[(DATA, 64, 0)]);
    }
    bench.guest.worker.serve(TX);
    let worker = bench.guest.take_worker();
    let events = EventLoop::new().unwrap();
    let id = events
        .remote()
        .add(Box::new(worker), Box::new(|text| panic!("{text}")))
        .unwrap();
    (0..8).for_each(|_| bench.wire.bring(frame(&[1; 52])));
    let deadline = Instant::now() + Duration::from_secs(120);
    while (bench.used(RX).len(), bench.used(TX).len()) != (8, 8) {
        assert!(Instant::now() < deadline, "{:?}", bench.used(RX));
        std::thread::yield_now();
    }
    events.remote().remove(vec![id]).unwrap();
}
