//! A vsock device whose host's side is the input too.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::super::{Vsock, VsockHost};
use super::{
    AVAIL, DESCRIPTORS, Guest, HIGH_START, InTurn, QUEUE_SIZE, QUEUE_STRIDE, wide_descriptor,
};

const GUEST_CID: u32 = 3;
/// Where the host's ports for its clients begin.
const CLIENT_PORT: u32 = 1 << 30;

/// The host's side, in the hands of the input.
#[derive(Debug, Clone)]
struct Peers(Arc<(EventFd, Mutex<Streams>)>);

#[derive(Debug, Default)]
struct Streams {
    /// Clients that were not taken yet: the device's end.
    coming: VecDeque<UnixStream>,
    /// The other ends of all there are.
    far: VecDeque<UnixStream>,
}

impl Peers {
    fn streams(&self) -> MutexGuard<'_, Streams> {
        self.0.1.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pair(&self) -> io::Result<UnixStream> {
        let (near, far) = UnixStream::pair()?;
        near.set_nonblocking(true)?;
        far.set_nonblocking(true)?;
        self.streams().far.push_back(far);
        Ok(near)
    }

    /// A client, a server or neither does something.
    #[expect(clippy::expect_used, reason = "only in tests and fuzz targets")]
    fn act(&self, action: u8) {
        let far = self.streams().far.pop_front();
        match (action % 8, far) {
            (0, far) => {
                self.streams().far.extend(far);
                let near = self.pair().expect("a pair of sockets");
                self.streams().coming.push_back(near);
                let _full = self.0.0.write(1);
            }
            (1, Some(far)) => drop(far),
            (2, Some(far)) => {
                let _gone = far.shutdown(std::net::Shutdown::Write);
                self.streams().far.push_back(far);
            }
            (3, Some(mut far)) => {
                let _none = far.read(&mut [0; 4096]);
                self.streams().far.push_back(far);
            }
            (4, Some(mut far)) => {
                let _full = far.write(&[action; 3000]);
                self.streams().far.push_back(far);
            }
            (5, Some(mut far)) => {
                let _full = far.write(b"CONNECT 1");
                self.streams().far.push_back(far);
            }
            (_, Some(mut far)) => {
                let _full = far.write(format!("CONNECT {}\n", action >> 6).as_bytes());
                self.streams().far.push_back(far);
            }
            (_, None) => {}
        }
    }
}

impl VsockHost for Peers {
    fn accept(&self) -> io::Result<UnixStream> {
        let coming = self.streams().coming.pop_front();
        if coming.is_none() {
            let _rings = self.0.0.read();
        }
        coming.ok_or_else(|| io::ErrorKind::WouldBlock.into())
    }

    fn connect(&self, port: u32) -> io::Result<UnixStream> {
        match port % 2 {
            0 => self.pair(),
            _ => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn fd(&self) -> RawFd {
        self.0.0.as_raw_fd()
    }
}

/// Any packets at all from a guest, any buffers for packets to it, and anything that the host's
/// clients and servers may do meanwhile.
///
/// The first byte of `input` says: bit 0 takes `VIRTIO_RING_F_EVENT_IDX`, bits 2 to 7 when the device
/// is refused memory. Each 24 bytes behind it are a packet, a chain for it, a chain for packets to the
/// guest, and what the host does before they are served, all of them widened so that a good part makes
/// sense.
#[expect(clippy::expect_used, reason = "only in tests and fuzz targets")]
pub fn vsock_packets(input: &[u8]) {
    let Some((&options, input)) = input.split_first() else {
        return;
    };
    let event = EventFd::new(EFD_NONBLOCK).expect("eventfd");
    let peers = Peers(Arc::new((event, Mutex::default())));
    let allowance = InTurn::new(options >> 2);
    let device = Vsock::new(peers.clone(), GUEST_CID, Arc::default(), allowance.clone());
    let mut guest = Guest::with(device.expect("an epoll"), allowance);
    let features = u64::from(options & 1) << VIRTIO_RING_F_EVENT_IDX;
    guest.set_up(features);
    for (index, record) in (0_u16..).zip(input.as_chunks::<24>().0).take(1024) {
        let (packet, rest) = record.split_at(8);
        let (tx, rx) = rest.split_at(8);
        let slot = index % QUEUE_SIZE;
        let start = 0x4000 + 0x100 * u64::from(slot);
        guest.poke(start, &wide_packet(packet));
        let room = HIGH_START + 0x800 * u64::from(slot);
        let chains = [
            (0, wide_chain(slot, rx, (room, 2))),
            (QUEUE_STRIDE, wide_chain(slot, tx, (start, 0))),
        ];
        for (stride, descriptor) in chains {
            let place = u64::from(slot);
            guest.poke(DESCRIPTORS + stride + 16 * place, &descriptor);
            guest.poke(AVAIL + stride + 4 + 2 * place, &slot.to_le_bytes());
            guest.poke(AVAIL + stride + 2, &(index + 1).to_le_bytes());
        }
        peers.act(packet[7]);
        guest.worker.serve(usize::from(packet[6] % 3));
        if guest.interrupt.needs_reset() {
            guest.set_up(features);
        }
    }
    guest.worker.serve(0);
    guest.set_up(features);
    guest.worker.serve(1);
}

/// A header of a known or nearly known operation, most often between ports that are in use.
fn wide_packet(narrow: &[u8]) -> Vec<u8> {
    let [kind, ports, flags, length, credit, odd, ..] = *narrow else {
        return Vec::new();
    };
    let client_port = CLIENT_PORT + u32::from(ports >> 2 & 7);
    let host_port = match ports % 4 {
        0 | 1 => client_port,
        2 => u32::from(ports >> 2 & 3),
        _ => u32::from_le_bytes([ports; 4]),
    };
    let guest_port = match ports >> 5 {
        7 => u32::MAX,
        low => u32::from(low % 4),
    };
    let src_cid = if odd == 0xff { 9 } else { u64::from(GUEST_CID) };
    let dst_cid = if odd == 0xfe { 9 } else { 2_u64 };
    let kind_field = if odd == 0xfd { 2_u16 } else { 1 };
    let length = match odd {
        0xfc => u32::MAX,
        _ => u32::from(length) * 32,
    };
    let room = match credit % 4 {
        0 => u32::from(credit),
        1 => u32::MAX,
        _ => 0x1_0000,
    };
    let forwarded = u32::from(credit >> 4) << (credit % 29);
    let mut wide = Vec::with_capacity(44);
    wide.extend(src_cid.to_le_bytes());
    wide.extend(dst_cid.to_le_bytes());
    for word in [guest_port, host_port, length] {
        wide.extend(word.to_le_bytes());
    }
    wide.extend(kind_field.to_le_bytes());
    wide.extend(u16::from(kind % 9).to_le_bytes());
    for word in [u32::from(flags), room, forwarded] {
        wide.extend(word.to_le_bytes());
    }
    wide
}

/// Most often one buffer at `place`, otherwise anything.
fn wide_chain(slot: u16, narrow: &[u8], (address, flags): (u64, u8)) -> [u8; 16] {
    let narrow: [u8; 8] = narrow.try_into().unwrap_or_default();
    if narrow[7] >= 0xc0 {
        return wide_descriptor(slot, narrow);
    }
    let length = match narrow[0] % 4 {
        0 => u32::from(narrow[1]),
        _ => 44 + u32::from(narrow[1]) * 32,
    };
    let mut wide = [0; 16];
    wide[..8].copy_from_slice(&address.to_le_bytes());
    wide[8..12].copy_from_slice(&length.to_le_bytes());
    wide[12] = flags;
    wide
}
