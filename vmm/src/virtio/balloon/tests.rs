use super::request::PFNS_MAX;
use super::*;
use crate::config::BalloonPatch;
use crate::events::EventLoop;
use crate::virtio::Unbounded;
use crate::virtio::fuzzing::{self, AVAIL, DESCRIPTORS, Guest, HIGH_START, QUEUE_STRIDE, USED};
use proptest::prelude::*;
use std::ops::Range;
use std::sync::Mutex;
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const DATA: u64 = 0x4000;
const INFLATE: u64 = 0;
const DEFLATE: u64 = 1;
/// Where all features are taken.
const STATISTICS: u64 = 2;
const REPORT: u64 = 3;

/// Notes what is given up, and refuses if it is to.
#[derive(Debug, Default)]
struct Noted {
    given: Mutex<Vec<(u32, u32)>>,
    refuses: bool,
}

impl Noted {
    /// First pages, and pages after the last.
    fn given(&self) -> Vec<(u32, u32)> {
        self.given.lock().unwrap().clone()
    }
}

impl Discard for Noted {
    fn discard(&self, pages: Range<u32>) -> Result<u32, dedup::AccessError> {
        if self.refuses {
            return Err(dedup::AccessError::Exiting);
        }
        self.given.lock().unwrap().push((pages.start, pages.end));
        Ok(pages.end - pages.start)
    }
}

const FULL: BalloonConfig = BalloonConfig {
    amount_mib: 3,
    deflate_on_oom: true,
    stats_polling_interval_s: 3600,
    free_page_hinting: false,
    free_page_reporting: Some(true),
};

struct Bench {
    guest: Guest<Balloon>,
    noted: Arc<Noted>,
    counts: Arc<BalloonCounts>,
    handle: BalloonHandle,
}

fn bench_of(config: &BalloonConfig, noted: Noted) -> Bench {
    let (noted, counts) = (Arc::new(noted), Arc::<BalloonCounts>::default());
    let discard: Arc<dyn Discard> = noted.clone();
    let balloon = Balloon::new(config, &discard, &Discards::at_once(), counts.clone()).unwrap();
    let features = balloon.features();
    let handle = balloon.handle();
    let mut guest = Guest::with(balloon, Arc::new(Unbounded));
    guest.set_up(features);
    Bench {
        guest,
        noted,
        counts,
        handle,
    }
}

fn bench() -> Bench {
    bench_of(&FULL, Noted::default())
}

impl Bench {
    /// Makes the chain of (address, length, flags) available in `queue`, as its number `count` from 1.
    fn offer(&mut self, queue: u64, count: u16, chain: &[(u64, u32, u16)]) {
        let stride = QUEUE_STRIDE * queue;
        for (index, &(address, length, flags)) in (0_u16..).zip(chain) {
            let at = DESCRIPTORS + stride + 16 * u64::from(index);
            self.guest.poke(at, &address.to_le_bytes());
            self.guest.poke(at + 8, &length.to_le_bytes());
            self.guest.poke(at + 12, &flags.to_le_bytes());
            self.guest.poke(at + 14, &(index + 1).to_le_bytes());
        }
        let entry = AVAIL + stride + 4 + 2 * u64::from(count - 1);
        self.guest.poke(entry, &0_u16.to_le_bytes());
        self.guest.poke(AVAIL + stride + 2, &count.to_le_bytes());
        self.serve(queue);
    }

    /// As often as it takes: what is given up at once is told of in the next turn.
    fn serve(&mut self, queue: u64) {
        for _ in 0..2 {
            self.guest.worker.serve(usize::try_from(queue).unwrap());
        }
    }

    /// Names page frames to the inflate queue.
    fn inflate(&mut self, count: u16, pfns: &[u32]) {
        let bytes: Vec<u8> = pfns.iter().flat_map(|pfn| pfn.to_le_bytes()).collect();
        self.guest.poke(DATA, &bytes);
        let length = u32::try_from(bytes.len()).unwrap();
        self.offer(INFLATE, count, &[(DATA, length, 0)]);
    }

    fn used(&self, queue: u64) -> u16 {
        let index = GuestAddress(USED + QUEUE_STRIDE * queue + 2);
        self.guest.memory.read_obj(index).unwrap()
    }

    /// A counter, by Firecracker's name; all are taken.
    fn counted(&self, name: &str) -> u64 {
        let counts = self.counts.take();
        counts.iter().find(|(known, _)| *known == name).unwrap().1
    }
}

