//! Frames from the guest to the link.

use std::fmt;
use std::io;

use thiserror::Error;
use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestMemoryError};

use super::super::chain::{Buffers, CHAIN_LENGTH_MAX, ChainError};
use super::super::leave::Leave;
use super::super::ring::{self, Finished};
use super::super::segments::Segments;
use super::super::{Budget, GuestMemory, Progress, RingError, Served, Throttle};
use super::{FRAME_BYTES_MAX, HEADER_BYTES, Link, Side};

/// The way of the guest's frames. One is in hand at a time.
pub(super) struct Sender {
    pub(super) throttle: Throttle,
    frame: Vec<u8>,
    /// A frame that waits for tokens or for memory.
    taken: Option<Taken>,
}

struct Taken {
    head: u16,
    data: Segments,
    /// The limit let it pass.
    is_admitted: bool,
    /// Bytes of it that are in [`Sender::frame`].
    done_bytes: usize,
}

/// What frames are sent with in a turn.
struct Service<'a, L, F> {
    sender: &'a mut Sender,
    link: &'a mut L,
    memory: &'a GuestMemory,
    leave: &'a mut Leave<'a>,
    complain: &'a mut F,
    /// A frame waits for memory.
    is_starved: bool,
}

/// Why a frame is not sent. The driver gets its buffers back all the same, as from a network that
/// lost it.
#[derive(Debug, Error)]
enum Problem {
    #[error("send {0}")]
    Chain(#[from] ChainError),
    #[error("send chain with a writable buffer")]
    Writable,
    #[error(
        "frame of {0} bytes dropped: not {HEADER_BYTES} of header and more, to {FRAME_BYTES_MAX}"
    )]
    Length(u64),
    #[error("send buffer: {0}")]
    Memory(#[from] GuestMemoryError),
    #[error("frame dropped: tap device: {0}")]
    Link(#[from] io::Error),
}

impl Sender {
    pub(super) fn new(throttle: Throttle) -> Sender {
        Sender {
            throttle,
            frame: vec![0; FRAME_BYTES_MAX],
            taken: None,
        }
    }

    /// Lets go of the frame that waits.
    pub(super) fn forget(&mut self) {
        self.taken = None;
    }

    pub(super) fn serve<F: FnMut(&dyn fmt::Display)>(
        &mut self,
        link: &mut impl Link,
        side: Side<'_, F>,
    ) -> Result<Progress, RingError> {
        let Side {
            queue,
            memory,
            mut leave,
            mut complain,
        } = side;
        let mut service = Service {
            sender: self,
            link,
            memory,
            leave: &mut leave,
            complain: &mut complain,
            is_starved: false,
        };
        let mut finished = None;
        if let Some(kept) = service.sender.taken.take() {
            let head = kept.head;
            let Some(served) = service.go_on(kept) else {
                return Ok(Progress {
                    starved: service.is_starved,
                    ..Progress::default()
                });
            };
            finished = Some(Finished { head, served });
        }
        let drained = ring::drain(queue, memory, Budget::SLICE, finished, |chain| {
            service.send(&chain)
        })?;
        // What waits for tokens waits for the limit's timer, which rings by itself.
        Ok(Progress {
            starved: service.is_starved,
            ..drained
        })
    }
}

impl<L: Link, F: FnMut(&dyn fmt::Display)> Service<'_, L, F> {
    fn send(&mut self, chain: &DescriptorChain<&GuestMemory>) -> Option<Served> {
        match data_of(chain) {
            Ok(data) => self.go_on(Taken {
                head: chain.head_index(),
                data,
                is_admitted: false,
                done_bytes: 0,
            }),
            Err(problem) => {
                (self.complain)(&problem);
                // It may have been followed to its end.
                Some(answer(0, CHAIN_LENGTH_MAX.into()))
            }
        }
    }

    /// Sends a frame, unless it waits for tokens or for memory: it lies in `taken` then.
    fn go_on(&mut self, mut frame: Taken) -> Option<Served> {
        let length_bytes = frame.data.length_bytes();
        frame.is_admitted = frame.is_admitted || self.sender.throttle.take(length_bytes);
        if !frame.is_admitted {
            self.sender.taken = Some(frame);
            return None;
        }
        match self.copy(&mut frame) {
            Ok(true) => {
                let bytes = &self.sender.frame[..frame.done_bytes];
                if let Err(error) = self.link.send(bytes) {
                    (self.complain)(&Problem::Link(error));
                }
            }
            Ok(false) => {
                self.is_starved = true;
                self.sender.taken = Some(frame);
                return None;
            }
            Err(error) => (self.complain)(&Problem::Memory(error)),
        }
        Some(answer(length_bytes, frame.data.parts().len()))
    }

    /// Copies the rest of a frame out of guest memory. False if there is no leave for it now: memory
    /// that the guest never touched is given to it by being read.
    fn copy(&mut self, frame: &mut Taken) -> Result<bool, GuestMemoryError> {
        let pieces = frame
            .data
            .pieces(frame.done_bytes as u64, self.leave.page_bytes());
        for piece in pieces {
            if !self.leave.take(piece.address, piece.length_bytes) {
                return Ok(false);
            }
            // No longer than a frame: `data_of` saw to it.
            let length = usize::try_from(piece.length_bytes).unwrap_or_default();
            let end = frame.done_bytes + length;
            let now = &mut self.sender.frame[frame.done_bytes..end];
            self.memory.read_slice(now, piece.address)?;
            frame.done_bytes = end;
        }
        Ok(true)
    }
}

/// A chain's frame, of a length that can be one.
fn data_of(chain: &DescriptorChain<&GuestMemory>) -> Result<Segments, Problem> {
    let Buffers { readable, writable } = Buffers::of(chain.clone())?;
    if !writable.parts().is_empty() {
        return Err(Problem::Writable);
    }
    let length_bytes = readable.length_bytes();
    let lengths = HEADER_BYTES as u64 + 1..=FRAME_BYTES_MAX as u64;
    if !lengths.contains(&length_bytes) {
        return Err(Problem::Length(length_bytes));
    }
    Ok(readable)
}

fn answer(sent_bytes: u64, parts: usize) -> Served {
    Served {
        used_bytes: 0,
        cost_bytes: 1 + sent_bytes + Budget::PART_COST_BYTES * parts as u64,
    }
}
