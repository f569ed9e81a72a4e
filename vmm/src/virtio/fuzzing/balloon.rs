//! A guest with a balloon.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::super::{Balloon, Device, Discard, Discards};
use super::{
    AVAIL, DESCRIPTORS, Guest, HIGH_BYTES, HIGH_START, InTurn, LOW_BYTES, QUEUE_SIZE, QUEUE_STRIDE,
    wide_descriptor,
};
use crate::config::{BalloonConfig, BalloonPatch};

/// Pages of the guest.
const PAGES: usize = (LOW_BYTES + HIGH_BYTES) / 4096;

/// Gives up pages in turn, and only those that there are.
#[derive(Debug)]
struct Given(Arc<InTurn>);

impl Discard for Given {
    fn discard(&self, pages: Range<u32>) -> Result<u32, dedup::AccessError> {
        assert!(pages.start < pages.end, "{pages:?}: no page");
        assert!(pages.end as usize <= PAGES, "{pages:?}: not the guest's");
        match self.0.gives() {
            true => Ok(pages.end - pages.start),
            false => Err(io::Error::from(io::ErrorKind::OutOfMemory).into()),
        }
    }
}

/// Any chains at all in all queues of a balloon.
///
/// The first byte of `input` says: bit 0 takes `VIRTIO_RING_F_EVENT_IDX`, bit 1 has statistics, bit 2
/// has reporting, the others when nothing is given up. The next 128 bytes are the descriptors of each
/// queue, as those of `requests`; the rest is what lies in the buffers, two bytes a page frame number
/// or half a statistic.
#[expect(clippy::expect_used, reason = "only in tests and fuzz targets")]
pub fn balloon_requests(input: &[u8]) {
    let Some((&options, input)) = input.split_first() else {
        return;
    };
    let config = BalloonConfig {
        amount_mib: 1,
        stats_polling_interval_s: u16::from(options >> 1 & 1),
        free_page_reporting: Some(options >> 2 & 1 != 0),
        ..BalloonConfig::default()
    };
    let allowance = InTurn::new(options >> 3);
    let discard: Arc<dyn Discard> = Arc::new(Given(allowance.clone()));
    let balloon = Balloon::new(&config, &discard, &Discards::at_once(), Arc::default());
    let balloon = balloon.expect("timer");
    let event_idx = 1 << VIRTIO_RING_F_EVENT_IDX;
    let features = (balloon.features() & !event_idx) | (u64::from(options & 1) * event_idx);
    let (queues, handle) = (balloon.queue_max_sizes().len(), balloon.handle());
    let mut guest = Guest::with(balloon, allowance);
    guest.set_up(features);
    let (table, data) = input.split_at(input.len().min(8 * usize::from(QUEUE_SIZE)));
    for (index, &[low, high]) in (0_u64..).zip(data.as_chunks::<2>().0) {
        // Most often a frame number near those that there are.
        let far = if high < 0xf0 { 0 } else { low };
        for start in [0x4000, HIGH_START] {
            guest.poke(start + 4 * index, &[low, high & 1, 0, far]);
        }
    }
    for stride in (0..).map(|queue| QUEUE_STRIDE * queue).take(queues) {
        for (index, descriptor) in (0..QUEUE_SIZE).zip(table.as_chunks::<8>().0) {
            let place = u64::from(index);
            let wide = wide_descriptor(index, *descriptor);
            guest.poke(DESCRIPTORS + stride + 16 * place, &wide);
            guest.poke(AVAIL + stride + 4 + 2 * place, &index.to_le_bytes());
        }
    }
    for available in 1..=QUEUE_SIZE {
        handle.update(BalloonPatch::Interval(1));
        for queue in 0..queues {
            let stride = QUEUE_STRIDE * queue as u64;
            guest.poke(AVAIL + stride + 2, &available.to_le_bytes());
            guest.worker.serve(queue);
        }
    }
    guest.set_up(features);
    (0..queues).for_each(|queue| guest.worker.serve(queue));
    let told = handle.statistics();
    assert_eq!(told.actual_pages, 0, "the driver said nothing of it");
}
