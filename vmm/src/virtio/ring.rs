//! Serving a queue: take what is available, answer it, know when to interrupt and when to stop.

use std::sync::atomic::{Ordering, fence};

use thiserror::Error;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::GuestMemory;

/// Where the entries of the available ring begin, and bytes of one (virtio 1.2, 2.7.6).
const AVAIL_ENTRIES: u64 = 4;
const AVAIL_ENTRY_BYTES: u64 = 2;
/// The same of the used ring (2.7.8).
const USED_ELEMENTS: u64 = 4;
const USED_ELEMENT_BYTES: u64 = 8;

/// How much a device does before it lets the other devices of the event loop have their turn.
///
/// Rejected: serving until the queue is empty. A guest that keeps its queue full would then keep
/// the loop, and with it the disks of every other VM in the monitor.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// Descriptor chains.
    pub chains: u32,
    /// Cost as told in [`Served::cost_bytes`].
    pub cost_bytes: u64,
}

impl Budget {
    /// A millisecond or so of work on a disk in the page cache.
    pub const SLICE: Budget = Budget {
        chains: 64,
        cost_bytes: 4 << 20,
    };

    /// What each part of a chain costs besides the bytes in it: following a descriptor, and finding the
    /// memory that it names, take as long as moving so many. Without it a chain of parts of a byte
    /// would be all but free.
    pub(super) const PART_COST_BYTES: u64 = 512;

    /// Whether it is the others' turn.
    pub(super) fn is_spent(&self) -> bool {
        self.chains == 0 || self.cost_bytes == 0
    }

    pub(super) fn spend(&mut self, served: Served) {
        self.chains = self.chains.saturating_sub(1);
        self.spend_bytes(served.cost_bytes);
    }

    /// Spends what is a part of serving a chain.
    pub(super) fn spend_bytes(&mut self, cost_bytes: u64) {
        self.cost_bytes = self.cost_bytes.saturating_sub(cost_bytes);
    }
}

/// What became of one chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Served {
    /// Bytes written to the driver's buffers, for the used ring.
    pub used_bytes: u32,
    /// What it took of the budget: about the bytes moved.
    pub cost_bytes: u64,
}

/// What became of a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// The driver wants an interrupt.
    pub interrupt: bool,
    /// The budget ran out with work left: no doorbell will come for it.
    pub more: bool,
    /// A request lies with the device until there is memory for it. No doorbell will come for it
    /// either.
    pub starved: bool,
}

