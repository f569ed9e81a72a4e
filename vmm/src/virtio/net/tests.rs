use super::*;
use crate::config::{RateLimiterConfig, TokenBucketConfig};
use crate::events::EventLoop;
use crate::virtio::fuzzing::{self, AVAIL, DESCRIPTORS, Guest, QUEUE_STRIDE, USED, Wire};
use crate::virtio::{Budget, Doorbells, Unbounded};
use proptest::prelude::*;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const DATA: u64 = 0x4000;
const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;

struct Bench {
    guest: Guest<Net<Wire>>,
    wire: Wire,
    /// By queue, chains and their descriptors so far.
    offered: [u16; 2],
    descriptors: [u16; 2],
}

fn bench(features: u64) -> Bench {
    bench_with(features, Arc::new(Unbounded), |_| ())
}

fn bench_with(
    features: u64,
    allowance: Arc<dyn Allowance>,
    change: impl FnOnce(&mut NetworkInterface),
) -> Bench {
    let mut config = NetworkInterface::new("eth0", "tap0");
    change(&mut config);
    let wire = Wire::new();
    let net = Net::new(wire.clone(), &config, allowance.clone()).unwrap();
    let mut guest = Guest::with(net, allowance);
    guest.set_up(features);
    Bench {
        guest,
        wire,
        offered: [0; 2],
        descriptors: [0; 2],
    }
}

impl Bench {
    /// Makes a chain of (address, length, flags) available in `queue`, of the next descriptors.
    fn offer(&mut self, queue: usize, chain: &[(u64, u32, u16)]) {
        let stride = QUEUE_STRIDE * queue as u64;
        let head = self.descriptors[queue];
        for (index, &(address, length, flags)) in (head..).zip(chain) {
            let at = DESCRIPTORS + stride + 16 * u64::from(index);
            self.guest.poke(at, &address.to_le_bytes());
            self.guest.poke(at + 8, &length.to_le_bytes());
            self.guest.poke(at + 12, &flags.to_le_bytes());
            self.guest.poke(at + 14, &(index + 1).to_le_bytes());
        }
        let entry = AVAIL + stride + 4 + 2 * u64::from(self.offered[queue]);
        self.guest.poke(entry, &head.to_le_bytes());
        self.offered[queue] += 1;
        self.descriptors[queue] += u16::try_from(chain.len()).unwrap();
        let index = self.offered[queue];
        self.guest.poke(AVAIL + stride + 2, &index.to_le_bytes());
    }

    /// A driver that begins anew, with empty rings.
    fn start_over(&mut self, features: u64) {
        for stride in [0, QUEUE_STRIDE] {
            self.guest.poke(AVAIL + stride, &[0; 4]);
            self.guest.poke(USED + stride, &[0; 4]);
        }
        self.guest.set_up(features);
        self.offered = [0; 2];
        self.descriptors = [0; 2];
    }

    /// What came back in `queue`, as (head, bytes).
    fn used(&self, queue: usize) -> Vec<(u32, u32)> {
        let ring = USED + QUEUE_STRIDE * queue as u64;
        let read = |address| self.guest.memory.read_obj(GuestAddress(address)).unwrap();
        let count: u16 = self.guest.memory.read_obj(GuestAddress(ring + 2)).unwrap();
        (0..u64::from(count))
            .map(|index| (read(ring + 4 + 8 * index), read(ring + 8 + 8 * index)))
            .collect()
    }

    fn bytes(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        let at = GuestAddress(address);
        self.guest.memory.read_slice(&mut bytes, at).unwrap();
        bytes
    }
}

/// A frame with a header of zeros.
fn frame(payload: &[u8]) -> Vec<u8> {
    [&[0; HEADER_BYTES][..], payload].concat()
}

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

