//! The virtio-mmio register file, version 2 (virtio 1.2, section 4.2.2).

use std::sync::{Arc, Mutex};

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio as register;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::eventfd::EventFd;

use super::device::lock;
use super::queue_registers::QueueRegisters;
use super::status::{configures_queues, negotiates_features, next_status, starts_device};
use super::{Activation, Device, GuestMemory, Interrupt, LogLimit};
use crate::bus::MmioDevice;

/// "virt" (4.2.2).
const MAGIC: u32 = 0x7472_6976;
/// The modern layout.
const VERSION: u32 = 2;
/// No vendor of hardware, as in Firecracker. Linux does not look at it.
const VENDOR_ID: u32 = 0;
/// What the shared memory registers read where there is no such region (4.2.2).
const NO_SHARED_MEMORY: u32 = u32::MAX;
/// First byte of the configuration space.
const CONFIG_SPACE: u64 = register::VIRTIO_MMIO_CONFIG as u64;

/// The registers of one device: what vCPUs reach at its page.
///
/// It owns the status state machine, the negotiation of features and the set-up of queues, and
/// hands the result to the device. Registers that may not be written now, or do not exist, ignore
/// the write and read as zero: the specification leaves that to the device, and a driver that
/// breaks the rules harms nobody else.
pub struct Transport<D> {
    device: Arc<Mutex<D>>,
    device_type: u32,
    offered_features: u64,
    memory: Arc<GuestMemory>,
    interrupt: Arc<Interrupt>,
    doorbells: Arc<[EventFd]>,
    label: Arc<str>,
    log_limit: LogLimit,

    status: u32,
    driver_features: u64,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u32,
    queues: Vec<QueueRegisters>,
}

impl<D> std::fmt::Debug for Transport<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Transport")
            .field("label", &self.label)
            .field("status", &self.status)
            .field("driver_features", &self.driver_features)
            .field("queues", &self.queues)
            .finish_non_exhaustive()
    }
}

impl<D: Device> Transport<D> {
    pub(super) fn new(
        device: Arc<Mutex<D>>,
        memory: Arc<GuestMemory>,
        interrupt: Arc<Interrupt>,
        doorbells: Arc<[EventFd]>,
        label: Arc<str>,
    ) -> Self {
        let (device_type, offered_features, queues) = {
            let device = lock(&device);
            let sizes = device.queue_max_sizes().iter();
            let queues = sizes.map(|&size| QueueRegisters::new(size)).collect();
            let features = device.features() | 1 << VIRTIO_F_VERSION_1;
            (device.device_type(), features, queues)
        };
        Transport {
            device,
            device_type,
            offered_features,
            memory,
            interrupt,
            doorbells,
            label,
            log_limit: LogLimit::new(),
            status: 0,
            driver_features: 0,
            device_features_select: 0,
            driver_features_select: 0,
            queue_select: 0,
            queues,
        }
    }

