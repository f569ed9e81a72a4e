//! The guest's side of a device, for fuzz targets and the tests that run the same.
//!
//! Everything here is what a guest can do: access registers, write its memory, ring doorbells.

mod balloon;
mod entropy;
mod net;
mod vsock;

use std::path::Path;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio as register;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub use self::balloon::balloon_requests;
pub use self::entropy::entropy_requests;
#[cfg(test)]
pub(crate) use self::net::Wire;
pub use self::net::network_frames;
pub use self::vsock::vsock_packets;
use super::device::lock;
use super::{
    Allowance, Block, Device, Disk, Doorbells, GuestMemory, Interrupt, QueueWorker, Transport,
    Unbounded,
};
use crate::bus::MmioDevice;
use crate::config::{CacheType, Drive, DriveSamepage, IoEngine, Unsupported};

/// First bytes of memory, then a hole, then more: as around the hole below 4 GiB.
pub(crate) const LOW_BYTES: usize = 0x8000;
pub(crate) const HIGH_START: u64 = 0x1_0000;
pub(crate) const HIGH_BYTES: usize = 0x8000;
/// Where [`Guest::set_up`] puts the rings, for a queue of `QUEUE_SIZE`.
pub(crate) const DESCRIPTORS: u64 = 0x1000;
pub(crate) const AVAIL: u64 = 0x2000;
pub(crate) const USED: u64 = 0x2800;
pub(crate) const QUEUE_SIZE: u16 = 16;
pub(crate) const QUEUE_STRIDE: u64 = 0x200;

/// The configuration of a data drive over the file at `path`.
pub fn drive(drive_id: &str, path: &Path, is_read_only: bool) -> Drive {
    Drive {
        drive_id: drive_id.to_owned(),
        path_on_host: path.to_owned(),
        is_root_device: false,
        is_read_only,
        partuuid: None,
        cache_type: CacheType::Writeback,
        samepage: DriveSamepage::default(),
        io_engine: IoEngine::Sync,
        rate_limiter: Unsupported::ABSENT,
        socket: Unsupported::ABSENT,
    }
}

/// Leave to take memory that is given and refused in turn.
#[derive(Debug)]
struct InTurn {
    /// Six bits, one after the other and again: refused where one is set.
    refused: u8,
    asked: AtomicU8,
}

impl InTurn {
    fn new(refused: u8) -> Arc<InTurn> {
        let asked = AtomicU8::new(0);
        Arc::new(InTurn { refused, asked })
    }

    fn gives(&self) -> bool {
        let asked = self.asked.fetch_add(1, Ordering::Relaxed);
        self.refused & (1 << (asked % 6)) == 0
    }
}

impl Allowance for InTurn {
    fn is_open(&self) -> bool {
        self.gives()
    }

    fn take(&self, _bytes: u64) -> bool {
        self.gives()
    }

    fn page_bytes(&self) -> u64 {
        4096
    }

    /// Nobody listens for doorbells here.
    fn ring_later(&self, _doorbells: &Doorbells, _queue: usize) {}
}

/// A guest with one device. Panics are findings, so it panics freely itself.
#[derive(Debug)]
pub struct Guest<D> {
    /// What its vCPUs reach.
    pub registers: Transport<D>,
    /// What its doorbells wake.
    pub worker: QueueWorker<D>,
    /// What both work on.
    pub device: Arc<Mutex<D>>,
    /// Its memory.
    pub memory: Arc<GuestMemory>,
    /// What it hears of the device.
    pub interrupt: Arc<Interrupt>,
}

impl Guest<Block> {
    /// A guest with `disk`, before its driver starts.
    pub fn new(disk: Disk) -> Guest<Block> {
        Guest::allowed(disk, Arc::new(Unbounded))
    }

    /// A guest whose disk takes memory by leave of `allowance`.
    pub(crate) fn allowed(disk: Disk, allowance: Arc<dyn Allowance>) -> Guest<Block> {
        Guest::with(Block::new(disk, allowance.clone()), allowance)
    }

    /// Serves the queue until nothing of it waits for storage.
    pub(crate) fn serve(&mut self) {
        loop {
            self.worker.serve(0);
            let closing = lock(&self.device).closing();
            if !closing.settle() {
                break;
            }
        }
    }
}

impl<D: Device> Guest<D> {
    /// A guest with `device`, whose queues are served by leave of `allowance`.
    #[expect(clippy::expect_used, reason = "only in tests and fuzz targets")]
    pub(crate) fn with(device: D, allowance: Arc<dyn Allowance>) -> Guest<D> {
        let ranges = [
            (GuestAddress(0), LOW_BYTES),
            (GuestAddress(HIGH_START), HIGH_BYTES),
        ];
        let memory = Arc::new(GuestMemory::from_ranges(&ranges).expect("guest memory"));
        let queues = device.queue_max_sizes().len();
        let device = Arc::new(Mutex::new(device));
        let interrupt = Arc::new(Interrupt::new().expect("eventfd"));
        let doorbells: Doorbells = (0..queues)
            .map(|_| EventFd::new(EFD_NONBLOCK).expect("eventfd"))
            .collect();
        let label: Arc<str> = Arc::from("fuzz");
        Guest {
            registers: Transport::new(
                device.clone(),
                memory.clone(),
                interrupt.clone(),
                doorbells.clone(),
                label.clone(),
            ),
            worker: QueueWorker::new(
                device.clone(),
                doorbells,
                interrupt.clone(),
                label,
                allowance,
            ),
            device,
            memory,
            interrupt,
        }
    }

