//! Frames from the link to the guest.

use std::collections::VecDeque;
use std::fmt;
use std::io;

use thiserror::Error;
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestMemoryError};

use super::super::chain::{Buffers, ChainError};
use super::super::ring;
use super::super::segments::Segments;
use super::super::{Budget, Progress, RingError, Served, Throttle};
use super::{FRAME_BYTES_MAX, HEADER_BYTES, Link, Side};

/// Where the header says how many chains the frame is in (5.1.6).
const COUNT_AT: usize = 10;
/// Errors of the link in a turn after which it is left alone until it wakes the queue again. One is a
/// frame's own; a device that was removed has nothing else any more.
const ERRORS_MAX: u32 = 16;

/// The way of frames to the guest. One is in hand at a time, and lies here until there are chains,
/// memory and tokens for it.
pub(super) struct Receiver {
    pub(super) throttle: Throttle,
    frame: Vec<u8>,
    /// Bytes of the frame in hand; 0 where there is none.
    length_bytes: usize,
    /// Bytes of it that are in guest memory.
    done_bytes: usize,
    /// The limit let it pass.
    is_admitted: bool,
    /// Chains that were taken off the ring and are not filled yet.
    chains: VecDeque<Chain>,
}

struct Chain {
    head: u16,
    room: Segments,
    room_bytes: usize,
    descriptors: usize,
}

