//! Chains of descriptors, of all kinds that a driver may make.

use proptest::prelude::*;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};

use super::*;
use crate::virtio::fuzzing::{HIGH_START, LOW_BYTES};

#[test]
fn a_request_may_be_cut_into_descriptors_anywhere() {
    let mut bench = bench();
    bench.header(VIRTIO_BLK_T_IN, 1);
    // Header in two pieces, the last data byte together with the status.
    bench.submit(&[
        (HEADER, 3, 0),
        (HEADER + 3, 13, 0),
        (DATA, 100, WRITE),
        (HIGH_START, 413, WRITE),
    ]);
    assert_eq!(bench.peek(DATA, 100), [2; 100]);
    assert_eq!(
        bench.peek(HIGH_START, 413),
        [vec![2; 412], vec![OK]].concat()
    );
    // Header and data in one piece.
    bench.header(VIRTIO_BLK_T_OUT, 0);
    bench.submit(&[(HEADER, 16 + 512, 0), (STATUS, 1, WRITE)]);
    assert_eq!(bench.peek(STATUS, 1), [OK]);
    assert_eq!(bench.contents()[..512], [0; 512]);
}

#[test]
fn an_indirect_table_is_followed_once() {
    let mut bench = bench();
    bench.header(VIRTIO_BLK_T_FLUSH, 0);
    let table = 0x6000_u64;
    bench.guest.poke(table, &HEADER.to_le_bytes());
    bench.guest.poke(table + 8, &[16, 0, 0, 0, 1, 0, 1, 0]);
    bench.guest.poke(table + 16, &STATUS.to_le_bytes());
    bench.guest.poke(table + 24, &[1, 0, 0, 0, 2, 0, 0, 0]);
    bench.submit(&[(table, 32, 4)]);
    assert_eq!(bench.peek(STATUS, 1), [OK]);
    // A table in a table is no request.
    bench.guest.poke(STATUS, &[UNTOUCHED]);
    bench.guest.poke(table + 28, &[4]);
    bench.submit(&[(table, 32, 4)]);
    assert_eq!(bench.peek(STATUS, 1), [UNTOUCHED]);
    assert_eq!(bench.used(), (2, 0));
}

#[test]
fn buffers_outside_of_memory_are_an_i_o_error() {
    let mut bench = bench();
    let end_of_low = LOW_BYTES as u64 - 256;
    for address in [end_of_low, 0x9000, 0xffff_ffff_0000] {
        bench.header(VIRTIO_BLK_T_IN, 0);
        bench.submit(&[(HEADER, 16, 0), (address, 512, WRITE), (STATUS, 1, WRITE)]);
        assert_eq!(bench.peek(STATUS, 1), [IOERR], "{address:#x}");
    }
}

#[test]
fn chains_that_are_no_request_go_back_with_nothing_written() {
    let mut bench = bench();
    bench.header(VIRTIO_BLK_T_IN, 0);
    let header = (HEADER, 16, 0);
    let broken: [&[(u64, u32, u16)]; 7] = [
        // No status byte, no header, a short one, one that is not memory.
        &[header],
        &[(STATUS, 1, WRITE)],
        &[(HEADER, 15, 0), (STATUS, 1, WRITE)],
        &[(0x9000, 16, 0), (STATUS, 1, WRITE)],
        // Status not in memory, readable after writable, a buffer that wraps around.
        &[header, (0x9000, 1, WRITE)],
        &[(DATA, 512, WRITE), header],
        &[header, (u64::MAX, 512, WRITE), (STATUS, 1, WRITE)],
    ];
    for (count, chain) in (1..).zip(broken) {
        bench.submit(chain);
        assert_eq!(bench.used(), (count, 0), "{chain:x?}");
        assert_eq!(bench.peek(STATUS, 1), [UNTOUCHED]);
    }
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 0, 512, WRITE), OK);
}

