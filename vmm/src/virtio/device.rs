//! What the transport and the worker need to know of a device.

use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_queue::Queue;

use super::{Doorbells, GuestMemory, Interrupt, Progress, RingError};

/// A virtio device: a type, features, a configuration space and queues (virtio 1.2, section 2).
///
/// The transport owns the negotiation; a device sees its result in [`Device::activate`].
pub trait Device: Send {
    /// The device type of virtio 1.2, section 5.
    fn device_type(&self) -> u32;

    /// The feature bits offered. The transport adds `VIRTIO_F_VERSION_1`.
    fn features(&self) -> u64;

    /// The largest size of each queue in descriptors, powers of two of at most 32768. Its length is
    /// the number of queues.
    fn queue_max_sizes(&self) -> &[u16];

    /// Reads the configuration space at `offset` bytes; what lies outside of it reads as zero.
    fn read_config(&self, offset: u64, bytes: &mut [u8]);

    /// Writes the configuration space. Most devices have nothing to write there.
    fn write_config(&mut self, _offset: u64, _bytes: &[u8]) {}

    /// Takes what the driver set up. From here on [`Device::process_queue`] may be called.
    fn activate(&mut self, activation: Activation);

    /// Serves what the driver made available in queue `index`, as far as the device's budget goes.
    ///
    /// A device that is not active has nothing to serve: a late doorbell is no error.
    ///
    /// # Errors
    /// The ring itself is not usable. The worker then resets the device and tells the driver.
    fn process_queue(&mut self, index: usize) -> Result<Progress, RingError>;

    /// What has a queue served besides its doorbell: a timer of a rate limiter, packets that came.
    /// Asked for once, before a driver is there.
    fn wakers(&self) -> Vec<Waker> {
        Vec::new()
    }

    /// Goes back to the state before [`Device::activate`], letting go of queues and guest memory.
    fn reset(&mut self);

    /// Waits until nothing that was asked for before a reset is done to guest memory any more. For the
    /// vCPU that resets the device: taken with the device's lock held, called without.
    fn settle(&self) -> Option<Settle> {
        None
    }
}

/// A wait of a vCPU.
pub type Settle = Box<dyn FnOnce() + Send>;

/// A descriptor of a device's that has a queue served when it becomes readable.
///
/// It is watched edge-triggered: a device that can't take what is there (no buffers, no leave, a
/// limit) leaves it there, and is woken by what comes next, or by its doorbell, not again and again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waker {
    /// The descriptor, which stays open for as long as the device exists.
    pub fd: RawFd,
    /// The queue.
    pub queue: u32,
}

/// What a driver and the transport agreed on.
#[derive(Debug)]
pub struct Activation {
    /// The guest's memory, against which every queue was checked.
    pub memory: Arc<GuestMemory>,
    /// All queues in order; one the driver did not enable is not ready.
    pub queues: Vec<Queue>,
    /// The features both sides have.
    pub features: u64,
    /// For devices with something to say besides used buffers; the worker raises the interrupt for
    /// those.
    pub interrupt: Arc<Interrupt>,
    /// For devices that finish work later: `doorbells[queue]` has the worker serve the queue again.
    pub doorbells: Doorbells,
    /// Names the device in log messages.
    pub label: Arc<str>,
}

/// Locks a device. A panic under the lock is a bug of ours that a guest must not be able to spread
/// to its vCPU threads, and a device's state is replaced as a whole on reset, so a poisoned lock is
/// taken as it is.
pub(super) fn lock<D>(device: &Mutex<D>) -> MutexGuard<'_, D> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}
