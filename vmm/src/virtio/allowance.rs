//! What a device asks before it has the kernel give memory to its guest.

use std::fmt;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

/// The doorbells of a device, one for each queue.
pub type Doorbells = Arc<[EventFd]>;

/// Leave to serve queues and to touch guest memory, given by whoever keeps the VMs within their
/// memory.
///
/// A page that the guest never touched is taken from the host by the device that fills it. So a
/// device asks first, and where it may not it leaves its request as it is: nothing waits on the
/// event loop.
pub trait Allowance: fmt::Debug + Send + Sync {
    /// Whether queues may be served at all now.
    fn is_open(&self) -> bool;

    /// Takes `bytes` of what may be taken. False, and nothing is taken, if that is less.
    fn take(&self, bytes: u64) -> bool;

    /// What the kernel gives at a time when a page is touched: a power of two, a page at least.
    fn page_bytes(&self) -> u64;

    /// Rings `doorbells[queue]` once it makes sense to ask again.
    fn ring_later(&self, doorbells: &Doorbells, queue: usize);
}

/// Leave for everything, for guests whose memory nobody bounds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unbounded;

impl Allowance for Unbounded {
    fn is_open(&self) -> bool {
        true
    }

    fn take(&self, _bytes: u64) -> bool {
        true
    }

    fn page_bytes(&self) -> u64 {
        4096
    }

    fn ring_later(&self, doorbells: &Doorbells, queue: usize) {
        if let Some(doorbell) = doorbells.get(queue) {
            // A counter that is full rings as well.
            let _full = doorbell.write(1);
        }
    }
}
