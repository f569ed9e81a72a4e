//! What a balloon's requests hold, checked.

use std::ops::Range;

use thiserror::Error;
use vm_memory::GuestMemoryError;

use super::super::GuestMemory;
use super::super::chain::ChainError;
use super::super::segments::Segments;
use super::ram_pages::FRAME_BYTES;

/// Bytes of a page frame number.
const PFN_BYTES: usize = 4;
/// Most page frame numbers of a request; Linux sends 256 (`VIRTIO_BALLOON_ARRAY_PFNS_MAX`).
pub(super) const PFNS_MAX: u64 = 4096;

/// What is wrong with a request.
#[derive(Debug, Error)]
pub(super) enum Failure {
    #[error("balloon request: {0}")]
    Chain(#[from] ChainError),
    #[error("balloon request of {bytes} bytes: is more than {most} or no multiple of {unit}")]
    Length { bytes: u64, most: u64, unit: usize },
    #[error("balloon request: {0}")]
    Memory(#[from] GuestMemoryError),
    #[error("balloon request names {0} pages that are no RAM")]
    NoRam(u64),
    #[error("balloon pages are not given up: {0}")]
    Discard(dedup::AccessError),
}

/// All of the buffers' bytes, which are a list of `unit` bytes each.
pub(super) fn read(
    memory: &GuestMemory,
    buffers: &Segments,
    unit: usize,
    most: u64,
) -> Result<Vec<u8>, Failure> {
    let bytes = buffers.length_bytes();
    let length = usize::try_from(bytes).ok();
    let length = length.filter(|_| bytes <= most && bytes.is_multiple_of(unit as u64));
    let length = length.ok_or(Failure::Length { bytes, most, unit })?;
    let mut read = vec![0; length];
    buffers.read_bytes(memory, &mut read)?;
    Ok(read)
}

/// The page frames whose numbers are in the buffers.
pub(super) fn frame_numbers(
    memory: &GuestMemory,
    buffers: &Segments,
) -> Result<Vec<Range<u64>>, Failure> {
    let numbers = read(memory, buffers, PFN_BYTES, PFN_BYTES as u64 * PFNS_MAX)?;
    let (numbers, _) = numbers.as_chunks();
    let numbers = numbers
        .iter()
        .map(|&number| u32::from_le_bytes(number).into());
    Ok(numbers.map(|number: u64| number..number + 1).collect())
}

/// The page frames that lie in the buffers as a whole.
pub(super) fn whole_frames(buffers: &Segments) -> Vec<Range<u64>> {
    let parts = buffers.parts().iter();
    let frames = parts.map(|part| {
        let start = part.address.0;
        // No wrap: `Segments::push` saw that the end of the part does not.
        let end = (start + u64::from(part.length_bytes)) / FRAME_BYTES;
        let start = start.div_ceil(FRAME_BYTES);
        start..end.max(start)
    });
    frames.collect()
}
