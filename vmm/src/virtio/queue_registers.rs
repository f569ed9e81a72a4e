//! What the driver says of one queue, and the check that turns it into a queue.

use thiserror::Error;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::GuestMemory;

/// Bytes of one descriptor (virtio 1.2, 2.7.5).
const DESCRIPTOR_BYTES: usize = 16;
/// Bytes of one entry of the available ring, and of the fields around them: flags, idx, used_event
/// (2.7.6).
const AVAIL_ENTRY_BYTES: usize = 2;
const AVAIL_FIELDS_BYTES: usize = 6;
/// The same of the used ring: flags, idx, avail_event (2.7.8).
const USED_ENTRY_BYTES: usize = 8;
const USED_FIELDS_BYTES: usize = 6;

/// Why a queue cannot be enabled.
#[derive(Debug, Error)]
pub(super) enum QueueError {
    #[error("queue_num {size}: not a power of two of at most {max_size}")]
    Size { size: u32, max_size: u16 },
    #[error("{ring} {address:#x}: zero, or not aligned as virtio asks")]
    Address { ring: &'static str, address: u64 },
    #[error("{ring} {address:#x}: its {length_bytes} bytes are not all guest memory")]
    NotMemory {
        ring: &'static str,
        address: u64,
        length_bytes: usize,
    },
}

/// The registers of one queue. They hold what was written; only [`QueueRegisters::build`] believes
/// it.
#[derive(Clone, Debug)]
pub(super) struct QueueRegisters {
    pub(super) max_size: u16,
    pub(super) size: u32,
    pub(super) is_ready: bool,
    pub(super) descriptors: u64,
    pub(super) avail: u64,
    pub(super) used: u64,
}

impl QueueRegisters {
    pub(super) fn new(max_size: u16) -> Self {
        QueueRegisters {
            max_size,
            size: u32::from(max_size),
            is_ready: false,
            descriptors: 0,
            avail: 0,
            used: 0,
        }
    }

    /// The queue these registers describe, ready to use, or why there is none.
    pub(super) fn build(&self, memory: &GuestMemory, event_idx: bool) -> Result<Queue, QueueError> {
        let mut queue = self.empty()?;
        let size = usize::from(queue.size());
        let bad = |ring, address| move |_| QueueError::Address { ring, address };

        self.check_ring(
            memory,
            "queue_desc",
            self.descriptors,
            size * DESCRIPTOR_BYTES,
        )?;
        queue
            .try_set_desc_table_address(GuestAddress(self.descriptors))
            .map_err(bad("queue_desc", self.descriptors))?;
        self.check_ring(
            memory,
            "queue_driver",
            self.avail,
            AVAIL_FIELDS_BYTES + size * AVAIL_ENTRY_BYTES,
        )?;
        queue
            .try_set_avail_ring_address(GuestAddress(self.avail))
            .map_err(bad("queue_driver", self.avail))?;
        self.check_ring(
            memory,
            "queue_device",
            self.used,
            USED_FIELDS_BYTES + size * USED_ENTRY_BYTES,
        )?;
        queue
            .try_set_used_ring_address(GuestAddress(self.used))
            .map_err(bad("queue_device", self.used))?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        Ok(queue)
    }

    /// A queue of the driver's size that is not ready.
    pub(super) fn empty(&self) -> Result<Queue, QueueError> {
        let refused = || QueueError::Size {
            size: self.size,
            max_size: self.max_size,
        };
        let size = u16::try_from(self.size).map_err(|_| refused())?;
        let mut queue = Queue::new(self.max_size).map_err(|_| refused())?;
        queue.try_set_size(size).map_err(|_| refused())?;
        Ok(queue)
    }

    fn check_ring(
        &self,
        memory: &GuestMemory,
        ring: &'static str,
        address: u64,
        length_bytes: usize,
    ) -> Result<(), QueueError> {
        // virtio-queue takes an available ring at 0 for one that was never set.
        if address == 0 {
            return Err(QueueError::Address { ring, address });
        }
        if !memory.check_range(GuestAddress(address), length_bytes) {
            return Err(QueueError::NotMemory {
                ring,
                address,
                length_bytes,
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMORY_BYTES: u64 = 0x1_0000;

    fn memory() -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap()
    }

    fn registers() -> QueueRegisters {
        QueueRegisters {
            size: 16,
            is_ready: false,
            descriptors: 0x1000,
            avail: 0x2000,
            used: 0x3000,
            ..QueueRegisters::new(256)
        }
    }

    #[test]
    fn sane_registers_make_a_ready_queue() {
        let queue = registers().build(&memory(), true).unwrap();
        assert!(queue.ready() && queue.event_idx_enabled() && queue.is_valid(&memory()));
        assert_eq!(
            (
                queue.size(),
                queue.desc_table(),
                queue.avail_ring(),
                queue.used_ring()
            ),
            (16, 0x1000, 0x2000, 0x3000)
        );
    }

    #[test]
    fn a_size_that_is_zero_odd_or_too_large_is_refused() {
        for size in [0, 3, 512, 0x1_0010, u32::MAX] {
            let refused = QueueRegisters {
                size,
                ..registers()
            }
            .build(&memory(), false);
            assert!(matches!(refused, Err(QueueError::Size { .. })), "{size}");
        }
    }

    #[test]
    fn rings_outside_of_memory_or_misaligned_are_refused() {
        for address in [
            0,
            1,
            MEMORY_BYTES - 4,
            MEMORY_BYTES,
            u64::MAX - 1,
            u64::MAX - 15,
        ] {
            for broken in [
                QueueRegisters {
                    descriptors: address,
                    ..registers()
                },
                QueueRegisters {
                    avail: address,
                    ..registers()
                },
                QueueRegisters {
                    used: address,
                    ..registers()
                },
            ] {
                assert!(broken.build(&memory(), false).is_err(), "{broken:?}");
            }
        }
    }

    #[test]
    fn a_ring_may_end_where_memory_ends() {
        let last = QueueRegisters {
            descriptors: MEMORY_BYTES - 256,
            ..registers()
        };
        last.build(&memory(), false).unwrap();
    }
}
