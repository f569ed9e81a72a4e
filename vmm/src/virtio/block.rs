//! virtio-block over a raw file (virtio 1.2, section 5.2).
//!
//! One queue, requests served in order and to their end on the event loop. `VIRTIO_BLK_F_FLUSH` is
//! offered where the drive is configured to honour it, `VIRTIO_BLK_F_RO` where it is read-only.

mod disk;
mod image_format;
mod request;
mod segments;

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
use self::request::{Kind, QUEUE_SIZE, Request};
use super::{Activation, Budget, Device, GuestMemory, LogLimit, Progress, RingError, Served, ring};
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
    disk: Disk,
    active: Option<Active>,
    log_limit: LogLimit,
}

#[derive(Debug)]
struct Active {
    memory: Arc<GuestMemory>,
    queue: Queue,
    label: Arc<str>,
}

impl Block {
    /// A device over `disk` that no driver has set up.
    pub fn new(disk: Disk) -> Self {
        Block {
            disk,
            active: None,
            log_limit: LogLimit::new(),
        }
    }

    /// The configuration space up to `seg_max` (5.2.4); the fields behind it belong to features
    /// that are not offered.
    fn config_space(&self) -> [u8; 16] {
        let mut space = [0; 16];
        space[..8].copy_from_slice(&self.disk.capacity_sectors().to_le_bytes());
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
        if self.disk.is_read_only() {
            features |= 1 << VIRTIO_BLK_F_RO;
        }
        if self.disk.cache_type() == CacheType::Writeback {
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
        self.active = activation.queues.into_iter().next().map(|queue| Active {
            memory: activation.memory,
            queue,
            label: activation.label,
        });
    }

    fn process_queue(&mut self, index: usize) -> Result<Progress, RingError> {
        let (Some(active), 0) = (self.active.as_mut(), index) else {
            return Ok(Progress::default());
        };
        let (disk, log_limit, label) = (&mut self.disk, &mut self.log_limit, &active.label);
        ring::drain(&mut active.queue, &active.memory, Budget::SLICE, |chain| {
            serve(disk, &chain, |problem| log_limit.warn(label, problem))
        })
    }

    fn reset(&mut self) {
        self.active = None;
    }
}

/// Serves one request: data, then the status byte.
fn serve(
    disk: &mut Disk,
    chain: &DescriptorChain<&GuestMemory>,
    mut complain: impl FnMut(&dyn std::fmt::Display),
) -> Served {
    let memory: &GuestMemory = chain.memory();
    let request = match Request::parse(chain.clone(), memory) {
        Ok(request) => request,
        Err(error) => {
            // There is no status byte to answer in. The chain goes back with nothing written, so
            // that the driver gets its buffers back, and its queue does not silently fill up.
            complain(&error);
            return Served {
                used_bytes: 0,
                cost_bytes: 1,
            };
        }
    };
    let cost_bytes = match request.kind {
        // It may take any time: a turn of its own.
        Kind::Flush => u64::MAX,
        _ => 1 + request.readable.length_bytes() + request.writable.length_bytes(),
    };
    let (status, written_bytes) = match execute(disk, &request, memory) {
        Ok(written_bytes) => (VIRTIO_BLK_S_OK, written_bytes),
        Err(Failure::Unsupported) => (VIRTIO_BLK_S_UNSUPP, 0),
        Err(Failure::Fault(fault)) => {
            complain(&fault);
            (VIRTIO_BLK_S_IOERR, 0)
        }
    };
    // Lossless: the three status values are below 256.
    let status = status.to_le_bytes()[0];
    if let Err(error) = memory.write_obj(status, request.status_address) {
        complain(&error);
        return Served {
            used_bytes: 0,
            cost_bytes,
        };
    }
    // Data and status (2.7.8); drivers go by the status alone.
    let used_bytes = u32::try_from(written_bytes)
        .unwrap_or(u32::MAX)
        .saturating_add(1);
    Served {
        used_bytes,
        cost_bytes,
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

/// Carries out a request; returns the number of bytes written to the guest's buffers.
fn execute(disk: &mut Disk, request: &Request, memory: &GuestMemory) -> Result<u64, Failure> {
    match request.kind {
        Kind::In => {
            disk.read(request.sector, &request.writable, memory)?;
            Ok(request.writable.length_bytes())
        }
        Kind::Out => {
            disk.write(request.sector, &request.readable, memory)?;
            Ok(0)
        }
        Kind::Flush => {
            disk.flush()?;
            Ok(0)
        }
        Kind::GetId => {
            let mut serial = [0; VIRTIO_BLK_ID_BYTES as usize];
            for (byte, value) in serial.iter_mut().zip(disk.drive_id().bytes()) {
                *byte = value;
            }
            Ok(request
                .writable
                .write_bytes(memory, &serial)
                .map_err(DiskFault::Memory)?)
        }
        Kind::Unknown(_) => Err(Failure::Unsupported),
    }
}

#[cfg(test)]
mod merge_tests;
#[cfg(test)]
mod tests;
