//! An interrupt line: an eventfd that KVM turns into an edge on an interrupt pin.

use std::io;

use vm_superio::Trigger;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// One interrupt line of a device. Edge-triggered.
#[derive(Debug)]
pub(crate) struct IrqLine {
    event: EventFd,
}

impl IrqLine {
    /// A line that is not connected yet.
    pub(crate) fn new() -> io::Result<IrqLine> {
        Ok(IrqLine {
            event: EventFd::new(EFD_NONBLOCK)?,
        })
    }

    /// The descriptor to register with KVM.
    pub(crate) fn event(&self) -> &EventFd {
        &self.event
    }
}

impl Trigger for IrqLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.event.write(1)
    }
}
