//! A request as the driver lays it out: header, data, status byte (virtio 1.2, 5.2.6).

use thiserror::Error;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{GuestAddress, GuestMemoryError};

use super::super::GuestMemory;
use super::super::chain::{Buffers, CHAIN_LENGTH_MAX, ChainError};
use super::super::segments::{Segments, TooShort};

/// Descriptors in the queue; also the longest chain.
pub(crate) const QUEUE_SIZE: u16 = CHAIN_LENGTH_MAX;
/// Bytes of the header: type, reserved, sector.
const HEADER_BYTES: usize = 16;

/// What the driver asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    In,
    Out,
    Flush,
    GetId,
    Unknown(u32),
}

impl From<u32> for Kind {
    fn from(value: u32) -> Self {
        match value {
            VIRTIO_BLK_T_IN => Kind::In,
            VIRTIO_BLK_T_OUT => Kind::Out,
            VIRTIO_BLK_T_FLUSH => Kind::Flush,
            VIRTIO_BLK_T_GET_ID => Kind::GetId,
            _ => Kind::Unknown(value),
        }
    }
}

/// A request whose layout holds water. Sector and data are the driver's still.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) kind: Kind,
    pub(crate) sector: u64,
    /// Data from the driver.
    pub(crate) readable: Segments,
    /// Room for data to the driver.
    pub(crate) writable: Segments,
    /// Where the outcome goes.
    pub(crate) status_address: GuestAddress,
}

/// Why a chain is no request.
#[derive(Debug, Error)]
pub(crate) enum RequestError {
    #[error("request {0}")]
    Chain(#[from] ChainError),
    #[error("request header: {0}")]
    Header(#[source] TooShort),
    #[error("request header: {0}")]
    HeaderMemory(#[source] GuestMemoryError),
    #[error("request status: {0}")]
    Status(#[source] TooShort),
}

impl Request {
    /// Reads a request from its descriptors.
    pub(crate) fn parse(
        chain: impl Iterator<Item = Descriptor>,
        memory: &GuestMemory,
    ) -> Result<Request, RequestError> {
        let Buffers {
            mut readable,
            mut writable,
        } = Buffers::of(chain)?;
        let header = readable
            .take_front(HEADER_BYTES as u64)
            .map_err(RequestError::Header)?;
        let mut bytes = [0; HEADER_BYTES];
        header
            .read_bytes(memory, &mut bytes)
            .map_err(RequestError::HeaderMemory)?;
        let status_address = writable.take_last_byte().map_err(RequestError::Status)?;
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = bytes;
        Ok(Request {
            kind: Kind::from(u32::from_le_bytes([t0, t1, t2, t3])),
            sector: u64::from_le_bytes(sector),
            readable,
            writable,
            status_address,
        })
    }
}