/// The ring is not usable: the driver broke it, and only a reset mends it.
#[derive(Debug, Error)]
pub enum RingError {
    /// The available index is further ahead than the queue is long, or the ring cannot be read.
    #[error("available ring: {0}")]
    Available(#[source] virtio_queue::Error),
    /// The used ring cannot be written, or the available ring names a descriptor that is not in the
    /// queue.
    #[error("used ring: {0}")]
    Used(#[source] virtio_queue::Error),
    /// An entry of the available ring is not a descriptor of the queue.
    #[error("available ring names descriptor {head}, the queue has {size}")]
    Head {
        /// The entry.
        head: u16,
        /// Descriptors in the queue.
        size: u16,
    },
}

/// A chain that was taken in an earlier turn and is done now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Finished {
    /// Its first descriptor.
    pub(super) head: u16,
    /// What became of it.
    pub(super) served: Served,
}

/// Hands the available chains of `queue` to `serve`, within `budget`, after `finished` was put into
/// the used ring.
///
/// A queue the driver did not enable has nothing available. A chain for which `serve` returns
/// nothing lies with the device, which hands it in as `finished` later; nothing is served behind it.
///
/// # Errors
/// [`RingError`]; the queue must not be used again before a reset.
pub(super) fn drain(
    queue: &mut Queue,
    memory: &GuestMemory,
    mut budget: Budget,
    finished: Option<Finished>,
    mut serve: impl FnMut(DescriptorChain<&GuestMemory>) -> Option<Served>,
) -> Result<Progress, RingError> {
    if !queue.ready() {
        return Ok(Progress::default());
    }
    let mut used_any = false;
    if let Some(Finished { head, served }) = finished {
        queue
            .add_used(memory, head, served.used_bytes)
            .map_err(RingError::Used)?;
        used_any = true;
        budget.spend(served);
    }
    let mut starved = false;
    let more = loop {
        queue
            .disable_notification(memory)
            .map_err(RingError::Used)?;
        let exhausted = loop {
            if budget.is_spent() {
                break true;
            }
            let Some(chain) = next_chain(queue, memory)? else {
                break false;
            };
            let head = chain.head_index();
            let Some(served) = serve(chain) else {
                starved = true;
                break false;
            };
            queue
                .add_used(memory, head, served.used_bytes)
                .map_err(RingError::Used)?;
            used_any = true;
            budget.spend(served);
        };
        // Notifications stay off: whoever rings the doorbell later looks at the ring anyway.
        if exhausted || starved {
            break exhausted;
        }
        // What was made available before the driver could see that we want doorbells again.
        if !queue.enable_notification(memory).map_err(RingError::Used)? {
            break false;
        }
    };
    let interrupt = used_any
        && queue
            .needs_notification(memory)
            .map_err(RingError::Available)?;
    Ok(Progress {
        interrupt,
        more,
        starved,
    })
}

/// Takes the next available chain off the ring, if there is one.
pub(super) fn next_chain<'a>(
    queue: &mut Queue,
    memory: &'a GuestMemory,
) -> Result<Option<DescriptorChain<&'a GuestMemory>>, RingError> {
    let Some(chain) = queue.iter(memory).map_err(RingError::Available)?.next() else {
        return Ok(None);
    };
    let (head, size) = (chain.head_index(), queue.size());
    if head >= size {
        return Err(RingError::Head { head, size });
    }
    Ok(Some(chain))
}

/// Puts chains, as (head, bytes written), into the used ring so that the driver sees all of them or
/// none: those of one frame, the first of which says how many there are (5.1.6.3.1).
///
/// virtio-queue shows each chain by itself, so the last one alone is put by it.
pub(super) fn publish(
    queue: &mut Queue,
    memory: &GuestMemory,
    used: &[(u16, u32)],
) -> Result<(), RingError> {
    let Some((&(last, last_bytes), others)) = used.split_last() else {
        return Ok(());
    };
    for &(head, bytes) in others {
        let index = u64::from(queue.next_used() % queue.size());
        let element = [u32::from(head).to_le(), bytes.to_le()];
        let address = GuestAddress(queue.used_ring() + USED_ELEMENTS + index * USED_ELEMENT_BYTES);
        memory
            .write_obj(element, address)
            .map_err(|error| RingError::Used(virtio_queue::Error::GuestMemory(error)))?;
        queue.set_next_used(queue.next_used().wrapping_add(1));
    }
    queue
        .add_used(memory, last, last_bytes)
        .map_err(RingError::Used)
}

/// Whether the driver wants an interrupt for what was used since `next_used` was `used_before`.
///
/// virtio-queue's own answer counts what [`publish`] put as one.
pub(super) fn needs_interrupt(
    queue: &mut Queue,
    memory: &GuestMemory,
    used_before: u16,
) -> Result<bool, RingError> {
    let used_now = queue.next_used();
    if used_now == used_before {
        return Ok(false);
    }
    if !queue.event_idx_enabled() {
        return queue
            .needs_notification(memory)
            .map_err(RingError::Available);
    }
    // The used ring is written before the driver's wish is read.
    fence(Ordering::SeqCst);
    let wish = queue.avail_ring() + AVAIL_ENTRIES + AVAIL_ENTRY_BYTES * u64::from(queue.size());
    let used_event: u16 = memory
        .load(GuestAddress(wish), Ordering::Relaxed)
        .map_err(|error| RingError::Available(virtio_queue::Error::GuestMemory(error)))?;
    // Whether the entry that it names is among them (2.7.10, vring_need_event of Linux).
    let behind = used_now.wrapping_sub(u16::from_le(used_event));
    Ok(behind.wrapping_sub(1) < used_now.wrapping_sub(used_before))
}

