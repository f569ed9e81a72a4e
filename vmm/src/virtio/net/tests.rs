//! A network device, as its driver and its link see it.

mod allowance;
mod driver;
mod frames;
mod limits;
mod turns;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::Unbounded;
use crate::virtio::fuzzing::{self, AVAIL, DESCRIPTORS, Guest, QUEUE_STRIDE, USED, Wire};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const DATA: u64 = 0x4000;
const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;

struct Bench {
    guest: Guest<Net<Wire>>,
    wire: Wire,
    /// By queue, chains and their descriptors so far.
    offered: [u16; 2],
    descriptors: [u16; 2],
}

fn bench(features: u64) -> Bench {
    bench_with(features, Arc::new(Unbounded), |_| ())
}

fn bench_with(
    features: u64,
    allowance: Arc<dyn Allowance>,
    change: impl FnOnce(&mut NetworkInterface),
) -> Bench {
    let mut config = NetworkInterface::new("eth0", "tap0");
    change(&mut config);
    let wire = Wire::new();
    let net = Net::new(wire.clone(), &config, allowance.clone()).unwrap();
    let mut guest = Guest::with(net, allowance);
    guest.set_up(features);
    Bench {
        guest,
        wire,
        offered: [0; 2],
        descriptors: [0; 2],
    }
}

impl Bench {
    /// Makes a chain of (address, length, flags) available in `queue`, of the next descriptors.
    fn offer(&mut self, queue: usize, chain: &[(u64, u32, u16)]) {
        let stride = QUEUE_STRIDE * queue as u64;
        let head = self.descriptors[queue];
        for (index, &(address, length, flags)) in (head..).zip(chain) {
            let at = DESCRIPTORS + stride + 16 * u64::from(index);
            self.guest.poke(at, &address.to_le_bytes());
            self.guest.poke(at + 8, &length.to_le_bytes());
            self.guest.poke(at + 12, &flags.to_le_bytes());
            self.guest.poke(at + 14, &(index + 1).to_le_bytes());
        }
        let entry = AVAIL + stride + 4 + 2 * u64::from(self.offered[queue]);
        self.guest.poke(entry, &head.to_le_bytes());
        self.offered[queue] += 1;
        self.descriptors[queue] += u16::try_from(chain.len()).unwrap();
        let index = self.offered[queue];
        self.guest.poke(AVAIL + stride + 2, &index.to_le_bytes());
    }

    /// A driver that begins anew, with empty rings.
    fn start_over(&mut self, features: u64) {
        for stride in [0, QUEUE_STRIDE] {
            self.guest.poke(AVAIL + stride, &[0; 4]);
            self.guest.poke(USED + stride, &[0; 4]);
        }
        self.guest.set_up(features);
        self.offered = [0; 2];
        self.descriptors = [0; 2];
    }

    /// What came back in `queue`, as (head, bytes).
    fn used(&self, queue: usize) -> Vec<(u32, u32)> {
        let ring = USED + QUEUE_STRIDE * queue as u64;
        let read = |address| self.guest.memory.read_obj(GuestAddress(address)).unwrap();
        let count: u16 = self.guest.memory.read_obj(GuestAddress(ring + 2)).unwrap();
        (0..u64::from(count))
            .map(|index| (read(ring + 4 + 8 * index), read(ring + 8 + 8 * index)))
            .collect()
    }

    fn bytes(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        let at = GuestAddress(address);
        self.guest.memory.read_slice(&mut bytes, at).unwrap();
        bytes
    }
}

/// A frame with a header of zeros.
fn frame(payload: &[u8]) -> Vec<u8> {
    [&[0; HEADER_BYTES][..], payload].concat()
}

#[test]
fn seeds_of_the_fuzz_target_are_no_findings() {
    for seed in crate::fuzz_seeds::of("virtio_network_frames") {
        fuzzing::network_frames(&seed);
    }
}

proptest! {
    #[test]
    fn random_rings_never_panic(input in prop::collection::vec(any::<u8>(), 0..512)) {
        fuzzing::network_frames(&input);
    }
}