#[test]
fn the_configuration_space_has_what_is_configured_and_features_say_so() {
    let configured = bench_with(0, Arc::new(Unbounded), |config| {
        config.guest_mac = "06:00:ac:10:00:02".parse().ok();
        config.mtu = Some(1400);
    });
    let mut space = [0xee; 16];
    let device = configured.guest.device.lock().unwrap();
    device.read_config(0, &mut space);
    assert_eq!(space[..6], [6, 0, 0xac, 0x10, 0, 2]);
    assert_eq!(space[6..], [0, 0, 0, 0, 0x78, 5, 0, 0, 0, 0]);
    let wanted = 1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_MTU;
    assert_eq!(device.features() & wanted, wanted);
    let plain = bench(0);
    assert_eq!(plain.guest.device.lock().unwrap().features() & wanted, 0);
}

const CSUM: u64 = 1 << VIRTIO_NET_F_GUEST_CSUM;
const TSO: u64 = 1 << VIRTIO_NET_F_GUEST_TSO4;

#[test]
fn the_link_leaves_to_the_driver_what_it_took_and_no_more() {
    let with_both = bench(CSUM | TSO);
    assert_eq!(with_both.wire.state().offload, TUN_F_CSUM | TUN_F_TSO4);
    let mut without = bench(TSO);
    assert_eq!(without.wire.state().offload, 0);
    without.guest.set_up(CSUM);
    assert_eq!(without.wire.state().offload, TUN_F_CSUM);
}

#[test]
fn drivers_that_want_the_same_leave_the_link_alone() {
    let mut bench = bench(CSUM);
    for _ in 0..1000 {
        bench.guest.set_up(CSUM);
    }
    assert_eq!(bench.wire.state().offload_changes, 1);
}

#[test]
fn a_guest_that_changes_its_offloads_all_the_time_loses_its_interface() {
    let mut bench = bench(0);
    for _ in 0..OFFLOAD_CHANGES_MAX {
        bench.guest.set_up(CSUM);
        bench.guest.set_up(0);
    }
    assert_eq!(bench.wire.state().offload_changes, OFFLOAD_CHANGES_MAX);
    bench.guest.set_up(CSUM);
    bench.offer(TX, &[(DATA, 64, 0)]);
    bench.guest.worker.serve(TX);
    assert!(bench.used(TX).is_empty());
    // As it was when the changes ran out it still works.
    bench.guest.set_up(0);
    bench.guest.worker.serve(TX);
    assert_eq!(bench.used(TX).len(), 1);
}

#[test]
fn frames_for_a_driver_with_other_offloads_do_not_reach_the_next_one() {
    let mut bench = bench(CSUM);
    bench.wire.bring(frame(&[1; 20]));
    bench.guest.set_up(0);
    bench.wire.bring(frame(&[2; 20]));
    bench.offer(RX, &[(DATA, 64, WRITE)]);
    bench.guest.worker.serve(RX);
    assert_eq!(bench.bytes(DATA + 12, 20), [2; 20]);
}

#[test]
fn a_driver_that_resets_under_load_leaves_no_reference_to_its_memory() {
    let mut bench = bench(MERGEABLE);
    for _ in 0..1000 {
        bench.start_over(MERGEABLE);
        bench.offer(RX, &[(DATA, 30, WRITE)]);
        bench.offer(TX, &[(DATA, 64, 0)]);
        bench.wire.bring(frame(&[1; 52]));
        bench.guest.worker.serve(RX);
        bench.guest.worker.serve(TX);
        bench
            .guest
            .write(virtio_bindings::virtio_mmio::VIRTIO_MMIO_STATUS, 0);
        assert_eq!(Arc::strong_count(&bench.guest.memory), 2);
    }
}

#[test]
fn seeds_of_the_fuzz_target_are_no_findings() {
    for seed in crate::fuzz_seeds::of("virtio_network_frames") {
        fuzzing::network_frames(&seed);
    }
}

proptest! {
    #[test]
    fn random_rings_never_panic(input in prop::collection::vec(any::<u8>(), 0..512)) {
        fuzzing::network_frames(&input);
    }

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
