//! virtio-block over a raw file (virtio 1.2, section 5.2).
//!
//! One queue, requests served in order on the event loop, which waits for no storage: what the page
//! cache does not have at hand is the drive's lane's (`lane`), one chunk at a time. A request that
//! waits for that, or for whose data there is not the memory, lies with the device, half done.
//! `VIRTIO_BLK_F_FLUSH` is offered where the drive is configured to honour it, `VIRTIO_BLK_F_RO`
//! where it is read-only.

mod disk;
mod image_format;
mod lane;
mod request;
mod transfer;

use std::fmt;
use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{DescriptorChain, Queue};
use vm_memory::Bytes;

pub use self::disk::{Disk, DiskError};
use self::disk::{DiskFault, MAX_REQUEST_BYTES};
pub use self::lane::Closing;
use self::request::{Kind, QUEUE_SIZE, Request};
use self::transfer::{DiskIo, Moved, Position};
use super::ring::{self, Finished};
use super::{
    Activation, Allowance, Budget, Device, GuestMemory, LogLimit, Progress, RingError, Served,
};
use crate::config::CacheType;

/// Most data segments in a request: a chain as long as the queue, less header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Most bytes in a segment: so chosen that a driver that keeps to both stays below the limit of
/// [`MAX_REQUEST_BYTES`].
const SIZE_MAX: u32 = 64 << 10;
const _: () = assert!(SEG_MAX as u64 * SIZE_MAX as u64 <= MAX_REQUEST_BYTES);

/// A block device.
#[derive(Debug)]
pub struct Block {
    disk: DiskIo,
    allowance: Arc<dyn Allowance>,
    active: Option<Active>,
    log_limit: LogLimit,
}

#[derive(Debug)]
struct Active {
    memory: Arc<GuestMemory>,
    queue: Queue,
    label: Arc<str>,
    /// A request that waits for memory or for storage, to be gone on with first.
    taken: Option<Taken>,
}

/// A request that was taken off the ring.
#[derive(Debug)]
struct Taken {
    head: u16,
    request: Request,
    progress: Done,
}

/// How far a request got.
#[derive(Debug)]
enum Done {
    /// So many bytes of its data were moved; of a flush, whether it was begun.
    Data(u64),
    /// Its data is done with; what is to be told of it in the status byte, and bytes written.
    All(u8, u64),
}

impl Block {
    /// A device over `disk` that no driver has set up, and that takes memory by leave of
    /// `allowance`.
    pub fn new(disk: Disk, allowance: Arc<dyn Allowance>) -> Self {
        Block {
            disk: DiskIo::new(disk),
            allowance,
            active: None,
            log_limit: LogLimit::new(),
        }
    }

    /// What tells when the drive's file is closed, after the device was dropped.
    pub fn closing(&self) -> Closing {
        self.disk.closing()
    }

    /// The configuration space up to `seg_max` (5.2.4); the fields behind it belong to features
    /// that are not offered.
    fn config_space(&self) -> [u8; 16] {
        let mut space = [0; 16];
        space[..8].copy_from_slice(&self.disk.facts().capacity_sectors.to_le_bytes());
        space[8..12].copy_from_slice(&SIZE_MAX.to_le_bytes());
        space[12..].copy_from_slice(&SEG_MAX.to_le_bytes());
        space
    }
}

impl Device for Block {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let mut features = 1 << VIRTIO_RING_F_EVENT_IDX;
        features |= 1 << VIRTIO_BLK_F_SIZE_MAX | 1 << VIRTIO_BLK_F_SEG_MAX;
        if self.disk.facts().is_read_only {
            features |= 1 << VIRTIO_BLK_F_RO;
        }
        if self.disk.facts().cache_type == CacheType::Writeback {
            features |= 1 << VIRTIO_BLK_F_FLUSH;
        }
        features
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, bytes: &mut [u8]) {
        bytes.fill(0);
        let space = self.config_space();
        let rest = usize::try_from(offset).ok().and_then(|at| space.get(at..));
        for (byte, value) in bytes.iter_mut().zip(rest.unwrap_or_default()) {
            *byte = *value;
        }
    }

    fn activate(&mut self, activation: Activation) {
        self.disk.connect(activation.doorbells);
        self.active = activation.queues.into_iter().next().map(|queue| Active {
            memory: activation.memory,
            queue,
            label: activation.label,
            taken: None,
        });
    }

    fn process_queue(&mut self, index: usize) -> Result<Progress, RingError> {
        let (Some(active), 0) = (self.active.as_mut(), index) else {
            return Ok(Progress::default());
        };
        let Active {
            memory,
            queue,
            label,
            taken,
        } = active;
        let (memory, label): (&GuestMemory, &str) = (&*memory, &*label);
        let log_limit = &mut self.log_limit;
        let mut service = Service {
            disk: &mut self.disk,
            memory,
            allowance: &*self.allowance,
            complain: |problem: &dyn fmt::Display| log_limit.warn(label, problem),
            is_starved: false,
        };
        let finished = match taken.take() {
            None => None,
            Some(mut kept) => {
                let head = kept.head;
                let Some(served) = service.go_on(&mut kept) else {
                    *taken = Some(kept);
                    return Ok(Progress {
                        starved: service.is_starved,
                        ..Progress::default()
                    });
                };
                Some(Finished { head, served })
            }
        };
        let drained = ring::drain(queue, memory, Budget::SLICE, finished, |chain| {
            service.serve(&chain, taken)
        })?;
        // The lane rings by itself.
        Ok(Progress {
            starved: service.is_starved,
            ..drained
        })
    }

    fn reset(&mut self) {
        self.active = None;
        self.disk.abandon();
    }
}

