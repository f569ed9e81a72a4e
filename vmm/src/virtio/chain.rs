//! A descriptor chain as what the driver gives and what it wants filled, checked.

use thiserror::Error;
use virtio_queue::desc::split::Descriptor;

use super::segments::Segments;

/// Most descriptors of a chain: as many as the largest queue of ours has (virtio 1.2, 2.7.5.3.1,
/// with or without an indirect table).
pub(crate) const CHAIN_LENGTH_MAX: u16 = 256;

/// The buffers of a chain whose layout holds water. Where they lie is the driver's still.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Buffers {
    /// Data from the driver.
    pub(crate) readable: Segments,
    /// Room for data to the driver.
    pub(crate) writable: Segments,
}

/// Why a chain is none.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum ChainError {
    #[error("chain of more than {CHAIN_LENGTH_MAX} descriptors")]
    TooManyDescriptors,
    #[error("chain without an end: a loop, or a link or descriptor that cannot be followed")]
    Broken,
    #[error("buffer at {0:#x} wraps around the end of memory")]
    Wraps(u64),
    #[error("readable buffer after a writable one")]
    Order,
}

impl Buffers {
    /// Reads a chain to its end.
    pub(crate) fn of(chain: impl Iterator<Item = Descriptor>) -> Result<Buffers, ChainError> {
        let mut buffers = Buffers::default();
        let mut is_complete = false;
        for (index, descriptor) in chain.enumerate() {
            if index >= usize::from(CHAIN_LENGTH_MAX) {
                return Err(ChainError::TooManyDescriptors);
            }
            is_complete = !descriptor.has_next();
            let side = match descriptor.is_write_only() {
                true => &mut buffers.writable,
                false if buffers.writable.parts().is_empty() => &mut buffers.readable,
                false => return Err(ChainError::Order),
            };
            let address = descriptor.addr();
            side.push(address, descriptor.len())
                .ok_or(ChainError::Wraps(address.0))?;
        }
        // The iterator ends in silence at what it cannot follow. What it gave so far must not pass
        // for a whole: its last byte would be taken for a status.
        if !is_complete {
            return Err(ChainError::Broken);
        }
        Ok(buffers)
    }
}
