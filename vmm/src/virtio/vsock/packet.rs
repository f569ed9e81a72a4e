//! The header of a packet (virtio 1.2, 5.10.6).

/// Bytes of `struct virtio_vsock_hdr`.
pub(super) const HEADER_BYTES: usize = 44;
/// Most bytes of data in a packet: `VIRTIO_VSOCK_MAX_PKT_BUF_SIZE` of Linux.
pub(super) const DATA_BYTES_MAX: usize = 64 << 10;
/// The host's address: `VMADDR_CID_HOST`.
pub(super) const HOST_CID: u64 = 2;
/// The one type there is here: `VIRTIO_VSOCK_TYPE_STREAM`.
pub(super) const TYPE_STREAM: u16 = 1;
/// Flag of a `SHUTDOWN`: its sender receives no more data.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
/// Flag of a `SHUTDOWN`: its sender sends no more data.
pub(super) const SHUTDOWN_SEND: u32 = 2;

/// What a packet is for: `VIRTIO_VSOCK_OP_*`.
pub(super) mod op {
    pub(crate) const REQUEST: u16 = 1;
    pub(crate) const RESPONSE: u16 = 2;
    pub(crate) const RST: u16 = 3;
    pub(crate) const SHUTDOWN: u16 = 4;
    pub(crate) const RW: u16 = 5;
    pub(crate) const CREDIT_UPDATE: u16 = 6;
    pub(crate) const CREDIT_REQUEST: u16 = 7;
}

/// A header, in either direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    pub(super) length_bytes: u32,
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    /// Room for data that its sender has for the connection, in bytes.
    pub(super) buf_alloc: u32,
    /// Bytes that left that room since the connection began, modulo 2^32.
    pub(super) fwd_cnt: u32,
}

impl Header {
    pub(super) fn parse(bytes: &[u8; HEADER_BYTES]) -> Header {
        let mut at = 0;
        let mut word = |length: usize| {
            let mut word = [0; 8];
            word[..length].copy_from_slice(&bytes[at..at + length]);
            at += length;
            u64::from_le_bytes(word)
        };
        let long = |word: u64| u32::try_from(word).unwrap_or_default();
        let short = |word: u64| u16::try_from(word).unwrap_or_default();
        Header {
            src_cid: word(8),
            dst_cid: word(8),
            src_port: long(word(4)),
            dst_port: long(word(4)),
            length_bytes: long(word(4)),
            kind: short(word(2)),
            op: short(word(2)),
            flags: long(word(4)),
            buf_alloc: long(word(4)),
            fwd_cnt: long(word(4)),
        }
    }

    pub(super) fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut at = 0;
        let mut put = |word: &[u8]| {
            bytes[at..at + word.len()].copy_from_slice(word);
            at += word.len();
        };
        put(&self.src_cid.to_le_bytes());
        put(&self.dst_cid.to_le_bytes());
        put(&self.src_port.to_le_bytes());
        put(&self.dst_port.to_le_bytes());
        put(&self.length_bytes.to_le_bytes());
        put(&self.kind.to_le_bytes());
        put(&self.op.to_le_bytes());
        put(&self.flags.to_le_bytes());
        put(&self.buf_alloc.to_le_bytes());
        put(&self.fwd_cnt.to_le_bytes());
        bytes
    }
}