#[test]
fn chains_without_an_end_are_no_request() {
    let mut bench = bench();
    // The third descriptor links to itself, past the table, and to one that cannot be followed.
    for (count, next) in (1..).zip([2_u16, 16, u16::MAX, 3]) {
        bench.header(VIRTIO_BLK_T_IN, 0);
        let status = (STATUS, 1, WRITE | NEXT);
        bench.link(&[(HEADER, 16, 0), (DATA, 512, WRITE), status]);
        bench
            .guest
            .poke(DESCRIPTORS + 2 * 16 + 14, &next.to_le_bytes());
        // A table of indirect descriptors with half a descriptor in it.
        bench
            .guest
            .poke(DESCRIPTORS + 3 * 16 + 8, &[24, 0, 0, 0, 4]);
        bench.ring();
        assert_eq!(bench.used(), (count, 0), "link to {next}");
        assert_eq!(bench.peek(STATUS, 1), [UNTOUCHED]);
    }
}

/// Descriptors of which a good part makes sense.
fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let address = prop_oneof![
        4 => 0x4000..0x8000_u64,
        2 => HIGH_START..HIGH_START + 0x8000,
        1 => 0x8000..HIGH_START,
        1 => any::<u64>(),
    ];
    let length = prop_oneof![Just(16), Just(512), Just(1), 0..2048_u32, any::<u32>()];
    let flags = prop_oneof![8 => 0..4_u16, 1 => Just(4)];
    (address, length, flags, 0..20_u16)
}

fn is_memory(address: u64) -> bool {
    (0x4000..0x8000).contains(&address) || (HIGH_START..HIGH_START + 0x8000).contains(&address)
}

proptest! {
    /// Whatever the descriptors and headers say, the device writes to the used ring and to buffers
    /// marked as writable, and to nothing else: not to other memory, not past the end of the file.
    #[test]
    fn only_writable_buffers_and_the_used_ring_change(
        table in prop::collection::vec(descriptor(), 16),
        kinds in prop::collection::vec(0..6_u8, 64),
        is_read_only in any::<bool>(),
    ) {
        let mut bench = bench_with(|drive| drive.is_read_only = is_read_only);
        // Types and sectors are small numbers wherever a header may be.
        let pattern: Vec<u8> = kinds.iter().flat_map(|&kind| [kind, 0, 0, 0]).collect();
        for start in (0x4000..0x8000).chain(HIGH_START..HIGH_START + 0x8000).step_by(256) {
            bench.guest.poke(start, &pattern);
        }
        let before = (bench.peek(0x4000, 0x4000), bench.peek(HIGH_START, 0x8000));
        let mut writable = Vec::new();
        for (index, &(address, length, flags, next)) in (0_u16..).zip(&table) {
            let at = DESCRIPTORS + 16 * u64::from(index);
            bench.guest.poke(at, &address.to_le_bytes());
            bench.guest.poke(at + 8, &length.to_le_bytes());
            // An indirect table may make any memory writable: covered by the fuzz functions.
            let flags = flags & 3;
            bench.guest.poke(at + 12, &flags.to_le_bytes());
            bench.guest.poke(at + 14, &next.to_le_bytes());
            bench.guest.poke(AVAIL + 4 + 2 * u64::from(index), &index.to_le_bytes());
            if flags & WRITE != 0 {
                writable.push(address..address.saturating_add(u64::from(length)));
            }
        }
        bench.guest.poke(AVAIL + 2, &16_u16.to_le_bytes());
        while bench.used().0 < 16 {
            bench.guest.serve();
            prop_assert!(!bench.guest.interrupt.needs_reset());
        }
        let after = (bench.peek(0x4000, 0x4000), bench.peek(HIGH_START, 0x8000));
        let changed = |start: u64, before: &[u8], after: &[u8]| -> Vec<u64> {
            let pairs = (start..).zip(before.iter().zip(after));
            pairs.filter(|(_, (a, b))| a != b).map(|(address, _)| address).collect()
        };
        let low = changed(0x4000, &before.0, &after.0);
        for address in low.into_iter().chain(changed(HIGH_START, &before.1, &after.1)) {
            prop_assert!(is_memory(address));
            prop_assert!(writable.iter().any(|range| range.contains(&address)), "{address:#x}");
        }
        prop_assert_eq!(bench.contents().len() as u64, SECTORS * 512);
        if is_read_only {
            prop_assert_eq!(bench.contents(), std::fs::read(file().path()).unwrap());
        }
    }
}
