//! What a guest must not get through with, and what it may not take.

use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;

use super::super::connections::{CONNECTIONS_MAX, RESETS_MAX};
use super::*;
use crate::virtio::{Doorbells, fuzzing};

#[test]
fn what_belongs_to_no_connection_is_reset() {
    let mut bench = bench();
    let (mut client, header) = bench.connected();
    for unknown in [
        data(&packet(1, 2), 1),
        with(&packet(1, 2), op::RESPONSE, 0),
        with(&packet(1, 2), 77, 0),
        with(&packet(u32::MAX, 7), op::REQUEST, 0),
        with(&packet(1, u32::MAX), op::REQUEST, 0),
        Header {
            dst_cid: 9,
            ..header
        },
        Header { kind: 2, ..header },
    ] {
        bench.send(&unknown, b"x");
        let reset = bench.received().pop().unwrap().0;
        assert_eq!(reset.op, op::RST, "{unknown:?}");
        let address = (reset.src_cid, reset.src_port, reset.dst_port);
        let expected = (unknown.dst_cid, unknown.dst_port, unknown.src_port);
        assert_eq!(address, expected, "{unknown:?}");
    }
    bench.send(&with(&packet(1, 2), op::RST, 0), &[]);
    let forged = Header {
        src_cid: CID + 1,
        ..data(&header, 1)
    };
    bench.send(&forged, b"x");
    assert_eq!(bench.heard(), [], "neither is answered");
    bench.send(&data(&header, 4), b"mine");
    assert_eq!(read(&mut client, 4), b"mine");
}

#[test]
fn what_is_no_packet_comes_back_and_a_length_that_lies_is_reset() {
    let mut bench = bench();
    let (_client, header) = bench.connected();
    let before = bench.used_count(TX);
    bench.offer(TX, &[(PACKETS, 43, 0)]);
    bench.offer(TX, &[(PACKETS, 44, WRITE)]);
    bench.offer(TX, &[(PACKETS, 44 + (64 << 10) + 1, 0)]);
    bench.offer(TX, &[(u64::MAX - 8, 64, 0)]);
    bench.offer(TX, &[(0x9000, 64, 0)]);
    bench.guest.worker.serve(TX);
    assert_eq!(bench.used_count(TX), before + 5);
    assert_eq!(bench.heard(), []);
    for length in [2, usize::try_from(u32::MAX).unwrap()] {
        bench.send(&data(&header, length), b"x");
        assert_eq!(bench.heard(), [(op::RST, vec![])]);
    }
}

#[test]
fn a_connection_too_many_is_refused_whoever_asks_for_it() {
    let mut bench = bench();
    let server = bench.server(7);
    let mut clients = Vec::new();
    for _ in 1..CONNECTIONS_MAX {
        clients.push(bench.client());
        assert_eq!(bench.heard(), []);
    }
    bench.send(&with(&packet(1, 7), op::REQUEST, 0), &[]);
    assert_eq!(bench.heard(), [(op::RESPONSE, vec![])], "the last one");
    bench.send(&with(&packet(2, 7), op::REQUEST, 0), &[]);
    assert_eq!(bench.heard(), [(op::RST, vec![])]);
    let mut refused = bench.client();
    assert_eq!(bench.heard(), []);
    assert_eq!(refused.read(&mut [0]).unwrap(), 0);
    drop((clients, server));
    for _ in 0..10 {
        bench.heard();
    }
    assert_eq!(bench.connected().1.src_port, 80);
}

#[test]
fn a_guest_that_takes_no_resets_has_its_packets_wait() {
    let mut bench = bench_without_room(Arc::new(Unbounded));
    let unknown = data(&packet(1, 2), 0);
    let sent = RESETS_MAX + 10;
    for _ in 0..sent {
        bench.send(&unknown, &[]);
    }
    assert_eq!(usize::from(bench.used_count(TX)), RESETS_MAX);
    (0..QUEUE_SIZE).for_each(|_| bench.offer_room());
    let mut resets = 0;
    while resets < sent {
        let received = bench.received();
        assert!(!received.is_empty(), "{resets} of {sent}");
        resets += received.len();
    }
    assert_eq!(usize::from(bench.used_count(TX)), sent);
}

/// Leave for a number of pages.
#[derive(Debug)]
struct Purse(AtomicU64);

impl Allowance for Purse {
    fn is_open(&self) -> bool {
        true
    }
    fn take(&self, bytes: u64) -> bool {
        let rest = |have: u64| have.checked_sub(bytes);
        self.0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, rest)
            .is_ok()
    }
    fn page_bytes(&self) -> u64 {
        4096
    }
    fn ring_later(&self, _doorbells: &Doorbells, _queue: usize) {}
}

#[test]
fn packets_wait_for_memory_and_come_whole() {
    let purse = Arc::new(Purse(AtomicU64::new(0)));
    let mut bench = bench_without_room(purse.clone());
    let server = bench.server(7);
    bench.send(&with(&packet(1, 7), op::REQUEST, 0), &[]);
    assert_eq!(bench.used_count(TX), 0);
    purse.0.store(4096, Ordering::Relaxed);
    bench.guest.worker.serve(TX);
    assert_eq!(bench.used_count(TX), 1);
    (0..QUEUE_SIZE).for_each(|_| bench.offer_room());
    assert_eq!(bench.heard(), [], "none for the answer");
    purse.0.store(4096, Ordering::Relaxed);
    assert_eq!(bench.heard(), [(op::RESPONSE, vec![])]);
    drop(server);
}

#[test]
fn a_driver_that_resets_under_load_leaves_nothing_behind() {
    let mut bench = bench();
    for _ in 0..1000 {
        let (mut client, header) = bench.connected();
        client.write_all(&[1; 5000]).unwrap();
        bench.send(&data(&header, 3000), &[2; 3000]);
        bench.leave();
        assert_eq!(Arc::strong_count(&bench.guest.memory), 2);
        let gone = client.read_to_end(&mut Vec::new());
        assert!(!gone.is_err_and(|error| error.kind() == ErrorKind::WouldBlock));
        bench.begin();
    }
}

#[test]
fn seeds_of_the_fuzz_target_are_no_findings() {
    for seed in crate::fuzz_seeds::of("virtio_vsock_packets") {
        fuzzing::vsock_packets(&seed);
    }
}

proptest! {
    #[test]
    fn random_packets_never_panic(input in prop::collection::vec(any::<u8>(), 0..2000)) {
        fuzzing::vsock_packets(&input);
    }
}
