//! Turns that end before the work is done, or because the link is no good.

use super::*;
use crate::virtio::Budget;

#[test]
fn an_error_of_the_link_does_not_keep_the_frames_behind_it() {
    let mut bench = bench(0);
    bench.offer(RX, &[(DATA, 64, WRITE)]);
    bench.wire.state().failures = 3;
    bench.wire.bring(frame(&[1; 20]));
    bench.guest.worker.serve(RX);
    assert_eq!(bench.used(RX), [(0, 32)]);
}

#[test]
fn a_link_that_has_nothing_but_errors_is_left_alone() {
    let bench = bench(0);
    bench.wire.state().failures = u32::MAX;
    let progress = bench.guest.device.lock().unwrap().process_queue(RX);
    assert_eq!(progress.unwrap(), Progress::default());
}

#[test]
fn a_flood_of_nothing_ends_the_turn_and_not_the_work() {
    let bench = bench(0);
    for _ in 0..Budget::SLICE.chains + 10 {
        bench.wire.bring(frame(&[]));
    }
    let progress = bench.guest.device.lock().unwrap().process_queue(RX);
    assert!(progress.unwrap().more);
    assert_eq!(bench.wire.state().coming.len(), 10);
}

#[test]
fn buffers_of_single_bytes_end_the_turn_in_the_middle_of_a_frame() {
    const INDIRECT: u16 = 4;
    let mut bench = bench(MERGEABLE);
    for part in 0..256_u64 {
        let at = DATA + 16 * part;
        bench.guest.poke(at, &(0x5000 + part).to_le_bytes());
        bench.guest.poke(at + 8, &1_u32.to_le_bytes());
        let flags = if part < 255 { WRITE | NEXT } else { WRITE };
        bench.guest.poke(at + 12, &flags.to_le_bytes());
        let next = u16::try_from(part + 1).unwrap();
        bench.guest.poke(at + 14, &next.to_le_bytes());
    }
    for _ in 0..16 {
        bench.offer(RX, &[(DATA, 4096, INDIRECT)]);
    }
    for _ in 0..2 {
        bench.wire.bring(frame(&[1; 2048 - HEADER_BYTES]));
    }
    let turn = |bench: &Bench| {
        let progress = bench.guest.device.lock().unwrap().process_queue(RX);
        (progress.unwrap().more, bench.used(RX).len())
    };
    // 8192 times 512 bytes: both frames' parts followed, and all filled but a few.
    assert_eq!(turn(&bench), (true, 8));
    assert_eq!(turn(&bench), (false, 16));
}
