//! Where a device sits in a VM, and the parts of it the monitor plugs in.

use std::io;
use std::sync::{Arc, Mutex};

use event_manager::MutEventSubscriber;
use thiserror::Error;
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_QUEUE_NOTIFY;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::lock;
use super::{
    Allowance, Block, Closing, Device, Disk, Doorbells, GuestMemory, Interrupt, QueueWorker,
    Transport,
};
use crate::bus::MmioDevice;

/// Address of the first device's registers, in the hole below 4 GiB.
const FIRST_BASE: u64 = 0xd000_0000;
/// Bytes of a device's range: a page, as Linux' `virtio_mmio.device` parameter is used here.
const SIZE_BYTES: u64 = 0x1000;
/// Interrupt line of the first device; those below belong to the timer, the UART and the like.
const FIRST_IRQ: u32 = 5;
/// The I/O APIC has 24 lines, and each device has one of its own.
const SLOTS: u8 = 19;

/// A place for a virtio device: a page of registers and an interrupt line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot(u8);

/// More devices than interrupt lines.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("virtio device number {index}: a VM has room for {SLOTS}")]
pub struct SlotError {
    index: usize,
}

impl Slot {
    /// The place of the VM's device number `index`, from 0.
    ///
    /// # Errors
    /// There are no more interrupt lines.
    pub fn new(index: usize) -> Result<Slot, SlotError> {
        match u8::try_from(index) {
            Ok(slot) if slot < SLOTS => Ok(Slot(slot)),
            _ => Err(SlotError { index }),
        }
    }

    /// Guest physical address of the registers.
    pub fn base(self) -> u64 {
        FIRST_BASE + SIZE_BYTES * u64::from(self.0)
    }

    /// Bytes of the register range.
    pub fn size_bytes(self) -> u64 {
        SIZE_BYTES
    }

    /// The interrupt line (GSI), edge triggered.
    pub fn irq(self) -> u32 {
        FIRST_IRQ + u32::from(self.0)
    }

    /// What the kernel's command line must say for Linux to find the device
    /// (drivers/virtio/virtio_mmio.c).
    pub fn kernel_parameter(self) -> String {
        let (size_kib, base, irq) = (self.size_bytes() / 1024, self.base(), self.irq());
        format!("virtio_mmio.device={size_kib}K@{base:#x}:{irq}")
    }
}

/// An eventfd to register with KVM as an ioeventfd: four bytes wide, at `address`, for the value
/// `queue`.
#[derive(Debug)]
pub struct Doorbell {
    /// Guest physical address of the device's `QueueNotify` register.
    pub address: u64,
    /// The value to match.
    pub queue: u32,
    /// What KVM signals.
    pub event: EventFd,
}

/// The parts of a device the monitor plugs into a VM.
///
/// When the VM ends, remove `subscriber` from the event loop and drop `registers` with the bus: no
/// reference to guest memory is left then.
pub struct Attachment {
    /// Address and interrupt line.
    pub slot: Slot,
    /// For the MMIO bus, at `slot.base()`.
    pub registers: Arc<Mutex<dyn MmioDevice>>,
    /// For KVM, one for each queue.
    pub doorbells: Vec<Doorbell>,
    /// For KVM, the irqfd of `slot.irq()`.
    pub irq_event: EventFd,
    /// For the event loop.
    pub subscriber: Box<dyn MutEventSubscriber + Send>,
}

impl std::fmt::Debug for Attachment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Attachment")
            .field("slot", &self.slot)
            .field("doorbells", &self.doorbells)
            .finish_non_exhaustive()
    }
}

/// Makes the parts of `device`, which takes memory by leave of `allowance`. `label` names it in log
/// messages, as in `vm1/rootfs`.
///
/// # Errors
/// No eventfd can be made.
pub fn attach<D: Device + 'static>(
    slot: Slot,
    label: &str,
    device: D,
    memory: Arc<GuestMemory>,
    allowance: Arc<dyn Allowance>,
) -> io::Result<Attachment> {
    let label: Arc<str> = Arc::from(label);
    let device = Arc::new(Mutex::new(device));
    let interrupt = Arc::new(Interrupt::new()?);
    let queue_count = lock(&device).queue_max_sizes().len();
    let events: Doorbells = (0..queue_count)
        .map(|_| EventFd::new(EFD_NONBLOCK))
        .collect::<io::Result<_>>()?;
    let doorbells = (0_u32..)
        .zip(events.iter())
        .map(|(queue, event)| {
            Ok(Doorbell {
                address: slot.base() + u64::from(VIRTIO_MMIO_QUEUE_NOTIFY),
                queue,
                event: event.try_clone()?,
            })
        })
        .collect::<io::Result<_>>()?;
    let irq_event = interrupt.event().try_clone()?;
    let subscriber = QueueWorker::new(
        device.clone(),
        events.clone(),
        interrupt.clone(),
        label.clone(),
        allowance,
    );
    let registers = Transport::new(device, memory, interrupt, events, label);
    Ok(Attachment {
        slot,
        registers: Arc::new(Mutex::new(registers)),
        doorbells,
        irq_event,
        subscriber: Box::new(subscriber),
    })
}

