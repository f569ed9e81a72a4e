use super::*;
use crate::config::{RateLimiterConfig, TokenBucketConfig};
use crate::events::EventLoop;
use crate::virtio::Unbounded;
use crate::virtio::fuzzing::{self, AVAIL, DESCRIPTORS, Guest, HIGH_START, USED};
use proptest::prelude::*;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use vm_memory::GuestAddress;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const DATA: u64 = 0x4000;
const UNTOUCHED: [u8; 32] = [0xee; 32];

fn unlimited() -> Throttle {
    Throttle::new(None).unwrap()
}

fn guest_with(entropy: Entropy, allowance: Arc<dyn Allowance>) -> Guest<Entropy> {
    let mut guest = Guest::with(entropy, allowance);
    guest.set_up(0);
    for page in [DATA, HIGH_START] {
        guest.poke(page, &[0xee; 0x3000]);
    }
    guest
}

fn guest() -> Guest<Entropy> {
    let allowance = Arc::new(Unbounded);
    guest_with(Entropy::new(unlimited(), allowance.clone()), allowance)
}

/// Makes the chain of (address, length, flags) available as number `count`, counted from 1.
fn offer(guest: &mut Guest<Entropy>, count: u16, chain: &[(u64, u32, u16)]) {
    for (index, &(address, length, flags)) in (0_u16..).zip(chain) {
        let at = DESCRIPTORS + 16 * u64::from(index);
        guest.poke(at, &address.to_le_bytes());
        guest.poke(at + 8, &length.to_le_bytes());
        guest.poke(at + 12, &flags.to_le_bytes());
        guest.poke(at + 14, &(index + 1).to_le_bytes());
    }
    guest.poke(AVAIL + 4 + 2 * u64::from(count - 1), &0_u16.to_le_bytes());
    guest.poke(AVAIL + 2, &count.to_le_bytes());
}

/// How many chains came back, and how many bytes the last of them got.
fn used(guest: &Guest<Entropy>) -> (u16, u32) {
    let count: u16 = guest.memory.read_obj(GuestAddress(USED + 2)).unwrap();
    let last = USED + 4 + 8 * u64::from(count.max(1) - 1);
    let length: u32 = guest.memory.read_obj(GuestAddress(last + 4)).unwrap();
    (count, length)
}

fn bytes_at(guest: &Guest<Entropy>, address: u64) -> [u8; 32] {
    guest.memory.read_obj(GuestAddress(address)).unwrap()
}

#[test]
fn a_request_gets_random_bytes_in_all_its_buffers_and_no_others() {
    let mut guest = guest();
    let chain = [(DATA, 64, NEXT | WRITE), (HIGH_START, 64, WRITE)];
    offer(&mut guest, 1, &chain);
    guest.worker.serve(0);
    assert_eq!(used(&guest), (1, 128));
    let (first, second) = (bytes_at(&guest, DATA), bytes_at(&guest, HIGH_START));
    assert_ne!(first, UNTOUCHED);
    assert_ne!(second, UNTOUCHED);
    assert_ne!(first, second);
    assert_eq!(bytes_at(&guest, DATA + 64), UNTOUCHED);
    offer(&mut guest, 2, &chain);
    guest.worker.serve(0);
    assert_ne!(bytes_at(&guest, DATA), first);
    assert_eq!(guest.interrupt.status(), 1);
}

#[test]
fn the_configuration_space_is_empty_and_writes_to_it_are_nothing() {
    let mut guest = guest();
    guest.write(0x100, 42);
    assert_eq!(guest.read(0x100), 0);
    assert_eq!(guest.read(0x8), VIRTIO_ID_RNG);
}

#[test]
fn a_request_with_something_to_read_comes_back_empty() {
    let mut guest = guest();
    offer(&mut guest, 1, &[(DATA, 16, NEXT), (DATA, 64, WRITE)]);
    guest.worker.serve(0);
    assert_eq!(used(&guest), (1, 0));
    assert_eq!(bytes_at(&guest, DATA), UNTOUCHED);
}

#[test]
fn a_request_of_gigabytes_gets_no_more_than_64_kib_and_stops_at_the_end_of_memory() {
    let mut guest = guest();
    // Memory ends 0x4000 bytes behind.
    offer(&mut guest, 1, &[(DATA, u32::MAX, WRITE)]);
    guest.worker.serve(0);
    let (count, bytes) = used(&guest);
    assert_eq!(count, 1);
    assert!(u64::from(bytes) <= REQUEST_BYTES_MAX, "{bytes}");
    assert_ne!(bytes_at(&guest, DATA), UNTOUCHED);
}

#[test]
fn requests_of_buffers_of_a_byte_use_a_turn_up_by_the_calls_that_they_take() {
    let mut room = Segments::default();
    for address in DATA..DATA + u64::from(CHAIN_LENGTH_MAX) {
        room.push(GuestAddress(address), 1).unwrap();
    }
    let served = answer(&room, room.length_bytes());
    assert!(16 * served.cost_bytes >= Budget::SLICE.cost_bytes);
}

