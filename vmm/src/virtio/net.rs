//! virtio-net over a tap device (virtio 1.2, section 5.1).
//!
//! Two queues: frames for the guest, and frames of the guest's. Checksums and segmentation are left
//! to whoever has the hardware for it: the guest and the host's kernel hand each other frames of up
//! to 64 KiB with the header of virtio-net, as the tap device has them.
//!
//! A frame goes through a buffer of ours, one for each direction. Rejected: `readv` and `writev` on
//! guest memory. What a frame takes of guest memory is known once it is at hand, and its guest may
//! have to wait for that. They would save one copy in a cache, for unsafe code over ranges that a
//! guest chose.
//!
//! Neither way needs a pin of the merge engine's. A processor copies frames, here and in the tap
//! device's `read` and `write`, through the page tables of this process. So a copy follows a page that
//! the engine replaces, and waits while it is protected. The device keeps no page of the guest's when
//! the call returns. What would need pins is a transfer by page frames: `MSG_ZEROCOPY` of vhost-net,
//! AF_XDP, RDMA.

mod receive;
mod send;
#[expect(unsafe_code, reason = "ioctls of a tap device")]
mod tap;

use std::fmt;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use linux_raw_sys::if_tun::{TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_UFO};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::Queue;

use self::receive::Receiver;
use self::send::Sender;
pub use self::tap::Tap;
use super::chain::CHAIN_LENGTH_MAX;
use super::leave::Leave;
use super::{
    Activation, Allowance, Device, GuestMemory, LogLimit, Progress, RingError, Throttle, Waker,
};
use crate::config::{NetworkInterface, NetworkPatch};

/// Bytes of `struct virtio_net_hdr_v1`, before each frame (5.1.6).
const HEADER_BYTES: usize = 12;
/// Most bytes of a frame: 64 KiB of IP packet less one, an Ethernet header with the tag of a VLAN, and
/// the header before it.
const FRAME_BYTES_MAX: usize = 65_535 + 18 + HEADER_BYTES;
const RX: usize = 0;
const TX: usize = 1;
/// How often drivers may change what the link leaves to them. Each change waits for a lock that all
/// network devices of the host share (`rtnl_lock`), and a guest could ask for it again and again. A
/// VM boots a few drivers in its life.
const OFFLOAD_CHANGES_MAX: u32 = 100;
/// Most frames for the driver before that are thrown away: a tap device keeps 1000, unless its operator
/// says otherwise.
const STALE_FRAMES_MAX: u32 = 4096;

/// What a frame goes to and comes from. Nothing of it waits.
pub trait Link: Send {
    /// Takes a frame, header first, and returns its bytes. What does not fit is lost.
    ///
    /// # Errors
    /// `WouldBlock` where there is none; what else the system says.
    fn receive(&mut self, frame: &mut [u8]) -> io::Result<usize>;
    /// Gives a frame, header first.
    ///
    /// # Errors
    /// What the system says; the frame is lost then.
    fn send(&mut self, frame: &[u8]) -> io::Result<()>;
    /// Says what may be left to the receiver of frames: `TUN_F_*`.
    ///
    /// # Errors
    /// What the system says.
    fn set_offload(&self, flags: u32) -> io::Result<()>;
    /// Becomes readable when a frame comes.
    fn fd(&self) -> RawFd;
}

/// A network device.
pub struct Net<L> {
    link: L,
    features: u64,
    config_space: [u8; 12],
    allowance: Arc<dyn Allowance>,
    receiver: Receiver,
    sender: Sender,
    active: Option<Active>,
    /// What the link leaves to the driver: `TUN_F_*`.
    offload: u32,
    offload_changes_left: u32,
    log_limit: LogLimit,
}

struct Active {
    memory: Arc<GuestMemory>,
    rx: Queue,
    tx: Queue,
    label: Arc<str>,
    /// A frame may go to several chains.
    is_mergeable: bool,
}

/// One queue, and what it is served with in a turn.
struct Side<'a, F> {
    queue: &'a mut Queue,
    memory: &'a GuestMemory,
    leave: Leave<'a>,
    complain: F,
}

impl<L> fmt::Debug for Net<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Net")
            .field("is_active", &self.active.is_some())
            .finish_non_exhaustive()
    }
}

impl<L: Link> Net<L> {
    /// A device at the guest's end of `link`, which leaves nothing to it yet, and that no driver has set
    /// up.
    ///
    /// # Errors
    /// No timer can be made for its limits.
    pub fn new(
        link: L,
        config: &NetworkInterface,
        allowance: Arc<dyn Allowance>,
    ) -> io::Result<Net<L>> {
        let mut features = [
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_GUEST_UFO,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_HOST_UFO,
            VIRTIO_NET_F_MRG_RXBUF,
        ]
        .iter()
        .fold(0, |features, bit| features | 1_u64 << bit);
        // mac, status, max_virtqueue_pairs, mtu (5.1.4)
        let mut config_space = [0; 12];
        if let Some(mac) = config.guest_mac {
            features |= 1 << VIRTIO_NET_F_MAC;
            config_space[..6].copy_from_slice(&mac.0);
        }
        if let Some(mtu) = config.mtu {
            features |= 1 << VIRTIO_NET_F_MTU;
            // A valid configuration has no larger one.
            let mtu = u16::try_from(mtu).unwrap_or(u16::MAX);
            config_space[10..].copy_from_slice(&mtu.to_le_bytes());
        }
        Ok(Net {
            link,
            features,
            config_space,
            allowance,
            receiver: Receiver::new(Throttle::new(config.rx_rate_limiter.as_ref())?),
            sender: Sender::new(Throttle::new(config.tx_rate_limiter.as_ref())?),
            active: None,
            offload: 0,
            offload_changes_left: OFFLOAD_CHANGES_MAX,
            log_limit: LogLimit::new(),
        })
    }

