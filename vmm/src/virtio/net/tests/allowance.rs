//! Frames that wait for memory.

use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::virtio::Doorbells;

/// Leave for so many bytes.
#[derive(Debug, Default)]
struct Purse {
    bytes: AtomicU64,
    put_off: AtomicU64,
}

impl Allowance for Purse {
    fn is_open(&self) -> bool {
        true
    }

    fn take(&self, bytes: u64) -> bool {
        let rest = |have: u64| have.checked_sub(bytes);
        let order = Ordering::Relaxed;
        self.bytes.fetch_update(order, order, rest).is_ok()
    }

    fn page_bytes(&self) -> u64 {
        4096
    }

    fn ring_later(&self, _doorbells: &Doorbells, _queue: usize) {
        self.put_off.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn a_frame_waits_half_delivered_for_memory_and_nothing_is_sent_twice() {
    let purse = Arc::new(Purse::default());
    let mut bench = bench_with(MERGEABLE, purse.clone(), |_| ());
    let payload: Vec<u8> = (0..150).collect();
    bench.offer(RX, &[(DATA, 100, WRITE)]);
    bench.offer(RX, &[(DATA + 0x1000, 100, WRITE)]);
    bench.wire.bring(frame(&payload));
    bench.guest.worker.serve(RX);
    assert_eq!(purse.put_off.load(Ordering::Relaxed), 1);
    for pages in 1..=2 {
        assert!(bench.used(RX).is_empty());
        purse.bytes.store(4096, Ordering::Relaxed);
        bench.guest.worker.serve(RX);
        let left = purse.bytes.load(Ordering::Relaxed);
        assert_eq!(left, 0, "page {pages}");
    }
    assert_eq!(bench.used(RX), [(0, 100), (1, 62)]);
    let received = [bench.bytes(DATA + 12, 88), bench.bytes(DATA + 0x1000, 62)];
    assert_eq!(received.concat(), payload);
}

#[test]
fn what_the_guest_sends_waits_for_memory_too_and_is_sent_once() {
    let purse = Arc::new(Purse::default());
    let mut bench = bench_with(0, purse.clone(), |_| ());
    bench.guest.poke(DATA, &frame(b"hello"));
    bench.offer(TX, &[(DATA, 17, NEXT), (DATA + 0x1000, 6, 0)]);
    bench.offer(TX, &[(DATA, 17, 0)]);
    for pages in 0..2 {
        purse.bytes.store(4096 * pages, Ordering::Relaxed);
        bench.guest.worker.serve(TX);
        assert!(bench.wire.state().sent.is_empty());
    }
    // The page that it has in hand is asked for again in another turn.
    purse.bytes.store(2 * 4096, Ordering::Relaxed);
    bench.guest.worker.serve(TX);
    let sent = bench.wire.state().sent.clone();
    assert_eq!(sent, [frame(b"hello\0\0\0\0\0\0"), frame(b"hello")]);
    assert_eq!(bench.used(TX).len(), 2);
    assert_eq!(purse.put_off.load(Ordering::Relaxed), 2);
}

#[test]
fn frames_of_a_turn_that_share_a_page_take_it_once() {
    let purse = Arc::new(Purse::default());
    let mut bench = bench_with(0, purse.clone(), |_| ());
    for frames in 0..3 {
        bench.offer(RX, &[(DATA + 0x100 * frames, 100, WRITE)]);
        bench.wire.bring(frame(&[1; 52]));
    }
    purse.bytes.store(4096, Ordering::Relaxed);
    bench.guest.worker.serve(RX);
    assert_eq!(bench.used(RX).len(), 3);
    assert_eq!(purse.put_off.load(Ordering::Relaxed), 0);
}