/// What a turn serves requests with.
struct Service<'a, F> {
    disk: &'a mut DiskIo,
    memory: &'a GuestMemory,
    allowance: &'a dyn Allowance,
    complain: F,
    /// A request waits for memory.
    is_starved: bool,
}

impl<F: FnMut(&dyn fmt::Display)> Service<'_, F> {
    /// Serves one request: data, then the status byte. `None` if it waits for memory or storage: it
    /// lies in `taken` then.
    fn serve(
        &mut self,
        chain: &DescriptorChain<&GuestMemory>,
        taken: &mut Option<Taken>,
    ) -> Option<Served> {
        let request = match Request::parse(chain.clone(), self.memory) {
            Ok(request) => request,
            Err(error) => {
                // There is no status byte to answer in. The chain goes back with nothing written, so
                // that the driver gets its buffers back, and its queue does not silently fill up.
                (self.complain)(&error);
                return Some(Served {
                    used_bytes: 0,
                    cost_bytes: 1,
                });
            }
        };
        let mut this = Taken {
            head: chain.head_index(),
            request,
            progress: Done::Data(0),
        };
        let served = self.go_on(&mut this);
        if served.is_none() {
            *taken = Some(this);
        }
        served
    }

    /// Goes on where an earlier turn stopped. `None` if it waits for memory or storage.
    fn go_on(&mut self, taken: &mut Taken) -> Option<Served> {
        let request = &taken.request;
        if let Done::Data(done_bytes) = taken.progress {
            let (status, written_bytes) = match self.execute(request, done_bytes) {
                Ok((Moved::All, written_bytes)) => (VIRTIO_BLK_S_OK, written_bytes),
                Ok((Moved::Starved(done_bytes), _)) => {
                    taken.progress = Done::Data(done_bytes);
                    self.is_starved = true;
                    return None;
                }
                Ok((Moved::Waiting(done_bytes), _)) => {
                    taken.progress = Done::Data(done_bytes);
                    return None;
                }
                Err(Failure::Unsupported) => (VIRTIO_BLK_S_UNSUPP, 0),
                Err(Failure::Fault(fault)) => {
                    (self.complain)(&fault);
                    (VIRTIO_BLK_S_IOERR, 0)
                }
            };
            // Lossless: the three status values are below 256.
            taken.progress = Done::All(status.to_le_bytes()[0], written_bytes);
        }
        let Done::All(status, written_bytes) = taken.progress else {
            return None;
        };
        // The byte may lie on a page that nobody touched yet.
        if !self.allowance.take(self.allowance.page_bytes()) {
            self.is_starved = true;
            return None;
        }
        let cost_bytes = 1 + request.readable.length_bytes() + request.writable.length_bytes();
        let status_written = self.memory.write_obj(status, request.status_address);
        if let Err(error) = &status_written {
            (self.complain)(error);
        }
        // Data and status (2.7.8); drivers go by the status alone.
        let used_bytes = u32::try_from(written_bytes)
            .unwrap_or(u32::MAX)
            .saturating_add(1);
        Some(Served {
            used_bytes: if status_written.is_ok() {
                used_bytes
            } else {
                0
            },
            cost_bytes,
        })
    }

    /// Carries out a request, of whose data `done_bytes` are moved already. With how far it got come
    /// the bytes that it writes to the guest's buffers as a whole.
    fn execute(&mut self, request: &Request, done_bytes: u64) -> Result<(Moved, u64), Failure> {
        let (memory, allowance) = (self.memory, self.allowance);
        let at = Position {
            sector: request.sector,
            done_bytes,
        };
        match request.kind {
            Kind::In => {
                let moved = self.disk.read(at, &request.writable, memory, allowance)?;
                Ok((moved, request.writable.length_bytes()))
            }
            Kind::Out => {
                let moved = self.disk.write(at, &request.readable, memory, allowance)?;
                Ok((moved, 0))
            }
            Kind::Flush => Ok((self.disk.flush(done_bytes > 0)?, 0)),
            Kind::GetId => self.write_id(request, done_bytes),
            Kind::Unknown(_) => Err(Failure::Unsupported),
        }
    }

    /// Writes the drive's name, of which `done_bytes` are written already.
    fn write_id(&self, request: &Request, done_bytes: u64) -> Result<(Moved, u64), Failure> {
        let mut serial = [0; VIRTIO_BLK_ID_BYTES as usize];
        for (byte, value) in serial.iter_mut().zip(self.disk.facts().drive_id.bytes()) {
            *byte = value;
        }
        let mut done = usize::try_from(done_bytes).unwrap_or(serial.len());
        let pieces = request
            .writable
            .pieces(done_bytes, self.allowance.page_bytes());
        // The buffers may have a byte on each of many pages, which are taken as any other data's.
        for piece in pieces {
            let rest = serial.get(done..).unwrap_or_default();
            let room = usize::try_from(piece.length_bytes).unwrap_or(usize::MAX);
            let now = &rest[..rest.len().min(room)];
            if now.is_empty() {
                break;
            }
            if !self.allowance.take(piece.memory_bytes) {
                return Ok((Moved::Starved(done as u64), 0));
            }
            let written = self.memory.write_slice(now, piece.address);
            written.map_err(DiskFault::Memory)?;
            done += now.len();
        }
        Ok((Moved::All, done as u64))
    }
}

/// Why a request was not carried out.
enum Failure {
    Unsupported,
    Fault(DiskFault),
}

impl From<DiskFault> for Failure {
    fn from(fault: DiskFault) -> Self {
        Failure::Fault(fault)
    }
}

#[cfg(test)]
mod tests;
