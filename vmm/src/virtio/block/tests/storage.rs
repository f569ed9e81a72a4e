//! Requests whose storage does not answer.

use std::sync::Arc;

use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use virtio_bindings::virtio_mmio as register;

use super::super::Closing;
use super::{Bench, DATA, HEADER, OK, STATUS, UNTOUCHED, WRITE, bench};
use crate::virtio::fuzzing::HIGH_START;

/// A request of one sector that the storage does not answer, rung for once.
fn hung_request(bench: &mut Bench, kind: u32, data_flags: u16) -> Closing {
    let mut device = bench.guest.device.lock().unwrap();
    device.disk.forget_cache();
    let storage = device.closing();
    drop(device);
    storage.set_hung(true);
    bench.header(kind, 7);
    bench.link(&[(HEADER, 16, 0), (DATA, 512, data_flags), (STATUS, 1, WRITE)]);
    bench.make_available();
    bench.guest.worker.serve(0);
    storage
}

#[test]
fn a_request_that_waits_for_storage_keeps_neither_the_event_loop_nor_the_registers() {
    let mut bench = bench();
    let storage = hung_request(&mut bench, VIRTIO_BLK_T_IN, WRITE);
    bench.guest.worker.serve(0);
    assert_eq!(bench.used().0, 0);
    assert_eq!(bench.guest.read(register::VIRTIO_MMIO_CONFIG), 8);
    storage.set_hung(false);
    bench.guest.serve();
    assert_eq!((bench.peek(STATUS, 1), bench.used().0), (vec![OK], 1));
    assert_eq!(bench.peek(DATA, 512), [8; 512]);
}

#[test]
fn what_is_read_after_a_reset_goes_nowhere() {
    let mut bench = bench();
    bench.guest.poke(DATA, &[UNTOUCHED; 512]);
    let storage = hung_request(&mut bench, VIRTIO_BLK_T_IN, WRITE);
    bench.reset();
    storage.set_hung(false);
    storage.settle();
    bench.guest.serve();
    assert_eq!(bench.peek(DATA, 512), [UNTOUCHED; 512]);
    assert_eq!(
        (bench.peek(STATUS, 1), bench.used().0),
        (vec![UNTOUCHED], 0)
    );
}

#[test]
fn what_is_written_late_is_written_before_what_comes_after_a_reset() {
    let mut bench = bench();
    bench.guest.poke(DATA, &[0x5a; 512]);
    let storage = hung_request(&mut bench, VIRTIO_BLK_T_OUT, 0);
    bench.reset();
    bench.header(VIRTIO_BLK_T_IN, 7);
    bench.link(&[
        (HEADER, 16, 0),
        (HIGH_START, 512, WRITE),
        (STATUS, 1, WRITE),
    ]);
    bench.make_available();
    bench.guest.worker.serve(0);
    assert_eq!(bench.used().0, 0, "it waits for its turn");
    storage.set_hung(false);
    storage.settle();
    bench.guest.serve();
    assert_eq!((bench.peek(STATUS, 1), bench.used().0), (vec![OK], 1));
    assert_eq!(bench.peek(HIGH_START, 512), [0x5a; 512]);
}

#[test]
fn a_device_that_goes_while_its_storage_hangs_keeps_nobody() {
    let mut bench = bench();
    let storage = hung_request(&mut bench, VIRTIO_BLK_T_IN, WRITE);
    let memory = bench.guest.memory.clone();
    drop(bench);
    assert_eq!(Arc::strong_count(&memory), 1, "only this test has it");
    storage.set_hung(false);
}