#[test]
fn pages_that_the_balloon_takes_are_given_up_in_runs_before_the_guest_is_told() {
    let mut bench = bench();
    bench.inflate(1, &[3, 0x11, 1, 2, 0x10, 1, 6]);
    // Behind the hole the mapping goes on where it stopped: frame 0x10 is page 8.
    assert_eq!(bench.noted.given(), [(1, 4), (6, 7), (8, 10)]);
    assert_eq!(bench.used(INFLATE), 1);
    assert_eq!(bench.guest.interrupt.status(), 1);
    assert_eq!(bench.counted("inflate_count"), 1);
}

#[test]
fn pages_that_are_no_ram_are_left_out_and_told_of() {
    let mut bench = bench();
    bench.inflate(1, &[8, 2, u32::MAX]);
    assert_eq!(bench.noted.given(), [(2, 3)]);
    assert_eq!(bench.used(INFLATE), 1);
    assert_eq!(bench.counted("event_fails"), 1);
    bench.inflate(2, &[0xf]);
    assert_eq!(bench.used(INFLATE), 2, "the driver gets its buffer back");
}

#[test]
fn a_request_that_is_no_list_of_page_frames_gives_nothing_up_and_comes_back() {
    let mut bench = bench();
    let too_long = 4 * u32::try_from(PFNS_MAX).unwrap() + 4;
    for (count, length) in (1..).zip([6, too_long, u32::MAX]) {
        bench.offer(INFLATE, count, &[(DATA, length, 0)]);
        assert_eq!(bench.used(INFLATE), count);
    }
    bench.offer(INFLATE, 4, &[(0x9000, 4, 0)]);
    // Numbers to be written by the device are none.
    bench.offer(INFLATE, 5, &[(DATA, 4, WRITE)]);
    assert_eq!(bench.used(INFLATE), 5);
    assert_eq!(bench.noted.given(), []);
    assert_eq!(bench.counted("event_fails"), 4);
}

#[test]
fn deflating_gives_nothing_up() {
    let mut bench = bench();
    bench.offer(DEFLATE, 1, &[(DATA, 4, 0)]);
    assert_eq!(bench.used(DEFLATE), 1);
    assert_eq!(bench.noted.given(), []);
    assert_eq!(bench.counted("deflate_count"), 1);
}

#[test]
fn reported_buffers_are_given_up_as_far_as_they_are_whole_pages_of_ram() {
    let mut bench = bench();
    let chain = [
        (HIGH_START, 0x2000, NEXT | WRITE),
        (0x4800, 0x2000, NEXT | WRITE),
        (0x7000, 0x8000, NEXT | WRITE),
        (0x3001, 0xfff, WRITE),
    ];
    bench.offer(REPORT, 1, &chain);
    assert_eq!(bench.noted.given(), [(5, 6), (7, 10)]);
    assert_eq!(bench.used(REPORT), 1);
    let counts = bench.counts.take();
    assert!(counts.contains(&("free_page_report_freed", 4 * 4096)));
    assert!(counts.contains(&("free_page_report_count", 1)));
    assert!(counts.contains(&("free_page_report_fails", 1)));
}

#[test]
fn what_cannot_be_given_up_is_told_of_and_the_guest_goes_on() {
    let refusing = Noted {
        refuses: true,
        ..Noted::default()
    };
    let mut bench = bench_of(&FULL, refusing);
    bench.offer(REPORT, 1, &[(DATA, 0x1000, WRITE)]);
    assert_eq!(bench.used(REPORT), 1);
    assert_eq!(bench.counted("free_page_report_fails"), 1);
}

#[test]
fn features_and_queues_are_those_that_were_asked_for() {
    let offered = |config: &BalloonConfig| {
        let bench = bench_of(config, Noted::default());
        let device = super::super::device::lock(&bench.guest.device);
        (device.features() & 0xff, device.queue_max_sizes().len())
    };
    assert_eq!(offered(&FULL), (0b10_0110, 4));
    assert_eq!(offered(&BalloonConfig::default()), (0, 2));
    let without_statistics = BalloonConfig {
        stats_polling_interval_s: 0,
        ..FULL
    };
    assert_eq!(offered(&without_statistics), (0b10_0100, 3));
}