/// Makes the parts of a block device over `disk`.
///
/// # Errors
/// No eventfd can be made.
pub fn attach_block(
    slot: Slot,
    label: &str,
    disk: Disk,
    memory: Arc<GuestMemory>,
    allowance: Arc<dyn Allowance>,
) -> io::Result<(Attachment, Closing)> {
    let device = Block::new(disk, allowance.clone());
    let closing = device.closing();
    Ok((attach(slot, label, device, memory, allowance)?, closing))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::MmioBus;
    use crate::events::EventLoop;
    use crate::virtio::{Unbounded, fuzzing};
    use std::time::{Duration, Instant};
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn slots_have_addresses_lines_and_kernel_parameters_of_their_own() {
        let (first, last) = (Slot::new(0).unwrap(), Slot::new(18).unwrap());
        assert_eq!(
            first.kernel_parameter(),
            "virtio_mmio.device=4K@0xd0000000:5"
        );
        assert_eq!(
            last.kernel_parameter(),
            "virtio_mmio.device=4K@0xd0012000:23"
        );
        assert_eq!(last.base() - first.base(), 18 * first.size_bytes());
    }

    #[test]
    fn a_device_too_many_is_refused_by_number() {
        for index in [19, 256] {
            let expected = format!("virtio device number {index}: a VM has room for 19");
            assert_eq!(Slot::new(index).unwrap_err().to_string(), expected);
        }
    }

    /// Waits until an eventfd was signalled.
    fn wait_for(event: &EventFd) {
        let deadline = Instant::now() + Duration::from_secs(120);
        while event.read().is_err() {
            assert!(Instant::now() < deadline, "no event");
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_plugged_in_device_serves_its_doorbell_and_lets_go_of_memory_when_pulled() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(512).unwrap();
        let disk = Disk::open(&fuzzing::drive("disk", file.path(), false)).unwrap();
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x8000)]).unwrap();
        let memory = Arc::new(memory);
        let slot = Slot::new(3).unwrap();
        let (parts, closing) =
            attach_block(slot, "vm/disk", disk, memory.clone(), Arc::new(Unbounded)).unwrap();

        let events = EventLoop::new().unwrap();
        let id = events
            .remote()
            .add(parts.subscriber, Box::new(|text| panic!("{text}")))
            .unwrap();
        let mut bus = MmioBus::new();
        bus.insert(slot.base(), slot.size_bytes(), parts.registers)
            .unwrap();
        let write = |offset: u64, value: u32| bus.write(slot.base() + offset, &value.to_le_bytes());
        for (offset, value) in [
            // Up to FEATURES_OK with VIRTIO_F_VERSION_1, a queue of 4, DRIVER_OK.
            (0x70, 1),
            (0x70, 3),
            (0x24, 1),
            (0x20, 1),
            (0x70, 11),
            (0x38, 4),
            (0x80, 0x1000),
            (0x90, 0x2000),
            (0xa0, 0x3000),
            (0x44, 1),
            (0x70, 15),
        ] {
            write(offset, value);
        }
        // One flush: a header of type 4, a status byte.
        for (address, bytes) in [
            (0x4000, &4_u128.to_le_bytes()[..]),
            (
                0x1000,
                &[0, 0x40, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 1, 0, 1, 0],
            ),
            (0x1010, &[0, 0x50, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0]),
            (0x5000, &[0xee]),
            (0x2002, &[1, 0]),
        ] {
            memory.write_slice(bytes, GuestAddress(address)).unwrap();
        }
        assert_eq!(parts.doorbells[0].address, 0xd000_3050);
        parts.doorbells[0].event.write(1).unwrap();
        wait_for(&parts.irq_event);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x5000)).unwrap(), 0);

        drop(bus);
        events.remote().remove(vec![id]).unwrap();
        assert_eq!(Arc::strong_count(&memory), 1);
        assert!(closing.wait(Instant::now() + Duration::from_secs(60)));
    }
}