    /// Has the link leave `wanted` to the driver, or less. False if it may leave it more.
    ///
    /// A reset changes nothing of it: the next driver most often wants the same.
    fn set_offload(&mut self, wanted: u32, label: &str) -> bool {
        if wanted == self.offload {
            return true;
        }
        let Some(left) = self.offload_changes_left.checked_sub(1) else {
            let problem = "network interface without a driver: the guest changed its offloads \
                           too often";
            self.log_limit.warn(label, &problem);
            return false;
        };
        self.offload_changes_left = left;
        if let Err(error) = self.link.set_offload(wanted) {
            let problem = format!("tap device keeps its offloads: {error}");
            self.log_limit.warn(label, &problem);
            // It completes more frames itself than it has to.
            return self.offload & !wanted == 0;
        }
        self.offload = wanted;
        self.drop_stale_frames();
        true
    }

    /// Throws away what waits in the link: the driver before could take it, this one might not.
    fn drop_stale_frames(&mut self) {
        // The link drops what does not fit.
        let mut start = [0; HEADER_BYTES];
        for _ in 0..STALE_FRAMES_MAX {
            match self.link.receive(&mut start) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                _ => {}
            }
        }
    }
}

impl<L> Net<L> {
    /// The limits of what the guest receives and sends, to be changed while the device works.
    pub fn limits(&self) -> NetworkLimits {
        NetworkLimits {
            rx: self.receiver.throttle.clone(),
            tx: self.sender.throttle.clone(),
        }
    }
}

/// The limits of one network device.
#[derive(Debug, Clone)]
pub struct NetworkLimits {
    rx: Throttle,
    tx: Throttle,
}

impl NetworkLimits {
    /// Changes what `patch` has.
    pub fn update(&self, patch: &NetworkPatch) {
        if let Some(config) = &patch.rx_rate_limiter {
            self.rx.update(config);
        }
        if let Some(config) = &patch.tx_rate_limiter {
            self.tx.update(config);
        }
    }
}

/// What the tap device may leave to a driver that took `features`.
fn offload(features: u64) -> u32 {
    [
        (VIRTIO_NET_F_GUEST_CSUM, TUN_F_CSUM),
        (VIRTIO_NET_F_GUEST_TSO4, TUN_F_TSO4),
        (VIRTIO_NET_F_GUEST_TSO6, TUN_F_TSO6),
        (VIRTIO_NET_F_GUEST_UFO, TUN_F_UFO),
    ]
    .into_iter()
    .filter(|(bit, _)| {
        features & (1 << VIRTIO_NET_F_GUEST_CSUM) != 0 && features & (1_u64 << bit) != 0
    })
    .fold(0, |flags, (_, flag)| flags | flag)
}

impl<L: Link> Device for Net<L> {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[CHAIN_LENGTH_MAX, CHAIN_LENGTH_MAX]
    }

    fn read_config(&self, offset: u64, bytes: &mut [u8]) {
        bytes.fill(0);
        let rest = usize::try_from(offset).ok();
        let rest = rest.and_then(|at| self.config_space.get(at..));
        for (byte, value) in bytes.iter_mut().zip(rest.unwrap_or_default()) {
            *byte = *value;
        }
    }

    fn activate(&mut self, activation: Activation) {
        let mut queues = activation.queues.into_iter();
        let (Some(rx), Some(tx)) = (queues.next(), queues.next()) else {
            return;
        };
        let features = activation.features;
        if !self.set_offload(offload(features), &activation.label) {
            return;
        }
        self.active = Some(Active {
            memory: activation.memory,
            rx,
            tx,
            label: activation.label,
            is_mergeable: features & (1 << VIRTIO_NET_F_MRG_RXBUF) != 0,
        });
    }

    fn process_queue(&mut self, index: usize) -> Result<Progress, RingError> {
        let Some(active) = self.active.as_mut() else {
            return Ok(Progress::default());
        };
        let log_limit = &mut self.log_limit;
        let label = &active.label;
        let queue = match index {
            RX => &mut active.rx,
            TX => &mut active.tx,
            _ => return Ok(Progress::default()),
        };
        let mut side = Side {
            queue,
            memory: &active.memory,
            leave: Leave::new(&*self.allowance),
            complain: |problem: &dyn fmt::Display| log_limit.warn(label, problem),
        };
        match index {
            RX => self
                .receiver
                .serve(&mut self.link, &mut side, active.is_mergeable),
            _ => self.sender.serve(&mut self.link, side),
        }
    }

    fn wakers(&self) -> Vec<Waker> {
        [
            (self.link.fd(), 0),
            (self.receiver.throttle.waker(), 0),
            (self.sender.throttle.waker(), 1),
        ]
        .map(|(fd, queue)| Waker { fd, queue })
        .to_vec()
    }

    fn reset(&mut self) {
        self.active = None;
        self.receiver.forget();
        self.sender.forget();
    }
}

#[cfg(test)]
mod tests;
