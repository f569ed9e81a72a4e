//! A network device on a link without a network.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::super::{Link, Net};
use super::{AVAIL, DESCRIPTORS, Guest, InTurn, QUEUE_SIZE, QUEUE_STRIDE, wide_descriptor};
use crate::config::{NetworkInterface, RateLimiterConfig, TokenBucketConfig};

/// A link whose other end is the test.
#[derive(Debug, Clone)]
pub(crate) struct Wire(Arc<Ends>);

#[derive(Debug)]
struct Ends {
    event: EventFd,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
pub(crate) struct State {
    /// Frames for the guest.
    pub(crate) coming: VecDeque<Vec<u8>>,
    /// Frames of the guest.
    pub(crate) sent: Vec<Vec<u8>>,
    /// What the other end was last told to leave to the guest.
    pub(crate) offload: u32,
    /// How often it was told.
    pub(crate) offload_changes: u32,
    /// How often it fails before it has a frame.
    pub(crate) failures: u32,
}

impl Wire {
    #[expect(clippy::expect_used, reason = "only in tests and fuzz targets")]
    pub(crate) fn new() -> Wire {
        Wire(Arc::new(Ends {
            event: EventFd::new(EFD_NONBLOCK).expect("eventfd"),
            state: Mutex::default(),
        }))
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends the guest a frame, header first.
    pub(crate) fn bring(&self, frame: Vec<u8>) {
        self.state().coming.push_back(frame);
        let _full = self.0.event.write(1);
    }
}

impl Link for Wire {
    fn receive(&mut self, frame: &mut [u8]) -> io::Result<usize> {
        let mut state = self.state();
        if let Some(left) = state.failures.checked_sub(1) {
            state.failures = left;
            return Err(io::Error::other("failing"));
        }
        let Some(coming) = state.coming.pop_front() else {
            return Err(io::ErrorKind::WouldBlock.into());
        };
        let length = coming.len().min(frame.len());
        frame[..length].copy_from_slice(&coming[..length]);
        Ok(length)
    }

    fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        self.state().sent.push(frame.to_vec());
        Ok(())
    }

    fn set_offload(&self, flags: u32) -> io::Result<()> {
        let mut state = self.state();
        state.offload = flags;
        state.offload_changes += 1;
        Ok(())
    }

    fn fd(&self) -> RawFd {
        self.0.event.as_raw_fd()
    }
}

/// Any chains at all in both queues of a network device, while frames come.
///
/// The first byte of `input` says: bit 0 sets limits, bit 1 takes `VIRTIO_RING_F_EVENT_IDX`, bit 2
/// takes `VIRTIO_NET_F_MRG_RXBUF`, the others when the device is refused memory. The second is the
/// length of the frames that come, in units of 100 bytes. The rest are the descriptors of both
/// queues, as those of `requests`.
#[expect(clippy::expect_used, reason = "only in tests and fuzz targets")]
pub fn network_frames(input: &[u8]) {
    let Some((&[options, length], table)) = input.split_first_chunk::<2>() else {
        return;
    };
    let bucket = TokenBucketConfig {
        size: 2000,
        one_time_burst: Some(10_000),
        refill_time: 1,
    };
    let limit = RateLimiterConfig {
        bandwidth: Some(bucket),
        ops: None,
    };
    let mut config = NetworkInterface::new("fuzz", "fuzz");
    config.mtu = Some(1500);
    config.rx_rate_limiter = Some(limit).filter(|_| options & 1 != 0);
    config.tx_rate_limiter = config.rx_rate_limiter;
    let (wire, allowance) = (Wire::new(), InTurn::new(options >> 3));
    let net = Net::new(wire.clone(), &config, allowance.clone()).expect("timers");
    let mut guest = Guest::with(net, allowance);
    let features = u64::from(options >> 1 & 1) << VIRTIO_RING_F_EVENT_IDX
        | u64::from(options >> 2 & 1) << VIRTIO_NET_F_MRG_RXBUF;
    guest.set_up(features);
    for stride in [0, QUEUE_STRIDE] {
        for (index, descriptor) in (0..QUEUE_SIZE).zip(table.as_chunks::<8>().0) {
            let place = u64::from(index);
            guest.poke(
                DESCRIPTORS + stride + 16 * place,
                &wide_descriptor(index, *descriptor),
            );
            guest.poke(AVAIL + stride + 4 + 2 * place, &index.to_le_bytes());
        }
    }
    for available in 1..=QUEUE_SIZE {
        wire.bring(vec![0xaa; 100 * usize::from(length)]);
        for (queue, stride) in [(0, 0), (1, QUEUE_STRIDE)] {
            guest.poke(AVAIL + stride + 2, &available.to_le_bytes());
            guest.worker.serve(queue);
        }
    }
    guest.set_up(features);
    guest.worker.serve(0);
    guest.worker.serve(1);
    let state = wire.state();
    assert!(state.sent.iter().all(|frame| frame.len() > 12), "no frame");
    assert_eq!(state.offload, 0, "nothing that the driver did not take");
}
