//! virtio-vsock over unix sockets (virtio 1.2, section 5.10), with Firecracker's meaning of them.
//!
//! A guest and the host's programs have streams between them, without a network. A client on the host
//! connects to a unix socket and writes `CONNECT port`; a guest that connects to a port of the host's
//! reaches the unix socket with that port behind its name.
//!
//! Nothing waits. What the guest sends lies in a buffer of its connection until the host's side takes
//! it; the guest is told how much room there is, and one that sends more loses its connection. What
//! the host's side sends stays in its socket until the guest has room for it. Packets that are neither
//! take room too, the resets: when many of them wait for the guest, the guest's packets wait.
//!
//! All queues are served in one turn, whichever of them rang. So the device needs no order of doorbells
//! to go on after whatever stood still: leave that was refused, buffers that ran out, a guest that was
//! paused.
//!
//! Rejected: the crate `virtio-vsock`. It takes a packet's data from one descriptor; Linux sends the
//! data of a large packet in several. And it touches guest memory before anybody can ask for leave.

mod connection;
mod connections;
mod counts;
mod first_line;
mod host;
mod packet;
mod ports;
mod turn;

use std::fmt;
use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::Queue;

use self::connections::Connections;
pub use self::counts::VsockCounts;
pub use self::host::{VsockHost, VsockSocket};
use self::turn::{PACKET_BYTES_MAX, Transfer, Turn};
use super::chain::CHAIN_LENGTH_MAX;
use super::leave::Leave;
use super::{Activation, Allowance, Device, GuestMemory, LogLimit, Progress, RingError, Waker};

/// A vsock device.
pub struct Vsock<H> {
    connections: Connections<H>,
    allowance: Arc<dyn Allowance>,
    active: Option<Active>,
    /// A packet of the guest's, and one for it. Of zeros: pages that no packet was long enough for are
    /// never taken.
    outgoing: Vec<u8>,
    incoming: Vec<u8>,
    log_limit: LogLimit,
}

struct Active {
    memory: Arc<GuestMemory>,
    rx: Queue,
    tx: Queue,
    label: Arc<str>,
    /// A packet of the guest's that waits: for memory, or for resets to be taken.
    taken: Option<Transfer>,
    /// A chain for the guest, and how much of it the packet takes that is in hand: 0 if none is.
    room: Option<(Transfer, usize)>,
}

impl<H> fmt::Debug for Vsock<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vsock")
            .field("is_active", &self.active.is_some())
            .finish_non_exhaustive()
    }
}

impl<H: VsockHost> Vsock<H> {
    /// The device of the guest with address `guest_cid`, that no driver has set up.
    ///
    /// # Errors
    /// The host's end cannot be watched.
    pub fn new(
        host: H,
        guest_cid: u32,
        counts: Arc<VsockCounts>,
        allowance: Arc<dyn Allowance>,
    ) -> io::Result<Vsock<H>> {
        Ok(Vsock {
            connections: Connections::new(host, guest_cid, counts)?,
            allowance,
            active: None,
            outgoing: vec![0; PACKET_BYTES_MAX],
            incoming: vec![0; PACKET_BYTES_MAX],
            log_limit: LogLimit::new(),
        })
    }
}

impl<H: VsockHost> Device for Vsock<H> {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX
    }

    /// To the guest, from it, and events, of which there are none: connections outlive nothing.
    fn queue_max_sizes(&self) -> &[u16] {
        &[CHAIN_LENGTH_MAX; 3]
    }

    fn read_config(&self, offset: u64, bytes: &mut [u8]) {
        bytes.fill(0);
        let cid = self.connections.guest_cid().to_le_bytes();
        let rest = usize::try_from(offset).ok().and_then(|at| cid.get(at..));
        for (byte, value) in bytes.iter_mut().zip(rest.unwrap_or_default()) {
            *byte = *value;
        }
    }

    fn activate(&mut self, activation: Activation) {
        let mut queues = activation.queues.into_iter();
        let (Some(rx), Some(tx)) = (queues.next(), queues.next()) else {
            return;
        };
        self.active = Some(Active {
            memory: activation.memory,
            rx,
            tx,
            label: activation.label,
            taken: None,
            room: None,
        });
    }

    fn process_queue(&mut self, _index: usize) -> Result<Progress, RingError> {
        let Some(active) = self.active.as_mut() else {
            return Ok(Progress::default());
        };
        let (log_limit, label) = (&mut self.log_limit, &active.label);
        let mut turn = Turn {
            connections: &mut self.connections,
            memory: &active.memory,
            leave: Leave::new(&*self.allowance),
            complain: &mut |problem| log_limit.warn(label, problem),
            is_starved: false,
        };
        let host_has_more = turn.connections.poll(turn.complain);
        let sent = turn.send(&mut active.tx, &mut active.taken, &mut self.outgoing)?;
        let was_congested = active.taken.is_some() && turn.connections.is_congested();
        let received = turn.receive(&mut active.rx, &mut active.room, &mut self.incoming)?;
        Ok(Progress {
            interrupt: sent.interrupt || received.interrupt,
            more: host_has_more
                || sent.more
                || received.more
                || was_congested && !turn.connections.is_congested(),
            starved: turn.is_starved,
        })
    }

    fn wakers(&self) -> Vec<Waker> {
        let fd = self.connections.fd();
        vec![Waker { fd, queue: 0 }]
    }

    fn reset(&mut self) {
        self.active = None;
        self.connections.forget();
    }
}

#[cfg(test)]
mod tests;