    /// The worker, to be run on another thread; this guest's doorbells wake nobody afterwards.
    #[cfg(test)]
    pub(crate) fn take_worker(&mut self) -> QueueWorker<D> {
        let doorbells: Arc<[EventFd]> = Arc::new([]);
        let label = Arc::from("taken");
        let nobody = QueueWorker::new(
            self.device.clone(),
            doorbells,
            self.interrupt.clone(),
            label,
            Arc::new(Unbounded),
        );
        std::mem::replace(&mut self.worker, nobody)
    }

    pub(crate) fn read(&mut self, offset: u32) -> u32 {
        let mut bytes = [0xaa; 4];
        self.registers.read(u64::from(offset), &mut bytes);
        u32::from_le_bytes(bytes)
    }

    pub(crate) fn write(&mut self, offset: u32, value: u32) {
        self.registers
            .write(u64::from(offset), &value.to_le_bytes());
    }

    /// Accepts `features` and `VIRTIO_F_VERSION_1`, up to `FEATURES_OK`.
    pub(crate) fn negotiate(&mut self, features: u64) {
        self.write(register::VIRTIO_MMIO_STATUS, 0);
        self.write(register::VIRTIO_MMIO_STATUS, VIRTIO_CONFIG_S_ACKNOWLEDGE);
        let driver = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER;
        self.write(register::VIRTIO_MMIO_STATUS, driver);
        let features = (features | 1 << VIRTIO_F_VERSION_1).to_le_bytes();
        for (select, half) in (0..).zip(features.as_chunks::<4>().0) {
            self.write(register::VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
            self.write(
                register::VIRTIO_MMIO_DRIVER_FEATURES,
                u32::from_le_bytes(*half),
            );
        }
        self.write(
            register::VIRTIO_MMIO_STATUS,
            driver | VIRTIO_CONFIG_S_FEATURES_OK,
        );
    }

    /// Enables the first queue with its rings at the usual places.
    pub(crate) fn enable_queue(&mut self) {
        self.enable(0);
    }

    /// Enables queue `index`, with its rings [`QUEUE_STRIDE`] bytes behind those of the one before.
    fn enable(&mut self, index: u32) {
        let stride = QUEUE_STRIDE * u64::from(index);
        self.write(register::VIRTIO_MMIO_QUEUE_SEL, index);
        self.write(register::VIRTIO_MMIO_QUEUE_NUM, u32::from(QUEUE_SIZE));
        for (offset, address) in [
            (register::VIRTIO_MMIO_QUEUE_DESC_LOW, DESCRIPTORS),
            (register::VIRTIO_MMIO_QUEUE_AVAIL_LOW, AVAIL),
            (register::VIRTIO_MMIO_QUEUE_USED_LOW, USED),
        ] {
            let [a, b, c, d, e, f, g, h] = (address + stride).to_le_bytes();
            self.write(offset, u32::from_le_bytes([a, b, c, d]));
            self.write(offset + 4, u32::from_le_bytes([e, f, g, h]));
        }
        self.write(register::VIRTIO_MMIO_QUEUE_READY, 1);
    }

    pub(crate) fn driver_ok(&mut self) {
        let status = self.read(register::VIRTIO_MMIO_STATUS);
        self.write(
            register::VIRTIO_MMIO_STATUS,
            status | VIRTIO_CONFIG_S_DRIVER_OK,
        );
    }

    /// All of a driver's initialization (virtio 1.2, 3.1.1).
    pub(crate) fn set_up(&mut self, features: u64) {
        self.negotiate(features);
        let queues = lock(&self.device).queue_max_sizes().len();
        (0..).take(queues).for_each(|index| self.enable(index));
        self.driver_ok();
    }

    /// Writes as much of `bytes` as fits into memory at `address`.
    pub(crate) fn poke(&mut self, address: u64, bytes: &[u8]) {
        let _outside = self.memory.write(bytes, GuestAddress(address));
    }
}

/// Random accesses to the registers and to memory, and doorbells, in any order.
///
/// Each 16 bytes of `input` are an action, an offset or address, a width and a value. The fifth
/// byte of them all says when the device is refused memory.
pub fn registers(disk: Disk, input: &[u8]) {
    let refused = input.get(4).copied().unwrap_or_default();
    let mut guest = Guest::allowed(disk, InTurn::new(refused));
    for action in input.as_chunks::<16>().0 {
        let [verb, width, offset_low, offset_high, _, _, _, _, value @ ..] = *action;
        let offset = u64::from(u16::from_le_bytes([offset_low, offset_high]));
        let width = 1_usize << (width % 4);
        match verb % 8 {
            0 => guest.set_up(u64::from_le_bytes(value)),
            1 => guest.poke(offset, &value),
            2 | 3 if verb >> 3 == 0 => guest.serve(),
            // What waits for storage goes on waiting.
            2 | 3 if verb >> 3 == 1 => guest.worker.serve(0),
            2 | 3 => guest.worker.serve(usize::from(verb >> 3)),
            4 => {
                let mut bytes = [0; 8];
                guest.registers.read(offset % 0x200, &mut bytes[..width]);
            }
            5 => guest.registers.write(offset, &value[..width]),
            // The accesses that mean something: aligned, 32 bits, below the configuration space.
            _ => guest.registers.write((offset % 0x100) & !3, &value[..4]),
        }
    }
}

/// [`requests`] with what the first byte of `input` says: bit 0 for a disk that is read-only, bit 1
/// for `VIRTIO_RING_F_EVENT_IDX`, the others for when the device is refused memory. `disk` makes
/// the disk.
pub fn any_requests(disk: impl FnOnce(bool) -> Disk, input: &[u8]) {
    let Some((&options, input)) = input.split_first() else {
        return;
    };
    let features = u64::from(options & 2 != 0) << VIRTIO_RING_F_EVENT_IDX;
    let disk = disk(options & 1 != 0);
    let guest = Guest::allowed(disk, InTurn::new(options >> 2));
    served(guest, Guest::serve, features, input);
}

/// A driver that sets up its queue as it should and then puts anything at all into the rings.
///
/// The first 128 bytes of `input` are the descriptor table, 8 bytes a descriptor; the rest is what
/// the buffers hold, 4 bytes a request header. Both are widened so that a good part makes sense:
/// mere noise would hardly ever get past the first check. Every descriptor is made available.
pub fn requests(disk: Disk, features: u64, input: &[u8]) {
    served(Guest::new(disk), Guest::serve, features, input);
}

fn served<D: Device>(
    mut guest: Guest<D>,
    serve: impl Fn(&mut Guest<D>),
    features: u64,
    input: &[u8],
) {
    guest.set_up(features);
    let (table, headers) = input.split_at(input.len().min(8 * usize::from(QUEUE_SIZE)));
    for (index, header) in (0_u64..).zip(headers.as_chunks::<4>().0) {
        for start in [0x4000, HIGH_START] {
            guest.poke(start + 16 * index, &wide_header(*header));
        }
    }
    for (index, descriptor) in (0..QUEUE_SIZE).zip(table.as_chunks::<8>().0) {
        guest.poke(
            DESCRIPTORS + 16 * u64::from(index),
            &wide_descriptor(index, *descriptor),
        );
        guest.poke(AVAIL + 4 + 2 * u64::from(index), &index.to_le_bytes());
    }
    for available in 1..=QUEUE_SIZE {
        guest.poke(AVAIL + 2, &available.to_le_bytes());
        serve(&mut guest);
    }
    if let Some(index) = headers.first_chunk::<2>() {
        guest.poke(AVAIL + 2, index);
        serve(&mut guest);
    }
}

/// A request header of a known or nearly known type.
fn wide_header([kind, sector_low, sector_high, far]: [u8; 4]) -> [u8; 16] {
    let mut header = [far; 16];
    header[..8].copy_from_slice(&u64::from(kind % 12).to_le_bytes());
    if far != 0xff {
        let sector = u16::from_le_bytes([sector_low, sector_high]) % 32;
        header[8..].copy_from_slice(&u64::from(sector).to_le_bytes());
    }
    header
}

/// Descriptor number `index`, most often in memory, of a plausible length, and linked to the next.
fn wide_descriptor(index: u16, narrow: [u8; 8]) -> [u8; 16] {
    let [a, b, c, length_low, length_high, length_kind, flags, next] = narrow;
    let offset = u64::from(u16::from_le_bytes([a, b]));
    let address = match c % 8 {
        0..=3 => 0x4000 + ((offset % 0x1000) & !15),
        4 => 0x4000 + offset % 0x4000,
        5 => HIGH_START + offset % 0x8000,
        6 => offset << 1,
        _ => offset << 48 | u64::from(c),
    };
    let any_length = u32::from_le_bytes([length_low, length_high, 0, length_kind]);
    let length = match length_kind % 8 {
        0 => 1,
        1 | 2 => 16,
        3 => 512,
        4 => 513,
        5 => 1024,
        6 => any_length & 0xffff,
        _ => any_length,
    };
    let mut wide = [0; 16];
    wide[..8].copy_from_slice(&address.to_le_bytes());
    wide[8..12].copy_from_slice(&length.to_le_bytes());
    // Indirect one time in eight.
    wide[12] = (flags % 4) | (u8::from(flags >= 0xe0) << 2);
    let next = if next < 0xc0 {
        index + 1
    } else {
        u16::from(next % 18)
    };
    wide[14..].copy_from_slice(&next.to_le_bytes());
    wide
}
