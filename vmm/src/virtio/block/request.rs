//! A request as the driver lays it out: header, data, status byte (virtio 1.2, 5.2.6).

use thiserror::Error;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{GuestAddress, GuestMemoryError};

use super::super::GuestMemory;
use super::segments::{Segments, TooShort};

/// Descriptors in the queue; also the longest chain (2.7.5.3.1, with or without an indirect table).
pub(crate) const QUEUE_SIZE: u16 = 256;
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
    #[error("request chain of more than {QUEUE_SIZE} descriptors")]
    TooManyDescriptors,
    #[error(
        "request chain without an end: a loop, or a link or descriptor that cannot be followed"
    )]
    Broken,
    #[error("request buffer at {0:#x} wraps around the end of memory")]
    Wraps(u64),
    #[error("request with a readable buffer after a writable one")]
    Order,
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
        let (mut readable, mut writable) = (Segments::default(), Segments::default());
        let mut is_complete = false;
        for (index, descriptor) in chain.enumerate() {
            if index >= usize::from(QUEUE_SIZE) {
                return Err(RequestError::TooManyDescriptors);
            }
            is_complete = !descriptor.has_next();
            let side = match descriptor.is_write_only() {
                true => &mut writable,
                false if writable.parts().is_empty() => &mut readable,
                false => return Err(RequestError::Order),
            };
            let address = descriptor.addr();
            side.push(address, descriptor.len())
                .ok_or(RequestError::Wraps(address.0))?;
        }
        // The iterator ends in silence at what it cannot follow. What it gave so far must not pass
        // for a request: its last byte would be taken for the status.
        if !is_complete {
            return Err(RequestError::Broken);
        }
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
