//! virtio-entropy: random bytes of the host's kernel (virtio 1.2, section 5.4).
//!
//! One queue of buffers to fill. A request gets [`REQUEST_BYTES_MAX`] at most, however much room it
//! has, which the specification allows.

use std::fmt;
use std::io;
use std::sync::Arc;

use rustix::rand::{GetRandomFlags, getrandom};
use thiserror::Error;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{DescriptorChain, Queue};
use vm_memory::{Bytes, GuestMemoryError};

use super::chain::{Buffers, CHAIN_LENGTH_MAX, ChainError};
use super::ring::{self, Finished};
use super::segments::Segments;
use super::{
    Activation, Allowance, Budget, Device, GuestMemory, LogLimit, Progress, RingError, Served,
    Throttle, Waker,
};

/// Most bytes for a request, as in Firecracker: a guest may offer gigabytes.
const REQUEST_BYTES_MAX: u64 = 64 << 10;
/// What a random byte costs of a turn, in bytes moved: the kernel makes some 400 MB/s of them.
const BYTE_COST: u64 = 8;
/// What a buffer costs beside its bytes: the host is asked for each, and a call takes some 0.3 us.
const BUFFER_COST: u64 = 1024;
/// Bytes that are made at a time, on the stack.
const CHUNK_BYTES: usize = 4096;

/// Fills a buffer with random bytes.
type Source = fn(&mut [u8]) -> io::Result<()>;

/// An entropy device.
pub struct Entropy {
    throttle: Throttle,
    source: Source,
    allowance: Arc<dyn Allowance>,
    active: Option<Active>,
    log_limit: LogLimit,
}

struct Active {
    memory: Arc<GuestMemory>,
    queue: Queue,
    label: Arc<str>,
    /// A request that waits for tokens or for memory, to be gone on with first.
    taken: Option<Taken>,
}

/// A request that was taken off the ring.
struct Taken {
    head: u16,
    room: Segments,
    /// The limit let it pass.
    is_admitted: bool,
    done_bytes: u64,
}

/// Why a request gets nothing, or not all.
#[derive(Debug, Error)]
enum Failure {
    #[error("entropy request: {0}")]
    Chain(#[from] ChainError),
    #[error("entropy request with a readable buffer")]
    Readable,
    #[error("entropy buffer: {0}")]
    Memory(#[from] GuestMemoryError),
    #[error("no random bytes from the host: {0}")]
    Source(#[from] io::Error),
}

impl fmt::Debug for Entropy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entropy")
            .field("throttle", &self.throttle)
            .field("is_active", &self.active.is_some())
            .finish_non_exhaustive()
    }
}

impl Entropy {
    /// A device that no driver has set up, and that takes memory by leave of `allowance`.
    pub fn new(throttle: Throttle, allowance: Arc<dyn Allowance>) -> Entropy {
        Entropy {
            throttle,
            source: fill_from_kernel,
            allowance,
            active: None,
            log_limit: LogLimit::new(),
        }
    }
}

/// Asks the host's kernel, which has random bytes without end once it has booted. It is not waited
/// for where it has none: this is the event loop.
fn fill_from_kernel(mut bytes: &mut [u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let filled =
            rustix::io::retry_on_intr(|| getrandom(&mut *bytes, GetRandomFlags::NONBLOCK))?;
        bytes = &mut bytes[filled..];
    }
    Ok(())
}

impl Device for Entropy {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[CHAIN_LENGTH_MAX]
    }

    /// It has none (5.4.4).
    fn read_config(&self, _offset: u64, bytes: &mut [u8]) {
        bytes.fill(0);
    }

    fn activate(&mut self, activation: Activation) {
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
            throttle: &self.throttle,
            source: self.source,
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
        // The limit's timer rings by itself.
        Ok(Progress {
            starved: service.is_starved,
            ..drained
        })
    }

    fn wakers(&self) -> Vec<Waker> {
        let fd = self.throttle.waker();
        vec![Waker { fd, queue: 0 }]
    }

    fn reset(&mut self) {
        self.active = None;
    }
}

/// What a turn serves requests with.
struct Service<'a, F> {
    throttle: &'a Throttle,
    source: Source,
    memory: &'a GuestMemory,
    allowance: &'a dyn Allowance,
    complain: F,
    /// A request waits for memory.
    is_starved: bool,
}

impl<F: FnMut(&dyn fmt::Display)> Service<'_, F> {
    /// Serves one request. `None` if it waits for tokens or memory: it lies in `taken` then.
    fn serve(
        &mut self,
        chain: &DescriptorChain<&GuestMemory>,
        taken: &mut Option<Taken>,
    ) -> Option<Served> {
        let room = match room_of(chain) {
            Ok(room) => room,
            Err(failure) => {
                // Back with nothing written, so that the driver gets its buffers again.
                (self.complain)(&failure);
                return Some(answer(&Segments::default(), 0));
            }
        };
        let mut this = Taken {
            head: chain.head_index(),
            room,
            is_admitted: false,
            done_bytes: 0,
        };
        let served = self.go_on(&mut this);
        if served.is_none() {
            *taken = Some(this);
        }
        served
    }

    /// Goes on where an earlier turn stopped. `None` if it waits for tokens or memory.
    fn go_on(&mut self, taken: &mut Taken) -> Option<Served> {
        if !taken.is_admitted {
            taken.is_admitted = self.throttle.take(taken.room.length_bytes());
            if !taken.is_admitted {
                return None;
            }
        }
        let pieces = taken
            .room
            .pieces(taken.done_bytes, self.allowance.page_bytes());
        for piece in pieces {
            if !self.allowance.take(piece.memory_bytes) {
                self.is_starved = true;
                return None;
            }
            match self.fill(piece.address, piece.length_bytes) {
                Ok(()) => taken.done_bytes += piece.length_bytes,
                Err(failure) => {
                    (self.complain)(&failure);
                    break;
                }
            }
        }
        Some(answer(&taken.room, taken.done_bytes))
    }

    fn fill(&mut self, address: vm_memory::GuestAddress, length_bytes: u64) -> Result<(), Failure> {
        let mut chunk = [0; CHUNK_BYTES];
        let mut done_bytes = 0;
        while done_bytes < length_bytes {
            let left = usize::try_from(length_bytes - done_bytes).unwrap_or(CHUNK_BYTES);
            let now = &mut chunk[..left.min(CHUNK_BYTES)];
            (self.source)(now)?;
            // No wrap: the end of the buffer does not.
            let at = vm_memory::GuestAddress(address.0 + done_bytes);
            self.memory.write_slice(now, at)?;
            done_bytes += now.len() as u64;
        }
        Ok(())
    }
}

/// Where a request's bytes go.
fn room_of(chain: &DescriptorChain<&GuestMemory>) -> Result<Segments, Failure> {
    let Buffers { readable, writable } = Buffers::of(chain.clone())?;
    if !readable.parts().is_empty() {
        return Err(Failure::Readable);
    }
    let mut room = writable;
    // One that is shorter stays whole.
    Ok(room.take_front(REQUEST_BYTES_MAX).unwrap_or(room))
}

fn answer(room: &Segments, written_bytes: u64) -> Served {
    let buffers = room.parts().len() as u64;
    Served {
        used_bytes: u32::try_from(written_bytes).unwrap_or(u32::MAX),
        cost_bytes: 1 + BUFFER_COST * buffers + BYTE_COST * written_bytes,
    }
}

#[cfg(test)]
mod tests;