#[test]
fn a_host_without_random_bytes_gives_none_and_the_driver_its_buffer() {
    let allowance = Arc::new(Unbounded);
    let mut entropy = Entropy::new(unlimited(), allowance.clone());
    entropy.source = |_| Err(io::ErrorKind::WouldBlock.into());
    let mut guest = guest_with(entropy, allowance);
    offer(&mut guest, 1, &[(DATA, 64, WRITE)]);
    guest.worker.serve(0);
    assert_eq!(used(&guest), (1, 0));
    assert_eq!(bytes_at(&guest, DATA), UNTOUCHED);
}

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

    fn ring_later(&self, _doorbells: &crate::virtio::Doorbells, _queue: usize) {
        self.put_off.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn a_request_waits_half_done_for_memory_and_is_finished_once() {
    let purse = Arc::new(Purse::default());
    let entropy = Entropy::new(unlimited(), purse.clone());
    let mut guest = guest_with(entropy, purse.clone());
    let chain = [(DATA, 64, NEXT | WRITE), (HIGH_START, 64, WRITE)];
    offer(&mut guest, 1, &chain);
    guest.worker.serve(0);
    assert_eq!(
        (used(&guest).0, purse.put_off.load(Ordering::Relaxed)),
        (0, 1)
    );
    assert_eq!(bytes_at(&guest, DATA), UNTOUCHED);
    purse.bytes.store(4096, Ordering::Relaxed);
    guest.worker.serve(0);
    let first = bytes_at(&guest, DATA);
    assert_ne!(first, UNTOUCHED);
    assert_eq!(bytes_at(&guest, HIGH_START), UNTOUCHED);
    purse.bytes.store(4096, Ordering::Relaxed);
    guest.worker.serve(0);
    assert_eq!(used(&guest), (1, 128));
    assert_eq!(bytes_at(&guest, DATA), first);
    assert_ne!(bytes_at(&guest, HIGH_START), UNTOUCHED);
}

fn limited(size: u64, refill_time: u64) -> Throttle {
    let bucket = TokenBucketConfig {
        size,
        one_time_burst: None,
        refill_time,
    };
    let config = RateLimiterConfig {
        bandwidth: Some(bucket),
        ops: None,
    };
    Throttle::new(Some(&config)).unwrap()
}

#[test]
fn a_request_over_the_limit_waits_and_a_reset_gives_no_tokens_back() {
    let allowance = Arc::new(Unbounded);
    // Nothing is refilled while this test runs.
    let entropy = Entropy::new(limited(100, 1 << 40), allowance.clone());
    let mut guest = guest_with(entropy, allowance);
    offer(&mut guest, 1, &[(DATA, 64, WRITE)]);
    guest.worker.serve(0);
    offer(&mut guest, 2, &[(DATA, 64, WRITE)]);
    guest.worker.serve(0);
    guest.worker.serve(0);
    assert_eq!(used(&guest), (1, 64));
    guest.poke(AVAIL, &[0; 4]);
    guest.poke(USED, &[0; 4]);
    guest.set_up(0);
    offer(&mut guest, 1, &[(DATA, 64, WRITE)]);
    guest.worker.serve(0);
    assert_eq!(used(&guest).0, 0);
}

#[test]
fn a_limits_timer_has_the_event_loop_go_on_without_a_doorbell() {
    let allowance = Arc::new(Unbounded);
    let entropy = Entropy::new(limited(64, 5), allowance.clone());
    let mut guest = guest_with(entropy, allowance);
    let events = EventLoop::new().unwrap();
    for count in 1..=5 {
        offer(&mut guest, count, &[(DATA, 64, WRITE)]);
    }
    // Served at once, so that one request waits for its tokens and the others behind it.
    guest.worker.serve(0);
    let worker = guest.take_worker();
    let id = events
        .remote()
        .add(Box::new(worker), Box::new(|text| panic!("{text}")))
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(120);
    while used(&guest) != (5, 64) {
        assert!(Instant::now() < deadline, "{:?}", used(&guest));
        std::thread::yield_now();
    }
    events.remote().remove(vec![id]).unwrap();
}

#[test]
fn a_driver_that_resets_under_load_leaves_no_reference_to_its_memory() {
    let mut guest = guest();
    for _ in 0..1000 {
        guest.poke(AVAIL, &[0; 4]);
        guest.set_up(0);
        offer(&mut guest, 1, &[(DATA, 64, WRITE)]);
        guest.worker.serve(0);
        guest.write(virtio_bindings::virtio_mmio::VIRTIO_MMIO_STATUS, 0);
        assert_eq!(Arc::strong_count(&guest.memory), 2);
    }
}

#[test]
fn seeds_of_the_fuzz_target_are_no_findings() {
    for seed in crate::fuzz_seeds::of("virtio_entropy_requests") {
        fuzzing::entropy_requests(&seed);
    }
}

proptest! {
    #[test]
    fn random_rings_never_panic(input in prop::collection::vec(any::<u8>(), 0..1024)) {
        fuzzing::entropy_requests(&input);
    }
}
