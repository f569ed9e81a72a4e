//! What each request does, and what the device says of itself.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use virtio_bindings::virtio_mmio as register;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, bitmap::Bitmap};

use super::super::*;
use super::*;

#[test]
fn the_guest_reads_what_the_file_holds() {
    let mut bench = bench();
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 2, 1024, WRITE), OK);
    assert_eq!(
        bench.peek(DATA, 1025),
        [vec![3; 512], vec![4; 512], vec![0]].concat()
    );
    assert_eq!(bench.used(), (1, 1025));
    assert_eq!(bench.guest.interrupt.event().read().unwrap(), 1);
}

#[test]
fn what_the_guest_writes_is_in_the_file() {
    let mut bench = bench();
    bench.guest.poke(DATA, &[0x5a; 512]);
    assert_eq!(bench.request(VIRTIO_BLK_T_OUT, 7, 512, 0), OK);
    assert_eq!(bench.contents()[7 * 512..], [0x5a; 512]);
    assert_eq!(bench.contents()[6 * 512..7 * 512], [7; 512]);
    assert_eq!(bench.used(), (1, 1));
    assert_eq!(bench.request(VIRTIO_BLK_T_FLUSH, 0, 0, 0), OK);
}

#[test]
fn pages_the_device_fills_are_marked_for_the_merge_engine() {
    let mut bench = bench();
    bench.request(VIRTIO_BLK_T_IN, 0, 512, WRITE);
    let region = bench.guest.memory.find_region(GuestAddress(DATA)).unwrap();
    let offset = usize::try_from(DATA).unwrap();
    assert!(region.bitmap().dirty_at(offset));
    assert!(!region.bitmap().dirty_at(offset + 0x1000));
}

#[test]
fn sectors_past_the_end_are_refused() {
    let mut bench = bench();
    let before = bench.contents();
    for (sector, length) in [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (u64::MAX, 512),
        (u64::MAX / 512, 512),
        (u64::MAX / 512 + 1, 512),
    ] {
        assert_eq!(bench.request(VIRTIO_BLK_T_IN, sector, length, WRITE), IOERR);
        assert_eq!(bench.request(VIRTIO_BLK_T_OUT, sector, length, 0), IOERR);
    }
    assert_eq!(bench.contents(), before);
}

#[test]
fn parts_of_sectors_and_huge_requests_are_refused() {
    let mut bench = bench();
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 0, 511, WRITE), IOERR);
    assert_eq!(bench.request(VIRTIO_BLK_T_OUT, 0, 513, 0), IOERR);
    let huge = u32::try_from(MAX_REQUEST_BYTES).unwrap() + 512;
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 0, huge, WRITE), IOERR);
}

#[test]
fn a_read_only_disk_says_so_and_refuses_writes() {
    let mut bench = bench_with(|drive| drive.is_read_only = true);
    let before = bench.contents();
    bench
        .guest
        .write(register::VIRTIO_MMIO_DEVICE_FEATURES_SEL, 0);
    let features = bench.guest.read(register::VIRTIO_MMIO_DEVICE_FEATURES);
    assert_ne!(features & 1 << VIRTIO_BLK_F_RO, 0);
    assert_eq!(bench.request(VIRTIO_BLK_T_OUT, 0, 512, 0), IOERR);
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 0, 512, WRITE), OK);
    assert_eq!(bench.request(VIRTIO_BLK_T_FLUSH, 0, 0, 0), OK);
    assert_eq!(bench.contents(), before);
}

#[test]
fn flush_is_offered_where_it_is_honoured() {
    for (cache, offered) in [(CacheType::Writeback, true), (CacheType::Unsafe, false)] {
        let mut bench = bench_with(|drive| drive.cache_type = cache);
        let features = bench.guest.read(register::VIRTIO_MMIO_DEVICE_FEATURES);
        assert_eq!(features & 1 << VIRTIO_BLK_F_FLUSH != 0, offered);
        assert_eq!(bench.request(VIRTIO_BLK_T_FLUSH, 0, 0, 0), OK);
    }
}

#[test]
fn the_serial_number_is_the_drive_id() {
    let mut bench = bench();
    assert_eq!(bench.request(VIRTIO_BLK_T_GET_ID, 0, 20, WRITE), OK);
    assert_eq!(bench.peek(DATA, 20), b"rootfs\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    let mut long = bench_with(|drive| drive.drive_id = "x".repeat(40));
    assert_eq!(long.request(VIRTIO_BLK_T_GET_ID, 0, 20, WRITE), OK);
    assert_eq!(long.peek(DATA, 21), [vec![b'x'; 20], vec![0]].concat());
}

#[test]
fn unknown_requests_are_unsupported() {
    let mut bench = bench();
    for kind in [2, 11, 13, u32::MAX] {
        assert_eq!(bench.request(kind, 0, 512, WRITE), UNSUPP);
    }
}

#[test]
fn a_file_cut_short_under_us_is_an_i_o_error() {
    let mut bench = bench();
    bench.file.as_file().set_len(512).unwrap();
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 4, 512, WRITE), IOERR);
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 0, 512, WRITE), OK);
}

#[test]
fn a_reset_device_lets_go_of_guest_memory_and_starts_again() {
    let mut bench = bench();
    let held = Arc::strong_count(&bench.guest.memory);
    bench.guest.write(register::VIRTIO_MMIO_STATUS, 0);
    assert_eq!(Arc::strong_count(&bench.guest.memory), held - 1);
    bench.guest.serve();
    bench.guest.poke(AVAIL, &[0; 64]);
    bench.guest.poke(USED, &[0; 256]);
    bench.next_avail = 0;
    bench.guest.set_up(1 << VIRTIO_RING_F_EVENT_IDX);
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 0, 512, WRITE), OK);
}

#[test]
fn the_configuration_space_holds_the_capacity() {
    let mut bench = bench();
    assert_eq!(bench.guest.read(register::VIRTIO_MMIO_CONFIG), 8);
    assert_eq!(bench.guest.read(register::VIRTIO_MMIO_CONFIG + 8), SIZE_MAX);
    assert_eq!(bench.guest.read(register::VIRTIO_MMIO_CONFIG + 12), SEG_MAX);
    assert_eq!(bench.guest.read(register::VIRTIO_MMIO_CONFIG + 16), 0);
    assert_eq!(bench.guest.read(register::VIRTIO_MMIO_CONFIG + 0xe00), 0);
}
