//! Requests that wait for memory.

use std::sync::Mutex;

use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN};

use super::*;
use crate::virtio::Doorbells;
use crate::virtio::fuzzing::HIGH_START;

/// Leave for so many bytes, as the test says.
#[derive(Debug, Default)]
struct Ration {
    left_bytes: Mutex<u64>,
    put_off: Mutex<u32>,
}

impl Allowance for Ration {
    fn is_open(&self) -> bool {
        true
    }

    fn take(&self, bytes: u64) -> bool {
        let mut left_bytes = self.left_bytes.lock().unwrap();
        let rest = left_bytes.checked_sub(bytes);
        *left_bytes = rest.unwrap_or(*left_bytes);
        rest.is_some()
    }

    fn page_bytes(&self) -> u64 {
        4096
    }

    fn ring_later(&self, _doorbells: &Doorbells, _queue: usize) {
        *self.put_off.lock().unwrap() += 1;
    }
}

#[test]
fn a_request_waits_half_done_for_memory_and_is_used_once_when_it_is_there() {
    let ration = Arc::new(Ration::default());
    let mut bench = allowed(|_| (), ration.clone());
    // The second buffer is on a page of its own.
    let (first, second) = (DATA + 0xe00, HIGH_START);
    for address in [first, second, STATUS] {
        bench.guest.poke(address, &[UNTOUCHED; 512]);
    }
    // For what is read, and for the first buffer.
    *ration.left_bytes.lock().unwrap() = 2 * 4096;
    bench.header(VIRTIO_BLK_T_IN, 2);
    let chain = [
        (HEADER, 16, 0),
        (first, 512, WRITE),
        (second, 512, WRITE),
        (STATUS, 1, WRITE),
    ];
    bench.submit(&chain);
    assert_eq!(bench.used().0, 0, "nothing is told of it yet");
    assert_eq!(bench.peek(first, 512), [3; 512]);
    assert_eq!(bench.peek(second, 512), [UNTOUCHED; 512]);
    assert_eq!(bench.peek(STATUS, 1), [UNTOUCHED]);
    assert_eq!(*ration.put_off.lock().unwrap(), 1);

    // Enough for the data, then for the status byte.
    for (left_bytes, used) in [(0, 0), (4096, 0), (4096, 1)] {
        *ration.left_bytes.lock().unwrap() = left_bytes;
        bench.guest.serve();
        assert_eq!(bench.used().0, used);
    }
    assert_eq!(bench.peek(second, 512), [4; 512]);
    assert_eq!(bench.peek(STATUS, 1), [OK]);
    assert_eq!(bench.used(), (1, 1025));
    assert_eq!(bench.guest.interrupt.event().read().unwrap(), 1);
}

#[test]
fn a_reset_lets_go_of_a_request_that_waits_for_memory() {
    let ration = Arc::new(Ration::default());
    let mut bench = allowed(|_| (), ration.clone());
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 2, 512, WRITE), UNTOUCHED);
    bench.reset();
    *ration.left_bytes.lock().unwrap() = u64::MAX;
    bench.guest.serve();
    assert_eq!(bench.used().0, 0, "it is forgotten");
    assert_eq!(bench.request(VIRTIO_BLK_T_IN, 2, 512, WRITE), OK);
    assert_eq!(bench.used().0, 1);
}

#[test]
fn a_name_is_written_as_far_as_there_is_memory_for_its_pages() {
    let ration = Arc::new(Ration::default());
    let mut bench = allowed(|_| (), ration.clone());
    *ration.left_bytes.lock().unwrap() = 4096;
    bench.header(VIRTIO_BLK_T_GET_ID, 0);
    let (first, second) = (DATA + 0xffc, HIGH_START);
    bench.submit(&[
        (HEADER, 16, 0),
        (first, 4, WRITE),
        (second, 16, WRITE),
        (STATUS, 1, WRITE),
    ]);
    assert_eq!(
        (bench.peek(first, 4), bench.used().0),
        (b"root".to_vec(), 0)
    );
    *ration.left_bytes.lock().unwrap() = 2 * 4096;
    bench.guest.serve();
    assert_eq!(&bench.peek(second, 3), b"fs\0");
    assert_eq!(bench.used(), (1, 21));
}
