//! Requests' data, moved between guest memory and the drive's file a chunk at a time.
//!
//! A chunk lies in a buffer of ours on its way. What is in the page cache is read at once, without a
//! wait; all else is the lane's, and the request waits until that rings the doorbell.

use std::fs::File;
use std::io;

use rustix::io::{Errno, ReadWriteFlags, preadv2};
use vm_memory::Bytes;

use super::super::segments::Segments;
use super::super::{Allowance, Doorbells, GuestMemory};
use super::disk::{Disk, DiskFacts, DiskFault};
use super::lane::{Closing, Lane, Operation, Polled};
use crate::config::CacheType;

/// Most bytes of a chunk: what a drive holds of the host's memory beside its guest's.
const CHUNK_BYTES: u64 = 128 << 10;
/// Pages that a chunk's buffer is made of.
const BUFFER_PAGE_BYTES: u64 = 4096;

/// Where a transfer begins, and how far an earlier turn got with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Position {
    pub(crate) sector: u64,
    pub(crate) done_bytes: u64,
}

/// How far a transfer got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moved {
    /// To its end.
    All,
    /// So far: there is no memory for the rest now.
    Starved(u64),
    /// So far: the lane is at the next chunk, or at that of another request.
    Waiting(u64),
}

/// An open drive at work. One transfer is in hand at a time.
#[derive(Debug)]
pub(crate) struct DiskIo {
    facts: DiskFacts,
    lane: Lane,
    /// What was read, and is not in guest memory as a whole yet; how much of it is.
    arrived: Option<(Vec<u8>, usize)>,
    /// Whether the file system tells what it has in the page cache.
    tells_cached: bool,
}

impl DiskIo {
    pub(crate) fn new(disk: Disk) -> DiskIo {
        let (file, facts) = disk.into_parts();
        DiskIo {
            lane: Lane::new(file, &facts.drive_id),
            facts,
            arrived: None,
            tells_cached: true,
        }
    }

    pub(crate) fn facts(&self) -> &DiskFacts {
        &self.facts
    }

    pub(crate) fn connect(&self, doorbells: Doorbells) {
        self.lane.connect(doorbells);
    }

    pub(crate) fn closing(&self) -> Closing {
        self.lane.closing()
    }

    /// Lets go of the transfer in hand.
    pub(crate) fn abandon(&mut self) {
        self.arrived = None;
        self.lane.abandon();
    }

    /// Has all that is read be the lane's.
    #[cfg(test)]
    pub(crate) fn forget_cache(&mut self) {
        self.tells_cached = false;
    }

    /// Fills `buffers` from the disk, behind what is done already.
    ///
    /// Rejected: reading into guest memory. `O_DIRECT`, and FUSE with `direct_io`, pin the guest's
    /// page frames for as long as the transfer takes, and a page that the merge engine swaps for a
    /// shared one meanwhile is then another frame: the data would land in one that is no longer the
    /// guest's. And a transfer that hangs would outlive its guest's memory.
    pub(crate) fn read(
        &mut self,
        from: Position,
        buffers: &Segments,
        memory: &GuestMemory,
        allowance: &dyn Allowance,
    ) -> Result<Moved, DiskFault> {
        let length_bytes = buffers.length_bytes();
        let start_bytes = self.facts.start_bytes(from.sector, length_bytes)?;
        let mut done_bytes = from.done_bytes;
        loop {
            if let Some((chunk, copied)) = self.arrived.take() {
                let now = fill(memory, (buffers, done_bytes), &chunk[copied..], allowance)?;
                done_bytes += now as u64;
                if copied + now < chunk.len() {
                    self.arrived = Some((chunk, copied + now));
                    return Ok(Moved::Starved(done_bytes));
                }
            }
            match self.lane.poll() {
                Polled::Busy => return Ok(Moved::Waiting(done_bytes)),
                Polled::Done(chunk) => {
                    self.arrived = Some((chunk.map_err(DiskFault::Io)?, 0));
                    continue;
                }
                Polled::Idle => {}
            }
            let left_bytes = length_bytes - done_bytes;
            if left_bytes == 0 {
                return Ok(Moved::All);
            }
            let chunk_bytes = left_bytes.min(CHUNK_BYTES);
            let Some(mut buffer) = buffer(chunk_bytes, allowance) else {
                return Ok(Moved::Starved(done_bytes));
            };
            // A chunk is small.
            buffer.resize(usize::try_from(chunk_bytes).unwrap_or_default(), 0);
            let offset = start_bytes + done_bytes;
            if self.is_read_at_once(&mut buffer, offset) {
                self.arrived = Some((buffer, 0));
                continue;
            }
            self.lane.submit(Operation::Read { offset, buffer });
        }
    }