#[test]
fn a_driver_that_takes_no_statistics_has_its_reports_in_the_queue_before() {
    let mut bench = bench();
    bench.guest.set_up(1 << F_PAGE_REPORTING);
    bench.offer(2, 1, &[(DATA, 0x1000, WRITE)]);
    assert_eq!(bench.noted.given(), [(4, 5)]);
    bench.guest.set_up(0);
    bench.offer(2, 1, &[(DATA, 0x1000, WRITE)]);
    assert_eq!(bench.noted.given().len(), 1, "it took no reporting");
}

#[test]
fn the_configuration_space_has_the_target_and_takes_the_actual_size() {
    let mut bench = bench();
    assert_eq!(bench.guest.read(0x100), 3 * 256);
    bench.handle.update(BalloonPatch::Amount(2));
    assert_eq!(bench.guest.read(0x100), 2 * 256);
    assert_eq!(bench.guest.interrupt.status(), 2, "it is told");
    bench.guest.write(0x104, 300);
    bench.guest.write(0x100, 7);
    assert_eq!(bench.guest.read(0x104), 300);
    let told = bench.handle.statistics();
    let pages = (told.target_pages, told.actual_pages);
    assert_eq!(pages, (512, 300));
    assert_eq!((told.target_mib, told.actual_mib), (2, 1));
    bench.guest.write(0x70, 0);
    assert_eq!(bench.guest.read(0x104), 0, "a reset empties it");
}

#[test]
fn statistics_are_kept_and_asked_for_again_when_they_are_due() {
    let mut bench = bench();
    let told = |value: u8| [4, 0, value, 0, 0, 0, 0, 0, 0, 0];
    bench.guest.poke(DATA, &told(7));
    bench.offer(STATISTICS, 1, &[(DATA, 10, 0)]);
    assert_eq!(bench.handle.statistics().guest["free_memory"], 7);
    bench.serve(STATISTICS);
    assert_eq!(bench.used(STATISTICS), 0, "its time has not come");
    bench.handle.update(BalloonPatch::Interval(3600));
    bench.serve(STATISTICS);
    assert_eq!(bench.used(STATISTICS), 1);
    bench.guest.poke(DATA, &told(8));
    bench.offer(STATISTICS, 2, &[(DATA, 10, 0)]);
    assert_eq!(bench.handle.statistics().guest["free_memory"], 8);
    assert_eq!(bench.used(STATISTICS), 1);
    assert_eq!(bench.counted("stats_updates_count"), 2);
}

#[test]
fn statistics_that_make_no_sense_leave_the_last_ones() {
    let mut bench = bench();
    bench
        .guest
        .poke(DATA, &[4, 0, 7, 0, 0, 0, 0, 0, 0, 0, 1, 1]);
    bench.offer(STATISTICS, 1, &[(DATA, 10, 0)]);
    for (count, length) in (2..).zip([12, u32::MAX]) {
        bench.handle.update(BalloonPatch::Interval(3600));
        bench.offer(STATISTICS, count, &[(DATA, length, 0)]);
        bench.serve(STATISTICS);
        assert_eq!(bench.used(STATISTICS), count - 1);
    }
    assert_eq!(bench.handle.statistics().guest["free_memory"], 7);
    assert_eq!(bench.counted("stats_update_fails"), 2);
}

#[test]
fn the_timer_asks_for_statistics() {
    let mut bench = bench();
    bench.offer(STATISTICS, 1, &[(DATA, 10, 0)]);
    let events = EventLoop::new().unwrap();
    let worker = Box::new(bench.guest.take_worker());
    let id = events
        .remote()
        .add(worker, Box::new(|text| panic!("{text}")));
    bench.handle.update(BalloonPatch::Interval(3600));
    let deadline = Instant::now() + Duration::from_secs(120);
    while bench.used(STATISTICS) == 0 {
        assert!(Instant::now() < deadline, "nobody asks");
        std::thread::yield_now();
    }
    events.remote().remove(vec![id.unwrap()]).unwrap();
}

#[test]
fn seeds_of_the_fuzz_target_are_no_findings() {
    for seed in crate::fuzz_seeds::of("virtio_balloon_requests") {
        fuzzing::balloon_requests(&seed);
    }
}

proptest! {
    #[test]
    fn random_rings_never_panic(input in prop::collection::vec(any::<u8>(), 0..512)) {
        fuzzing::balloon_requests(&input);
    }
}
