//! Packets between the rings and the connections, in one turn.

use thiserror::Error;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::super::chain::{Buffers, CHAIN_LENGTH_MAX, ChainError};
use super::super::leave::Leave;
use super::super::ring::{self, Finished};
use super::super::segments::Segments;
use super::super::{Budget, GuestMemory, Progress, RingError, Served};
use super::connections::{Complain, Connections};
use super::host::VsockHost;
use super::packet::{DATA_BYTES_MAX, HEADER_BYTES};

/// Most bytes of a packet.
pub(super) const PACKET_BYTES_MAX: usize = HEADER_BYTES + DATA_BYTES_MAX;

/// A chain that was taken off its ring, and how far its bytes were moved.
pub(super) struct Transfer {
    head: u16,
    segments: Segments,
    done_bytes: usize,
}

/// What a turn works with.
pub(super) struct Turn<'a, H> {
    pub(super) connections: &'a mut Connections<H>,
    pub(super) memory: &'a GuestMemory,
    pub(super) leave: Leave<'a>,
    pub(super) complain: Complain<'a>,
    pub(super) is_starved: bool,
}

/// Why a chain is not used. The driver gets it back all the same.
#[derive(Debug, Error)]
enum Problem {
    #[error("vsock {0}")]
    Chain(#[from] ChainError),
    #[error("vsock chain with a buffer of the wrong direction")]
    Direction,
    #[error("vsock chain of {0} bytes: not {HEADER_BYTES} to {PACKET_BYTES_MAX}")]
    Length(u64),
    #[error("vsock buffer: {0}")]
    Memory(#[from] GuestMemoryError),
}

impl<H: VsockHost> Turn<'_, H> {
    /// Takes the guest's packets.
    pub(super) fn send(
        &mut self,
        queue: &mut Queue,
        taken: &mut Option<Transfer>,
        packet: &mut [u8],
    ) -> Result<Progress, RingError> {
        let mut finished = None;
        if let Some(mut kept) = taken.take() {
            let head = kept.head;
            let Some(served) = self.go_on(&mut kept, packet) else {
                *taken = Some(kept);
                return Ok(Progress::default());
            };
            finished = Some(Finished { head, served });
        }
        ring::drain(queue, self.memory, Budget::SLICE, finished, |chain| {
            let head = chain.head_index();
            match buffers_of(chain.clone(), false) {
                Ok(segments) => {
                    let done_bytes = 0;
                    let mut transfer = Transfer {
                        head,
                        segments,
                        done_bytes,
                    };
                    let served = self.go_on(&mut transfer, packet);
                    if served.is_none() {
                        *taken = Some(transfer);
                    }
                    served
                }
                Err(problem) => {
                    (self.complain)(&problem);
                    // It may have been followed to its end.
                    Some(served(0, CHAIN_LENGTH_MAX.into()))
                }
            }
        })
    }

    /// Takes a packet, unless it waits for memory, or for the guest to take resets.
    fn go_on(&mut self, transfer: &mut Transfer, packet: &mut [u8]) -> Option<Served> {
        let memory = self.memory;
        let length = usize::try_from(transfer.segments.length_bytes()).unwrap_or(PACKET_BYTES_MAX);
        let moved = self.transfer(transfer, &mut packet[..length], |bytes, address| {
            memory.read_slice(bytes, address)
        });
        match moved {
            Ok(true) if self.connections.is_congested() => return None,
            Ok(true) => self.connections.receive(&packet[..length], self.complain),
            Ok(false) => {
                self.is_starved = true;
                return None;
            }
            Err(error) => (self.complain)(&Problem::Memory(error)),
        }
        Some(served(length, transfer.segments.parts().len()))
    }

    /// Gives the guest its packets, while it has room for them.
    pub(super) fn receive(
        &mut self,
        queue: &mut Queue,
        room: &mut Option<(Transfer, usize)>,
        packet: &mut [u8],
    ) -> Result<Progress, RingError> {
        let mut progress = Progress::default();
        if !queue.ready() {
            return Ok(progress);
        }
        let used_before = queue.next_used();
        let mut budget = Budget::SLICE;
        loop {
            if budget.is_spent() {
                progress.more = true;
                break;
            }
            let in_hand = match room.take() {
                None if !self.connections.wants() => break,
                None => self.next_room(queue, &mut budget)?.map(|chain| (chain, 0)),
                kept => kept,
            };
            let Some((mut chain, mut length)) = in_hand else {
                break;
            };
            if length == 0 {
                length = self.next_packet(&chain, packet);
            }
            if length == 0 {
                // There was none after all: the chain is for the next one.
                *room = Some((chain, 0));
                break;
            }
            let memory = self.memory;
            let moved = self.transfer(&mut chain, &mut packet[..length], |bytes, address| {
                memory.write_slice(bytes, address)
            });
            match moved {
                Ok(true) => {}
                Ok(false) => {
                    self.is_starved = true;
                    *room = Some((chain, length));
                    break;
                }
                // The guest's own fault: it gets its chain, with whatever is in it.
                Err(error) => (self.complain)(&Problem::Memory(error)),
            }
            // A packet has fewer than 2^17 bytes.
            let used_bytes = u32::try_from(length).unwrap_or(u32::MAX);
            queue
                .add_used(self.memory, chain.head, used_bytes)
                .map_err(RingError::Used)?;
            budget.spend(served(length, 0));
        }
        progress.interrupt = ring::needs_interrupt(queue, self.memory, used_before)?;
        Ok(progress)
    }

    /// Takes a chain with room for a packet off the ring. Where there is none, its doorbell will tell.
    fn next_room(
        &mut self,
        queue: &mut Queue,
        budget: &mut Budget,
    ) -> Result<Option<Transfer>, RingError> {
        let memory = self.memory;
        while !budget.is_spent() {
            queue
                .disable_notification(memory)
                .map_err(RingError::Used)?;
            let Some(chain) = ring::next_chain(queue, memory)? else {
                if queue.enable_notification(memory).map_err(RingError::Used)? {
                    continue;
                }
                break;
            };
            let head = chain.head_index();
            match buffers_of(chain, true) {
                Ok(segments) => {
                    budget.spend_bytes(Budget::PART_COST_BYTES * segments.parts().len() as u64);
                    return Ok(Some(Transfer {
                        head,
                        segments,
                        done_bytes: 0,
                    }));
                }
                Err(problem) => {
                    (self.complain)(&problem);
                    budget.spend(served(0, CHAIN_LENGTH_MAX.into()));
                    queue.add_used(memory, head, 0).map_err(RingError::Used)?;
                }
            }
        }
        Ok(None)
    }

    /// Puts the next packet for the guest together, no longer than the chain. Returns its length, or 0
    /// if there is none.
    fn next_packet(&mut self, chain: &Transfer, packet: &mut [u8]) -> usize {
        let room = usize::try_from(chain.segments.length_bytes()).unwrap_or(PACKET_BYTES_MAX);
        let (head, data) = packet.split_at_mut(HEADER_BYTES);
        let room = room.min(PACKET_BYTES_MAX) - HEADER_BYTES;
        let Some(header) = self.connections.next(&mut data[..room]) else {
            return 0;
        };
        head.copy_from_slice(&header.to_bytes());
        HEADER_BYTES + header.length_bytes as usize
    }

    /// Moves the rest of `bytes`. False if there is no leave for it now.
    fn transfer(
        &mut self,
        chain: &mut Transfer,
        bytes: &mut [u8],
        move_bytes: impl Fn(&mut [u8], GuestAddress) -> Result<(), GuestMemoryError>,
    ) -> Result<bool, GuestMemoryError> {
        let done_bytes = chain.done_bytes as u64;
        let pieces = chain.segments.pieces(done_bytes, self.leave.page_bytes());
        for piece in pieces {
            let rest = &mut bytes[chain.done_bytes..];
            if rest.is_empty() {
                break;
            }
            let length = usize::try_from(piece.length_bytes).unwrap_or(rest.len());
            let length = length.min(rest.len());
            if !self.leave.take(piece.address, length as u64) {
                return Ok(false);
            }
            move_bytes(&mut rest[..length], piece.address)?;
            chain.done_bytes += length;
        }
        Ok(true)
    }
}

/// A chain's buffers, all of one direction, with room for a packet.
fn buffers_of(
    chain: impl Iterator<Item = Descriptor>,
    is_for_guest: bool,
) -> Result<Segments, Problem> {
    let Buffers { readable, writable } = Buffers::of(chain)?;
    let (wanted, other) = match is_for_guest {
        true => (writable, readable),
        false => (readable, writable),
    };
    if !other.parts().is_empty() {
        return Err(Problem::Direction);
    }
    let length_bytes = wanted.length_bytes();
    let fits = match is_for_guest {
        // A header and some data.
        true => length_bytes > HEADER_BYTES as u64,
        false => (HEADER_BYTES as u64..=PACKET_BYTES_MAX as u64).contains(&length_bytes),
    };
    if !fits {
        return Err(Problem::Length(length_bytes));
    }
    Ok(wanted)
}

fn served(moved_bytes: usize, parts: usize) -> Served {
    Served {
        used_bytes: 0,
        cost_bytes: 1 + moved_bytes as u64 + Budget::PART_COST_BYTES * parts as u64,
    }
}
