//! From device to driver: the interrupt status register and the eventfd KVM listens to.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// A device's interrupt line. All of it is atomic: raised on the event loop, read and acknowledged
/// on vCPU threads.
#[derive(Debug)]
pub struct Interrupt {
    status: AtomicU32,
    needs_reset: AtomicBool,
    config_generation: AtomicU32,
    event: EventFd,
}

impl Interrupt {
    /// A line that is low.
    ///
    /// # Errors
    /// No eventfd can be made.
    pub fn new() -> io::Result<Self> {
        Ok(Interrupt {
            status: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
            config_generation: AtomicU32::new(0),
            event: EventFd::new(EFD_NONBLOCK)?,
        })
    }

    /// The eventfd to register with KVM as this line's irqfd.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Buffers were used (virtio 1.2, 4.2.2, `InterruptStatus` bit 0).
    pub fn signal_used_buffers(&self) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }

    /// The configuration space changed (bit 1). The generation moves first, so that a driver that
    /// sees the interrupt reads the new one.
    pub fn signal_config_change(&self) {
        self.config_generation.fetch_add(1, Ordering::SeqCst);
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    /// The device cannot go on: sets `DEVICE_NEEDS_RESET` and says so (virtio 1.2, 2.1.2).
    pub fn signal_needs_reset(&self) {
        self.needs_reset.store(true, Ordering::SeqCst);
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    /// The `InterruptStatus` register.
    pub(super) fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// The `InterruptACK` register.
    pub(super) fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    pub(super) fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    pub(super) fn config_generation(&self) -> u32 {
        self.config_generation.load(Ordering::SeqCst)
    }

    /// Lowers the line for a device reset. The generation goes on: a driver compares it, its start
    /// means nothing.
    pub(super) fn reset(&self) {
        self.needs_reset.store(false, Ordering::SeqCst);
        self.status.store(0, Ordering::SeqCst);
    }

    fn raise(&self, bits: u32) {
        self.status.fetch_or(bits, Ordering::SeqCst);
        // The one possible failure is a full counter, and then the interrupt is already pending.
        let _full = self.event.write(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raised_bits_stay_until_they_are_acknowledged() {
        let interrupt = Interrupt::new().unwrap();
        interrupt.signal_used_buffers();
        interrupt.signal_config_change();
        assert_eq!(interrupt.status(), 3);
        assert_eq!(interrupt.event().read().unwrap(), 2);
        interrupt.acknowledge(1);
        assert_eq!(interrupt.status(), 2);
        assert_eq!(interrupt.config_generation(), 1);
    }

    #[test]
    fn a_reset_lowers_the_line_and_keeps_the_generation() {
        let interrupt = Interrupt::new().unwrap();
        interrupt.signal_config_change();
        interrupt.signal_needs_reset();
        assert!(interrupt.needs_reset());
        interrupt.reset();
        assert!(!interrupt.needs_reset());
        assert_eq!(interrupt.status(), 0);
        assert_eq!(interrupt.config_generation(), 1);
    }
}
