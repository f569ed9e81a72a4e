//! Virtio devices: one transport, one queue worker, one file a device.
//!
//! A device here is registers and queues. Only a drive has a thread, while its storage is waited
//! for; all balloons of a monitor have one together. A vCPU that touches the device's register page
//! runs [`Transport`]; a vCPU that rings a queue's doorbell only bumps an eventfd
//! (KVM's ioeventfd), and the monitor's event loop runs [`QueueWorker`], which asks the [`Device`]
//! to serve that queue. Interrupts go back by an eventfd too (irqfd).
//!
//! Guarantees:
//! - A guest may break only itself. Registers, rings, descriptors and request headers are checked
//!   where they enter; what does not pass is refused, or the device asks for a reset. Nothing a
//!   guest writes makes this module panic, touch memory that is not the guest's, reach past the end
//!   of a disk, or fill the log.
//! - One guest does not starve another. All devices of a monitor share one event loop, so a device
//!   serves a bounded slice of work and then goes to the back of the loop's queue ([`Budget`]).
//! - A guest takes no memory past its host's limit by its devices: they ask for leave before they
//!   fill a page ([`Allowance`]), and a request waits half done where there is none.
//! - Guest memory is let go. [`Transport`] and an activated device hold a reference; a reset drops
//!   the device's, dropping the [`Attachment`]'s parts drops all.
//!
//! | module | what it holds |
//! |---|---|
//! | `allowance` | leave to take memory, asked for before a device touches the guest's |
//! | `attach` | where a device sits (addresses, interrupt) and the parts the monitor plugs in |
//! | `device` | the [`Device`] trait |
//! | `transport` | the virtio-mmio register file |
//! | `status` | the device status state machine |
//! | `queue_registers` | what the driver says of a queue, checked into a queue |
//! | `interrupt` | the interrupt status register and the irqfd |
//! | `ring` | serving a queue within a budget |
//! | `worker` | doorbell to device |
//! | `chain` | a descriptor chain as buffers to read and buffers to fill |
//! | `segments` | buffers as a list of ranges |
//! | `leave` | leave for the pages that a turn touches, each asked for once |
//! | `log_limit` | a bound on what a guest can make us log |
//! | `throttle` | a rate limiter with a timer that rings for the queue |
//! | `block` | virtio-block over a raw file |
//! | `net` | virtio-net over a tap device |
//! | `entropy` | virtio-entropy from the host's kernel |
//! | `balloon` | virtio-balloon: memory that guests give back, asked or not |
//! | `vsock` | virtio-vsock over unix sockets |
//!
//! # Locks
//! Two per device, in this order: the registers' mutex, which only vCPU threads take (the bus
//! does), then the device's, which they take to configure or reset the device and which the event
//! loop takes to serve a queue. The interrupt status is atomic and outside of both, so that the
//! event loop never waits for a vCPU and a guest's interrupt handler never for disk I/O. A rate
//! limiter has one of its own, a leaf under the device's, which whoever changes the limit takes alone. A
//! balloon has such leaves too: its handle's, and one for each lane, held while pages are named and
//! never while they are given up.

mod allowance;
mod attach;
mod balloon;
mod block;
mod chain;
mod device;
mod entropy;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod interrupt;
mod leave;
mod log_limit;
mod net;
mod queue_registers;
mod ring;
mod segments;
mod status;
mod throttle;
mod transport;
mod vsock;
mod worker;

pub use allowance::{Allowance, Doorbells, Unbounded};
pub use attach::{Attachment, Doorbell, Slot, SlotError, attach, attach_block};
pub use balloon::{
    Balloon, BalloonCounts, BalloonHandle, BalloonStatistics, Discard, DiscardThread, Discards,
};
pub use block::{Block, Closing, Disk, DiskError};
pub use device::{Activation, Device, Settle, Waker};
pub use entropy::Entropy;
pub use interrupt::Interrupt;
pub use log_limit::LogLimit;
pub use net::{Link, Net, NetworkLimits, Tap};
pub use ring::{Budget, Progress, RingError, Served};
pub use throttle::Throttle;
pub use transport::Transport;
pub use vsock::{Vsock, VsockCounts, VsockHost, VsockSocket};
pub use worker::QueueWorker;

pub use crate::memory::GuestMemory;