    /// Fills `buffer` if all of it lies in the page cache. Never waits for storage: what a file
    /// system says of that is remembered.
    fn is_read_at_once(&mut self, buffer: &mut [u8], offset: u64) -> bool {
        let Some(file) = self.lane.file().filter(|_| self.tells_cached) else {
            return false;
        };
        match read_cached(file, buffer, offset) {
            Ok(length) => length == buffer.len(),
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
                self.tells_cached = false;
                false
            }
            // The lane tells what is wrong.
            Err(_) => false,
        }
    }

    /// Writes `buffers` to the disk. The same holds as for [`DiskIo::read`]: what is written lies in
    /// the page cache, which the limit counts too.
    pub(crate) fn write(
        &mut self,
        to: Position,
        buffers: &Segments,
        memory: &GuestMemory,
        allowance: &dyn Allowance,
    ) -> Result<Moved, DiskFault> {
        if self.facts.is_read_only {
            return Err(DiskFault::ReadOnly);
        }
        let length_bytes = buffers.length_bytes();
        let start_bytes = self.facts.start_bytes(to.sector, length_bytes)?;
        let mut done_bytes = to.done_bytes;
        loop {
            match self.lane.poll() {
                Polled::Busy => return Ok(Moved::Waiting(done_bytes)),
                Polled::Done(chunk) => {
                    done_bytes += chunk.map_err(DiskFault::Io)?.len() as u64;
                    continue;
                }
                Polled::Idle => {}
            }
            if done_bytes == length_bytes {
                return Ok(Moved::All);
            }
            let buffer = drain(memory, (buffers, done_bytes), allowance)?;
            if buffer.is_empty() {
                return Ok(Moved::Starved(done_bytes));
            }
            let offset = start_bytes + done_bytes;
            self.lane.submit(Operation::Write { offset, buffer });
        }
    }

    /// Makes what was written durable, where the drive is configured so. `is_begun` if an earlier
    /// turn asked the lane.
    pub(crate) fn flush(&mut self, is_begun: bool) -> Result<Moved, DiskFault> {
        // A read-only drive's file was never written by us.
        if self.facts.cache_type == CacheType::Unsafe || self.facts.is_read_only {
            return Ok(Moved::All);
        }
        match self.lane.poll() {
            Polled::Busy => Ok(Moved::Waiting(u64::from(is_begun))),
            Polled::Done(done) => done.map(|_| Moved::All).map_err(DiskFault::Io),
            Polled::Idle => {
                self.lane.submit(Operation::Flush);
                Ok(Moved::Waiting(1))
            }
        }
    }
}

/// An empty buffer for a chunk, if the `allowance` gives its memory.
fn buffer(chunk_bytes: u64, allowance: &dyn Allowance) -> Option<Vec<u8>> {
    let is_given = allowance.take(chunk_bytes.next_multiple_of(BUFFER_PAGE_BYTES));
    // A chunk is small.
    is_given.then(|| Vec::with_capacity(usize::try_from(chunk_bytes).unwrap_or_default()))
}

/// Reads what lies in the page cache of `buffer.len()` bytes at `offset`.
fn read_cached(file: &File, buffer: &mut [u8], offset: u64) -> Result<usize, Errno> {
    let mut buffers = [io::IoSliceMut::new(buffer)];
    preadv2(file, &mut buffers, offset, ReadWriteFlags::NOWAIT)
}

/// Copies `bytes` into `buffers`, behind what is done already. Returns how many, fewer than there are
/// if the `allowance` ran out.
fn fill(
    memory: &GuestMemory,
    (buffers, done_bytes): (&Segments, u64),
    bytes: &[u8],
    allowance: &dyn Allowance,
) -> Result<usize, DiskFault> {
    let mut copied = 0;
    for piece in buffers.pieces(done_bytes, allowance.page_bytes()) {
        let room = usize::try_from(piece.length_bytes).unwrap_or(usize::MAX);
        let now = &bytes[copied..][..room.min(bytes.len() - copied)];
        if now.is_empty() || !allowance.take(piece.memory_bytes) {
            break;
        }
        let written = memory.write_slice(now, piece.address);
        written.map_err(DiskFault::Memory)?;
        copied += now.len();
    }
    Ok(copied)
}

/// Copies the next chunk out of `buffers`, or as much of it as the `allowance` gives: memory that the
/// guest never touched is given to it by being read.
fn drain(
    memory: &GuestMemory,
    (buffers, done_bytes): (&Segments, u64),
    allowance: &dyn Allowance,
) -> Result<Vec<u8>, DiskFault> {
    let chunk_bytes = CHUNK_BYTES.min(buffers.length_bytes() - done_bytes);
    let Some(mut bytes) = buffer(chunk_bytes, allowance) else {
        return Ok(Vec::new());
    };
    for piece in buffers.pieces(done_bytes, allowance.page_bytes()) {
        let room_bytes = chunk_bytes - bytes.len() as u64;
        let now_bytes = piece.length_bytes.min(room_bytes);
        if now_bytes == 0 || !allowance.take(piece.memory_bytes) {
            break;
        }
        let from = bytes.len();
        // A chunk is small.
        bytes.resize(from + usize::try_from(now_bytes).unwrap_or_default(), 0);
        let read = memory.read_slice(&mut bytes[from..], piece.address);
        read.map_err(DiskFault::Memory)?;
    }
    Ok(bytes)
}