/// Why a frame or a chain is not used.
#[derive(Debug, Error)]
enum Problem {
    #[error("receive {0}")]
    Chain(#[from] ChainError),
    #[error("receive chain with a readable buffer")]
    Readable,
    #[error("frame of {0} bytes dropped: the driver's buffers are smaller")]
    TooSmall(usize),
    #[error("receive buffer: {0}")]
    Memory(#[from] GuestMemoryError),
    #[error("tap device: {0}")]
    Link(#[from] io::Error),
}

/// What the link had.
enum Fetched {
    /// A frame is in hand.
    Frame,
    /// Something that is no frame.
    Useless,
    /// Nothing. It wakes the queue when it has.
    Nothing,
}

/// Whether there are chains for the frame.
enum Gathered {
    /// So many.
    All(usize),
    /// The driver's doorbell will tell of more.
    Waiting,
    /// The turn is over.
    OutOfTurn,
    /// There never will be.
    TooSmall,
}

/// How far a frame was copied.
enum Filled {
    All,
    /// There is no memory for the rest now.
    Starved,
    /// The turn is over.
    OutOfTurn,
}

impl Receiver {
    pub(super) fn new(throttle: Throttle) -> Receiver {
        Receiver {
            throttle,
            // Of zeros: pages that no frame was long enough for are never taken.
            frame: vec![0; FRAME_BYTES_MAX],
            length_bytes: 0,
            done_bytes: 0,
            is_admitted: false,
            chains: VecDeque::new(),
        }
    }

    /// Lets go of the frame in hand and of all chains.
    pub(super) fn forget(&mut self) {
        self.drop_frame();
        self.chains.clear();
    }

    fn drop_frame(&mut self) {
        self.length_bytes = 0;
        self.done_bytes = 0;
        self.is_admitted = false;
    }

    pub(super) fn serve<F: FnMut(&dyn fmt::Display)>(
        &mut self,
        link: &mut impl Link,
        side: &mut Side<'_, F>,
        is_mergeable: bool,
    ) -> Result<Progress, RingError> {
        let mut progress = Progress::default();
        if !side.queue.ready() {
            return Ok(progress);
        }
        let used_before = side.queue.next_used();
        // Its chains are frames here. Chains and their parts count as bytes.
        let mut budget = Budget::SLICE;
        let mut errors = 0;
        loop {
            if budget.is_spent() {
                progress.more = true;
                break;
            }
            match self.fetch(link, side, &mut errors) {
                Fetched::Frame => {}
                Fetched::Useless => {
                    budget.spend(cost(1));
                    continue;
                }
                Fetched::Nothing => break,
            }
            let length_bytes = self.length_bytes;
            match self.gather(side, is_mergeable, &mut budget)? {
                Gathered::All(count) => {
                    if !self.admit() {
                        break;
                    }
                    match self.fill(side, count, &mut budget) {
                        Filled::All => self.publish(side, count)?,
                        Filled::Starved => {
                            progress.starved = true;
                            break;
                        }
                        Filled::OutOfTurn => {
                            progress.more = true;
                            break;
                        }
                    }
                }
                Gathered::TooSmall => {
                    (side.complain)(&Problem::TooSmall(length_bytes));
                    self.drop_frame();
                }
                Gathered::Waiting => break,
                Gathered::OutOfTurn => {
                    progress.more = true;
                    break;
                }
            }
            budget.spend(cost(length_bytes as u64));
        }
        progress.interrupt = ring::needs_interrupt(side.queue, side.memory, used_before)?;
        Ok(progress)
    }

    /// Takes a frame from the link, unless one is in hand.
    fn fetch<F: FnMut(&dyn fmt::Display)>(
        &mut self,
        link: &mut impl Link,
        side: &mut Side<'_, F>,
        errors: &mut u32,
    ) -> Fetched {
        if self.length_bytes > 0 {
            return Fetched::Frame;
        }
        match link.receive(&mut self.frame) {
            Ok(length_bytes) if length_bytes > HEADER_BYTES => {
                self.length_bytes = length_bytes.min(FRAME_BYTES_MAX);
                Fetched::Frame
            }
            // A header without a frame.
            Ok(_) => Fetched::Useless,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Fetched::Nothing,
            Err(error) => {
                (side.complain)(&Problem::Link(error));
                *errors += 1;
                // What lies behind it wakes nobody: the link is watched edge-triggered.
                if *errors < ERRORS_MAX {
                    Fetched::Useless
                } else {
                    Fetched::Nothing
                }
            }
        }
    }

    /// Whether the limit lets the frame in hand pass now. Asked once there is room for it: a frame
    /// that is dropped costs no tokens.
    fn admit(&mut self) -> bool {
        if !self.is_admitted {
            self.is_admitted = self.throttle.take(self.length_bytes as u64);
        }
        self.is_admitted
    }

    /// Takes chains off the ring until there is room for the frame.
    fn gather<F: FnMut(&dyn fmt::Display)>(
        &mut self,
        side: &mut Side<'_, F>,
        is_mergeable: bool,
        budget: &mut Budget,
    ) -> Result<Gathered, RingError> {
        loop {
            if let Some(count) = self.enough(is_mergeable) {
                return Ok(Gathered::All(count));
            }
            if !is_mergeable && !self.chains.is_empty() {
                return Ok(Gathered::TooSmall);
            }
            if budget.is_spent() {
                return Ok(Gathered::OutOfTurn);
            }
            let (queue, memory) = (&mut *side.queue, side.memory);
            queue
                .disable_notification(memory)
                .map_err(RingError::Used)?;
            let Some(chain) = ring::next_chain(queue, memory)? else {
                if queue.enable_notification(memory).map_err(RingError::Used)? {
                    continue;
                }
                return Ok(self.wait_or_drop(queue.size()));
            };
            let head = chain.head_index();
            let mut descriptors = 0;
            let room = match Buffers::of(chain.inspect(|_| descriptors += 1)) {
                Ok(buffers) if buffers.readable.parts().is_empty() => Ok(buffers.writable),
                Ok(_) => Err(Problem::Readable),
                Err(error) => Err(Problem::Chain(error)),
            };
            budget.spend_bytes(Budget::PART_COST_BYTES * descriptors as u64);
            match room {
                Ok(room) => {
                    let room_bytes = usize::try_from(room.length_bytes()).unwrap_or(usize::MAX);
                    self.chains.push_back(Chain {
                        head,
                        room,
                        room_bytes,
                        descriptors,
                    });
                }
                Err(problem) => {
                    (side.complain)(&problem);
                    queue.add_used(memory, head, 0).map_err(RingError::Used)?;
                }
            }
        }
    }

    /// What becomes of a frame that all chains of the ring are too small for.
    ///
    /// A driver that has given half of its descriptors for it may have no more to give: those left
    /// may be fewer than its chains take. It gets none back before the frame is in them, so waiting
    /// could be for ever. With fewer it waits: one that keeps its ring full always has more.
    fn wait_or_drop(&self, queue_size: u16) -> Gathered {
        let held: usize = self.chains.iter().map(|chain| chain.descriptors).sum();
        if held * 2 >= usize::from(queue_size) {
            Gathered::TooSmall
        } else {
            Gathered::Waiting
        }
    }

    /// How many of the chains at hand the frame takes, if they are enough.
    fn enough(&self, is_mergeable: bool) -> Option<usize> {
        let most = if is_mergeable { self.chains.len() } else { 1 };
        let mut room_bytes = 0_usize;
        for (index, chain) in self.chains.iter().take(most).enumerate() {
            room_bytes = room_bytes.saturating_add(chain.room_bytes);
            if room_bytes >= self.length_bytes {
                return Some(index + 1);
            }
        }
        None
    }

    /// Copies the frame into the first `count` chains, behind what is copied already.
    fn fill<F: FnMut(&dyn fmt::Display)>(
        &mut self,
        side: &mut Side<'_, F>,
        count: usize,
        budget: &mut Budget,
    ) -> Filled {
        // At most as many as a queue has descriptors.
        let number = u16::try_from(count).unwrap_or(u16::MAX).to_le_bytes();
        self.frame[COUNT_AT..HEADER_BYTES].copy_from_slice(&number);
        let frame = &self.frame[..self.length_bytes];
        let mut chain_start = 0_usize;
        for chain in self.chains.iter().take(count) {
            let chain_end = frame
                .len()
                .min(chain_start.saturating_add(chain.room_bytes));
            let skip_bytes = self.done_bytes.saturating_sub(chain_start) as u64;
            for piece in chain.room.pieces(skip_bytes, side.leave.page_bytes()) {
                let room_bytes = usize::try_from(piece.length_bytes).unwrap_or(usize::MAX);
                let now_end = chain_end.min(self.done_bytes.saturating_add(room_bytes));
                if self.done_bytes >= now_end {
                    break;
                }
                if budget.is_spent() {
                    return Filled::OutOfTurn;
                }
                let now = &frame[self.done_bytes..now_end];
                if !side.leave.take(piece.address, now.len() as u64) {
                    return Filled::Starved;
                }
                budget.spend_bytes(Budget::PART_COST_BYTES);
                self.done_bytes = now_end;
                if let Err(error) = side.memory.write_slice(now, piece.address) {
                    // The guest's own fault: it gets its chain, with whatever is in it.
                    (side.complain)(&Problem::Memory(error));
                    self.done_bytes = chain_end;
                }
            }
            chain_start = chain_end;
        }
        Filled::All
    }

    /// Gives the first `count` chains back with the frame in them.
    fn publish<F>(&mut self, side: &mut Side<'_, F>, count: usize) -> Result<(), RingError> {
        let mut left_bytes = self.length_bytes;
        let used: Vec<(u16, u32)> = self
            .chains
            .drain(..count)
            .map(|chain| {
                let bytes = left_bytes.min(chain.room_bytes);
                left_bytes -= bytes;
                // A frame has fewer than 2^17 bytes.
                (chain.head, u32::try_from(bytes).unwrap_or(u32::MAX))
            })
            .collect();
        self.drop_frame();
        ring::publish(side.queue, side.memory, &used)
    }
}

fn cost(cost_bytes: u64) -> Served {
    Served {
        used_bytes: 0,
        cost_bytes,
    }
}