    fn read_register(&self, offset: u32) -> u32 {
        match offset {
            register::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            register::VIRTIO_MMIO_VERSION => VERSION,
            register::VIRTIO_MMIO_DEVICE_ID => self.device_type,
            register::VIRTIO_MMIO_VENDOR_ID => VENDOR_ID,
            register::VIRTIO_MMIO_DEVICE_FEATURES => {
                half(self.offered_features, self.device_features_select)
            }
            register::VIRTIO_MMIO_QUEUE_NUM_MAX => {
                self.queue().map_or(0, |queue| u32::from(queue.max_size))
            }
            register::VIRTIO_MMIO_QUEUE_READY => {
                self.queue().map_or(0, |queue| u32::from(queue.is_ready))
            }
            register::VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt.status(),
            register::VIRTIO_MMIO_STATUS => self.status(),
            register::VIRTIO_MMIO_CONFIG_GENERATION => self.interrupt.config_generation(),
            register::VIRTIO_MMIO_SHM_LEN_LOW
            | register::VIRTIO_MMIO_SHM_LEN_HIGH
            | register::VIRTIO_MMIO_SHM_BASE_LOW
            | register::VIRTIO_MMIO_SHM_BASE_HIGH => NO_SHARED_MEMORY,
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u32, value: u32) {
        match offset {
            register::VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_select = value,
            register::VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_select = value,
            register::VIRTIO_MMIO_DRIVER_FEATURES => self.accept_features(value),
            register::VIRTIO_MMIO_QUEUE_SEL => self.queue_select = value,
            register::VIRTIO_MMIO_QUEUE_NOTIFY => self.ring_doorbell(value),
            register::VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt.acknowledge(value),
            register::VIRTIO_MMIO_STATUS => self.write_status(value),
            register::VIRTIO_MMIO_QUEUE_READY => self.enable_queue(value == 1),
            register::VIRTIO_MMIO_QUEUE_NUM
            | register::VIRTIO_MMIO_QUEUE_DESC_LOW..=register::VIRTIO_MMIO_QUEUE_USED_HIGH => {
                self.describe_queue(offset, value);
            }
            _ => {}
        }
    }

    fn status(&self) -> u32 {
        let needs_reset = u32::from(self.interrupt.needs_reset()) * VIRTIO_CONFIG_S_NEEDS_RESET;
        self.status | needs_reset
    }

    fn write_status(&mut self, written: u32) {
        if written == 0 {
            self.reset();
            return;
        }
        match next_status(self.status, written, self.features_agreed()) {
            Ok(next) => {
                let starts = starts_device(self.status, next);
                self.status = next;
                if starts {
                    self.start();
                } else if next & VIRTIO_CONFIG_S_FAILED != 0 {
                    // The driver gave the device up: nothing of its memory is touched from here on.
                    self.reset_device();
                }
            }
            Err(error) => self.log_limit.warn(&self.label, &error),
        }
    }

    /// Back to power-on (2.1.2). When this returns the device touches no guest memory: a slice in
    /// progress on the event loop holds the device's lock and is waited for.
    fn reset(&mut self) {
        self.reset_device();
        self.interrupt.reset();
        self.status = 0;
        self.driver_features = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.queue_select = 0;
        for queue in &mut self.queues {
            *queue = QueueRegisters::new(queue.max_size);
        }
    }

    /// The event loop takes the device's lock: what the device works on elsewhere is waited for without.
    fn reset_device(&self) {
        let settle = {
            let mut device = lock(&self.device);
            device.reset();
            device.settle()
        };
        if let Some(settle) = settle {
            settle();
        }
    }

    /// Only what was offered, and the modern interface, which this transport speaks alone (6.1).
    fn features_agreed(&self) -> bool {
        self.driver_features & !self.offered_features == 0
            && self.driver_features & (1 << VIRTIO_F_VERSION_1) != 0
    }

    fn accept_features(&mut self, value: u32) {
        if !negotiates_features(self.status) || self.driver_features_select > 1 {
            return;
        }
        let shift = 32 * self.driver_features_select;
        let kept = self.driver_features & !(u64::from(u32::MAX) << shift);
        self.driver_features = kept | u64::from(value) << shift;
    }

    fn queue(&self) -> Option<&QueueRegisters> {
        self.queues.get(usize::try_from(self.queue_select).ok()?)
    }

    fn queue_mut(&mut self) -> Option<&mut QueueRegisters> {
        if !configures_queues(self.status) {
            return None;
        }
        self.queues
            .get_mut(usize::try_from(self.queue_select).ok()?)
    }

    fn describe_queue(&mut self, offset: u32, value: u32) {
        // A ready queue is not written to (4.2.2.2): its registers were checked as they are.
        let Some(queue) = self.queue_mut().filter(|queue| !queue.is_ready) else {
            return;
        };
        match offset {
            register::VIRTIO_MMIO_QUEUE_NUM => queue.size = value,
            register::VIRTIO_MMIO_QUEUE_DESC_LOW => set_low(&mut queue.descriptors, value),
            register::VIRTIO_MMIO_QUEUE_DESC_HIGH => set_high(&mut queue.descriptors, value),
            register::VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_low(&mut queue.avail, value),
            register::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_high(&mut queue.avail, value),
            register::VIRTIO_MMIO_QUEUE_USED_LOW => set_low(&mut queue.used, value),
            register::VIRTIO_MMIO_QUEUE_USED_HIGH => set_high(&mut queue.used, value),
            _ => {}
        }
    }

    /// Enables or disables the selected queue; one that does not hold water stays disabled.
    fn enable_queue(&mut self, enable: bool) {
        let memory = self.memory.clone();
        let Some(queue) = self.queue_mut() else {
            return;
        };
        if !enable {
            queue.is_ready = false;
            return;
        }
        match queue.build(&memory, false) {
            Ok(_checked) => queue.is_ready = true,
            Err(error) => {
                self.log_limit.warn(&self.label, &error);
                self.interrupt.signal_needs_reset();
            }
        }
    }

    fn start(&mut self) {
        let event_idx = self.driver_features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let built: Result<Vec<_>, _> = self
            .queues
            .iter()
            .map(|queue| match queue.is_ready {
                true => queue.build(&self.memory, event_idx),
                false => QueueRegisters::new(queue.max_size).empty(),
            })
            .collect();
        match built {
            Ok(queues) => lock(&self.device).activate(Activation {
                memory: self.memory.clone(),
                queues,
                features: self.driver_features,
                interrupt: self.interrupt.clone(),
                doorbells: self.doorbells.clone(),
                label: self.label.clone(),
            }),
            Err(error) => {
                self.log_limit.warn(&self.label, &error);
                self.interrupt.signal_needs_reset();
            }
        }
    }

    /// KVM's ioeventfd takes doorbells before they get here; this is the way in where one was not
    /// registered, and for a driver that rings with an odd access width.
    fn ring_doorbell(&self, index: u32) {
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        if let Some(doorbell) = self.doorbells.get(index) {
            let _full = doorbell.write(1);
        }
    }
}

impl<D: Device> MmioDevice for Transport<D> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset >= CONFIG_SPACE {
            lock(&self.device).read_config(offset - CONFIG_SPACE, data);
        } else if let Some(offset) = register_offset(offset, data.len()) {
            data.copy_from_slice(&self.read_register(offset).to_le_bytes());
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset >= CONFIG_SPACE {
            if self.status & (VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_FAILED)
                == VIRTIO_CONFIG_S_DRIVER
            {
                lock(&self.device).write_config(offset - CONFIG_SPACE, data);
            }
        } else if let Some(offset) = register_offset(offset, data.len())
            && let Ok(bytes) = data.try_into()
        {
            self.write_register(offset, u32::from_le_bytes(bytes));
        }
    }
}

/// The register an access means: all of them are 32 bits wide and accessed as such (4.2.2.2).
fn register_offset(offset: u64, length_bytes: usize) -> Option<u32> {
    if length_bytes != 4 || !offset.is_multiple_of(4) {
        return None;
    }
    u32::try_from(offset).ok()
}

/// Bits 0 to 31 or 32 to 63, whichever is selected; there are no others.
fn half(bits: u64, select: u32) -> u32 {
    let [a, b, c, d, e, f, g, h] = bits.to_le_bytes();
    match select {
        0 => u32::from_le_bytes([a, b, c, d]),
        1 => u32::from_le_bytes([e, f, g, h]),
        _ => 0,
    }
}

fn set_low(address: &mut u64, value: u32) {
    *address = *address & !u64::from(u32::MAX) | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = *address & u64::from(u32::MAX) | u64::from(value) << 32;
}

#[cfg(test)]
mod tests;