#[cfg(test)]
mod tests {
    use super::*;
    use virtio_queue::desc::{RawDescriptor, split::Descriptor};
    use virtio_queue::mock::MockSplitQueue;

    const SERVED: Served = Served {
        used_bytes: 1,
        cost_bytes: 100,
    };

    fn memory() -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), 0x10_000)]).unwrap()
    }

    /// A queue of 16 with `count` chains of one descriptor.
    fn queue_with(driver: &MockSplitQueue<'_, GuestMemory>, count: u16) -> Queue {
        let chains: Vec<_> = (0..count)
            .map(|_| RawDescriptor::from(Descriptor::new(0x1000, 1, 2, 0)))
            .collect();
        driver.add_desc_chains(&chains, 0).unwrap();
        driver.create_queue().unwrap()
    }

    #[test]
    fn everything_available_is_served_and_used() {
        let memory = memory();
        let driver = MockSplitQueue::create(&memory, GuestAddress(0x100), 16);
        let mut queue = queue_with(&driver, 5);
        let mut heads = Vec::new();
        let progress = drain(&mut queue, &memory, Budget::SLICE, None, |chain| {
            heads.push(chain.head_index());
            Some(SERVED)
        })
        .unwrap();
        assert_eq!(
            progress,
            Progress {
                interrupt: true,
                ..Progress::default()
            }
        );
        assert_eq!(heads, [0, 1, 2, 3, 4]);
        assert_eq!(driver.used().idx().load(), 5);
    }

    #[test]
    fn chains_of_one_frame_are_put_into_the_used_ring_in_order_and_across_its_end() {
        let memory = memory();
        let driver = MockSplitQueue::create(&memory, GuestAddress(0x100), 16);
        let mut queue = queue_with(&driver, 16);
        queue.set_next_used(14);
        publish(&mut queue, &memory, &[(3, 30), (4, 40), (5, 50)]).unwrap();
        assert_eq!(queue.next_used(), 17);
        assert_eq!(driver.used().idx().load(), 17);
        let used: Vec<_> = [14, 15, 0]
            .map(|index| driver.used().ring().ref_at(index).unwrap().load())
            .map(|element| (element.id(), element.len()))
            .into();
        assert_eq!(used, [(3, 30), (4, 40), (5, 50)]);
        publish(&mut queue, &memory, &[]).unwrap();
        assert_eq!(queue.next_used(), 17);
    }

    #[test]
    fn a_driver_is_interrupted_for_the_entry_that_it_named_and_for_none_before() {
        let memory = memory();
        let driver = MockSplitQueue::create(&memory, GuestAddress(0x100), 16);
        let mut queue = queue_with(&driver, 16);
        queue.set_event_idx(true);
        // The mock leaves no room for the driver's wish behind its available ring.
        queue.set_avail_ring_address(Some(0x8000), Some(0));
        let wish = GuestAddress(queue.avail_ring() + 4 + 2 * 16);
        memory.write_obj(2_u16, wish).unwrap();
        assert!(!needs_interrupt(&mut queue, &memory, 0).unwrap());
        publish(&mut queue, &memory, &[(0, 1), (1, 1)]).unwrap();
        assert!(!needs_interrupt(&mut queue, &memory, 0).unwrap());
        // Named, though it is not the last one that was put.
        publish(&mut queue, &memory, &[(2, 1), (3, 1)]).unwrap();
        assert!(needs_interrupt(&mut queue, &memory, 2).unwrap());
        publish(&mut queue, &memory, &[(4, 1)]).unwrap();
        assert!(!needs_interrupt(&mut queue, &memory, 4).unwrap());
    }

    #[test]
    fn an_empty_queue_raises_no_interrupt() {
        let memory = memory();
        let driver = MockSplitQueue::create(&memory, GuestAddress(0x100), 16);
        let mut queue = queue_with(&driver, 0);
        let progress = drain(&mut queue, &memory, Budget::SLICE, None, |_| Some(SERVED)).unwrap();
        assert_eq!(progress, Progress::default());
    }

    #[test]
    fn a_spent_budget_leaves_the_rest_for_the_next_turn() {
        let memory = memory();
        let driver = MockSplitQueue::create(&memory, GuestAddress(0x100), 16);
        let mut queue = queue_with(&driver, 5);
        let by_chains = Budget {
            chains: 2,
            cost_bytes: u64::MAX,
        };
        let first = drain(&mut queue, &memory, by_chains, None, |_| Some(SERVED)).unwrap();
        assert_eq!(
            first,
            Progress {
                interrupt: true,
                more: true,
                starved: false
            }
        );
        let by_bytes = Budget {
            chains: 9,
            cost_bytes: 150,
        };
        let second = drain(&mut queue, &memory, by_bytes, None, |_| Some(SERVED)).unwrap();
        assert!(second.more);
        assert_eq!(driver.used().idx().load(), 4);
        let last = drain(&mut queue, &memory, Budget::SLICE, None, |_| Some(SERVED)).unwrap();
        assert_eq!(
            last,
            Progress {
                interrupt: true,
                ..Progress::default()
            }
        );
    }

    #[test]
    fn a_chain_that_the_device_keeps_is_used_first_in_a_later_turn() {
        let memory = memory();
        let driver = MockSplitQueue::create(&memory, GuestAddress(0x100), 16);
        let mut queue = queue_with(&driver, 3);
        let mut kept = None;
        let progress = drain(&mut queue, &memory, Budget::SLICE, None, |chain| {
            kept = Some(chain.head_index());
            None
        })
        .unwrap();
        let starved = Progress {
            starved: true,
            ..Progress::default()
        };
        assert_eq!((progress, kept), (starved, Some(0)));
        assert_eq!(driver.used().idx().load(), 0);

        let finished = kept.map(|head| Finished {
            head,
            served: SERVED,
        });
        let mut heads = Vec::new();
        let progress = drain(&mut queue, &memory, Budget::SLICE, finished, |chain| {
            heads.push(chain.head_index());
            Some(SERVED)
        })
        .unwrap();
        assert!(progress.interrupt && !progress.starved);
        assert_eq!(heads, [1, 2], "each chain once");
        assert_eq!(driver.used().idx().load(), 3);
        assert_eq!(driver.used().ring().ref_at(0).unwrap().load().id(), 0);
    }

    #[test]
    fn with_event_suppression_the_driver_says_when_to_interrupt() {
        let memory = memory();
        let driver = MockSplitQueue::create(&memory, GuestAddress(0x100), 16);
        let mut queue = queue_with(&driver, 3);
        queue.set_event_idx(true);
        // The mock's own used ring begins inside of its available ring, before used_event.
        queue
            .try_set_used_ring_address(GuestAddress(0x3000))
            .unwrap();
        // used_event = 9: the driver wants to hear of the tenth used buffer only.
        let used_event = driver.avail_addr().0 + 4 + 2 * 16;
        memory.write_obj(9_u16, GuestAddress(used_event)).unwrap();
        let progress = drain(&mut queue, &memory, Budget::SLICE, None, |_| Some(SERVED)).unwrap();
        assert_eq!(progress, Progress::default());
    }

    #[test]
    fn an_available_index_too_far_ahead_is_an_error() {
        let memory = memory();
        let driver = MockSplitQueue::create(&memory, GuestAddress(0x100), 16);
        let mut queue = queue_with(&driver, 1);
        driver.avail().idx().store(17);
        let broken = drain(&mut queue, &memory, Budget::SLICE, None, |_| Some(SERVED));
        assert!(matches!(broken, Err(RingError::Available(_))));
    }

    #[test]
    fn a_head_that_is_no_descriptor_is_an_error() {
        let memory = memory();
        let driver = MockSplitQueue::create(&memory, GuestAddress(0x100), 16);
        let mut queue = queue_with(&driver, 1);
        driver.avail().ring().ref_at(0).unwrap().store(16);
        let broken = drain(&mut queue, &memory, Budget::SLICE, None, |_| Some(SERVED));
        assert!(matches!(
            broken,
            Err(RingError::Head { head: 16, size: 16 })
        ));
    }
}
