//! What is sent and received, whole and in order.

use proptest::prelude::*;

use super::*;

#[test]
fn what_the_guest_sends_leaves_as_it_is_header_first() {
    let mut bench = bench(0);
    bench.guest.poke(DATA, &frame(b"hello"));
    bench.guest.poke(DATA + 0x100, b" there");
    bench.offer(TX, &[(DATA, 17, NEXT), (DATA + 0x100, 6, 0)]);
    bench.guest.worker.serve(TX);
    assert_eq!(bench.wire.state().sent, [frame(b"hello there")]);
    assert_eq!(bench.used(TX), [(0, 0)]);
    assert_eq!(bench.guest.interrupt.status(), 1);
}

#[test]
fn what_is_no_frame_comes_back_and_is_not_sent() {
    let mut bench = bench(0);
    bench.offer(TX, &[(DATA, 12, 0)]);
    bench.offer(TX, &[(DATA, 0x1_0100, 0)]);
    bench.offer(TX, &[(DATA, 64, WRITE)]);
    bench.offer(TX, &[(u64::MAX - 8, 64, 0)]);
    bench.offer(TX, &[(0x9000, 64, 0)]);
    bench.guest.worker.serve(TX);
    assert!(bench.wire.state().sent.is_empty());
    assert_eq!(bench.used(TX).len(), 5);
}

#[test]
fn a_frame_for_the_guest_says_that_it_is_in_one_chain() {
    let mut bench = bench(0);
    bench.offer(RX, &[(DATA, 2000, WRITE)]);
    bench.wire.bring(frame(b"welcome"));
    bench.guest.worker.serve(RX);
    assert_eq!(bench.used(RX), [(0, 19)]);
    let received = bench.bytes(DATA, 19);
    assert_eq!(received[10..12], [1, 0]);
    assert_eq!(received[12..], *b"welcome");
    assert_eq!(bench.guest.interrupt.status(), 1);
}

#[test]
fn a_long_frame_goes_to_several_chains_which_are_shown_at_once() {
    let mut bench = bench(MERGEABLE);
    let payload: Vec<u8> = (0..250).collect();
    for chain in 0..2 {
        bench.offer(RX, &[(DATA + 0x100 * chain, 100, WRITE)]);
    }
    bench.wire.bring(frame(&payload));
    bench.guest.worker.serve(RX);
    assert!(
        bench.used(RX).is_empty(),
        "there is no room for all of it yet"
    );
    bench.offer(RX, &[(DATA + 0x200, 100, WRITE)]);
    bench.guest.worker.serve(RX);
    assert_eq!(bench.used(RX), [(0, 100), (1, 100), (2, 62)]);
    assert_eq!(bench.bytes(DATA + 10, 2), [3, 0]);
    let received = [
        bench.bytes(DATA + 12, 88),
        bench.bytes(DATA + 0x100, 100),
        bench.bytes(DATA + 0x200, 62),
    ];
    assert_eq!(received.concat(), payload);
}

#[test]
fn a_frame_that_fits_no_buffer_is_lost_and_the_next_one_is_not() {
    let mut bench = bench(0);
    bench.offer(RX, &[(DATA, 64, WRITE)]);
    bench.wire.bring(frame(&[1; 100]));
    bench.wire.bring(frame(&[2; 20]));
    bench.guest.worker.serve(RX);
    assert_eq!(bench.used(RX), [(0, 32)]);
    assert_eq!(bench.bytes(DATA + 12, 20), [2; 20]);
}

#[test]
fn a_driver_with_no_more_buffers_to_give_loses_the_frame_and_not_the_next_one() {
    let mut bench = bench(MERGEABLE);
    for chain in 0..7 {
        let at = DATA + 0x100 * chain;
        bench.offer(RX, &[(at, 20, WRITE | NEXT), (at + 0x80, 20, WRITE)]);
    }
    // Of 16 descriptors 2 are left, which the driver may never use.
    bench.wire.bring(frame(&[1; 1000]));
    bench.wire.bring(frame(&[2; 20]));
    bench.guest.worker.serve(RX);
    assert_eq!(bench.used(RX), [(0, 32)]);
}

#[test]
fn a_frame_waits_for_buffers_and_goes_with_a_reset() {
    let mut bench = bench(0);
    bench.wire.bring(frame(&[1; 20]));
    bench.guest.worker.serve(RX);
    assert!(bench.used(RX).is_empty());
    bench.guest.set_up(0);
    bench.offer(RX, &[(DATA, 64, WRITE)]);
    bench.guest.worker.serve(RX);
    assert!(bench.used(RX).is_empty());
}

#[test]
fn a_chain_with_something_to_read_is_no_room_and_comes_back() {
    let mut bench = bench(0);
    bench.offer(RX, &[(DATA, 64, 0)]);
    bench.offer(RX, &[(DATA, 64, WRITE)]);
    bench.wire.bring(frame(&[1; 20]));
    bench.guest.worker.serve(RX);
    assert_eq!(bench.used(RX), [(0, 0), (1, 32)]);
}

proptest! {
    /// Whatever the sizes of chains and frames, what comes out is what went in.
    #[test]
    fn mergeable_buffers_give_every_frame_whole_and_in_order(
        rooms in prop::collection::vec(13_u32..200, 1..16),
        lengths in prop::collection::vec(1_usize..300, 1..8),
    ) {
        let mut bench = bench(MERGEABLE);
        for (index, &room) in (0..).zip(&rooms) {
            bench.offer(RX, &[(DATA + 0x100 * index, room, WRITE)]);
        }
        let payloads: Vec<Vec<u8>> = (1..).zip(&lengths).map(|(n, &length)| vec![n; length]).collect();
        for payload in &payloads {
            bench.wire.bring(frame(payload));
        }
        bench.guest.worker.serve(RX);
        let used = bench.used(RX);
        let mut received: Vec<Vec<u8>> = Vec::new();
        let mut at = 0;
        while at < used.len() {
            let first = DATA + 0x100 * u64::from(used[at].0);
            let count = usize::from(u16::from_le_bytes(bench.bytes(first + 10, 2).try_into().unwrap()));
            prop_assert!(count >= 1 && at + count <= used.len());
            let mut whole = Vec::new();
            for &(head, length) in &used[at..at + count] {
                whole.extend(bench.bytes(DATA + 0x100 * u64::from(head), length as usize));
            }
            received.push(whole.split_off(HEADER_BYTES));
            at += count;
        }
        prop_assert!(payloads.starts_with(&received), "{received:?}");
    }
}
