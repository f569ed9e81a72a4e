mod hostile;

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

use super::packet::{HEADER_BYTES, Header, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM, op};
use super::*;
use crate::events::EventLoop;
use crate::virtio::Unbounded;
use crate::virtio::fuzzing::{
    AVAIL, DESCRIPTORS, Guest, HIGH_START, QUEUE_SIZE, QUEUE_STRIDE, USED,
};

const RX: usize = 0;
const TX: usize = 1;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
/// Where packets of the guest's lie.
const PACKETS: u64 = 0x4000;
/// Bytes of each buffer for packets to the guest, which lie one after the other.
const ROOM_BYTES: u32 = 0x800;
const CID: u64 = 5;
/// Room that the guest says it has for a connection.
const GUEST_ROOM: u32 = 1 << 20;
/// Bytes that are room of ours, by what the device must say.
const BUFFER_BYTES: u32 = 64 << 10;

/// A guest with a vsock device over sockets in a directory of its own.
struct Bench {
    guest: Guest<Vsock<VsockSocket>>,
    directory: TempDir,
    counts: Arc<VsockCounts>,
    /// Chains so far, by queue.
    offered: [u16; 2],
    /// Packets to the guest that were looked at.
    seen: u16,
}

fn bench() -> Bench {
    let mut bench = bench_without_room(Arc::new(Unbounded));
    (0..QUEUE_SIZE).for_each(|_| bench.offer_room());
    bench
}

fn bench_without_room(allowance: Arc<dyn Allowance>) -> Bench {
    let directory = tempfile::tempdir().unwrap();
    let socket = VsockSocket::bind(&directory.path().join("v")).unwrap();
    let counts = Arc::<VsockCounts>::default();
    let cid = u32::try_from(CID).unwrap();
    let device = Vsock::new(socket, cid, counts.clone(), allowance.clone()).unwrap();
    let mut guest = Guest::with(device, allowance);
    guest.set_up(0);
    Bench {
        guest,
        directory,
        counts,
        offered: [0; 2],
        seen: 0,
    }
}

impl Bench {
    /// Makes a chain of (address, length, flags) available in `queue`. One of several descriptors is
    /// the first and only one of its queue.
    fn offer(&mut self, queue: usize, chain: &[(u64, u32, u16)]) {
        let stride = QUEUE_STRIDE * queue as u64;
        let head = self.offered[queue] % QUEUE_SIZE;
        for (index, &(address, length, flags)) in (head..).zip(chain) {
            let at = DESCRIPTORS + stride + 16 * u64::from(index);
            self.guest.poke(at, &address.to_le_bytes());
            self.guest.poke(at + 8, &length.to_le_bytes());
            self.guest.poke(at + 12, &flags.to_le_bytes());
            self.guest.poke(at + 14, &(index + 1).to_le_bytes());
        }
        let entry = AVAIL + stride + 4 + 2 * u64::from(head);
        self.guest.poke(entry, &head.to_le_bytes());
        self.offered[queue] = self.offered[queue].wrapping_add(1);
        let index = self.offered[queue];
        self.guest.poke(AVAIL + stride + 2, &index.to_le_bytes());
    }

    /// Gives the device a buffer for a packet.
    fn offer_room(&mut self) {
        let slot = u64::from(self.offered[RX] % QUEUE_SIZE);
        let address = HIGH_START + u64::from(ROOM_BYTES) * slot;
        self.offer(RX, &[(address, ROOM_BYTES, WRITE)]);
    }

    fn used_count(&self, queue: usize) -> u16 {
        let ring = USED + QUEUE_STRIDE * queue as u64;
        self.guest.memory.read_obj(GuestAddress(ring + 2)).unwrap()
    }

    /// Sends a packet of the guest's, without a look at what the device made of it.
    fn send(&mut self, header: &Header, data: &[u8]) {
        self.guest.poke(PACKETS, &header.to_bytes());
        self.guest.poke(PACKETS + HEADER_BYTES as u64, data);
        let length = HEADER_BYTES + data.len();
        self.offer(TX, &[(PACKETS, u32::try_from(length).unwrap(), 0)]);
        self.guest.worker.serve(TX);
    }

    /// The packets that came for the guest since the last call; their buffers are offered again.
    fn received(&mut self) -> Vec<(Header, Vec<u8>)> {
        let mut packets = Vec::new();
        // One turn takes a client, the next one hears it.
        (0..2).for_each(|_| self.guest.worker.serve(RX));
        while self.seen != self.used_count(RX) {
            let element = USED + 4 + 8 * u64::from(self.seen % QUEUE_SIZE);
            let memory = self.guest.memory.clone();
            let [head, length]: [u32; 2] = memory.read_obj(GuestAddress(element)).unwrap();
            let mut bytes = vec![0; length as usize];
            let at = HIGH_START + u64::from(ROOM_BYTES * head);
            memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
            let data = bytes.split_off(HEADER_BYTES);
            let header = Header::parse(bytes.as_array().unwrap());
            assert_eq!(header.length_bytes as usize, data.len());
            packets.push((header, data));
            self.seen = self.seen.wrapping_add(1);
            self.offer_room();
            self.guest.worker.serve(RX);
        }
        packets
    }

    /// Those packets as (operation, data).
    fn heard(&mut self) -> Vec<(u16, Vec<u8>)> {
        let received = self.received().into_iter();
        received.map(|(header, data)| (header.op, data)).collect()
    }

    /// The driver goes.
    fn leave(&mut self) {
        self.guest
            .write(virtio_bindings::virtio_mmio::VIRTIO_MMIO_STATUS, 0);
        for stride in [0, QUEUE_STRIDE] {
            self.guest.poke(AVAIL + stride, &[0; 4]);
            self.guest.poke(USED + stride, &[0; 4]);
        }
    }

    /// The next one comes.
    fn begin(&mut self) {
        self.guest.set_up(0);
        (self.offered, self.seen) = ([0; 2], 0);
        (0..QUEUE_SIZE).for_each(|_| self.offer_room());
    }

    fn client(&self) -> UnixStream {
        patient(UnixStream::connect(self.directory.path().join("v")).unwrap())
    }

    /// Something that serves a port of the host's.
    fn server(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.directory.path().join(format!("v_{port}"))).unwrap()
    }

    /// A connection of a client's to the guest's port 80, and what the guest sends on it.
    fn connected(&mut self) -> (UnixStream, Header) {
        let mut client = self.client();
        client.write_all(b"CONNECT 80\n").unwrap();
        let request = self.received().pop().unwrap().0;
        assert_eq!((request.op, request.dst_port), (op::REQUEST, 80));
        let response = Header {
            op: op::RESPONSE,
            ..packet(80, request.src_port)
        };
        self.send(&response, &[]);
        let expected = format!("OK {}\n", request.src_port);
        assert_eq!(read(&mut client, expected.len()), expected.as_bytes());
        (client, packet(80, request.src_port))
    }

    /// A connection of the guest's port 1000 to the host's port 7, and what the guest sends on it.
    fn connected_by_guest(&mut self) -> (UnixStream, Header) {
        let server = self.server(7);
        let header = packet(1000, 7);
        let request = Header {
            op: op::REQUEST,
            ..header
        };
        self.send(&request, &[]);
        assert_eq!(self.heard(), [(op::RESPONSE, vec![])]);
        (patient(server.accept().unwrap().0), header)
    }
}

/// A stream whose reads end, so that a device which sends nothing fails its test.
fn patient(stream: UnixStream) -> UnixStream {
    let patience = Some(Duration::from_secs(60));
    stream.set_read_timeout(patience).unwrap();
    stream
}

fn read(stream: &mut UnixStream, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

/// A packet of the guest's with data.
fn packet(src_port: u32, dst_port: u32) -> Header {
    Header {
        src_cid: CID,
        dst_cid: packet::HOST_CID,
        src_port,
        dst_port,
        kind: TYPE_STREAM,
        op: op::RW,
        buf_alloc: GUEST_ROOM,
        ..Header::default()
    }
}

fn with(header: &Header, op: u16, flags: u32) -> Header {
    Header {
        op,
        flags,
        ..*header
    }
}

fn data(header: &Header, length: usize) -> Header {
    Header {
        length_bytes: u32::try_from(length).unwrap(),
        ..*header
    }
}

#[test]
fn a_client_of_the_hosts_reaches_the_port_that_it_names() {
    let mut bench = bench();
    let (mut client, header) = bench.connected();
    client.write_all(b"ping").unwrap();
    assert_eq!(bench.heard(), [(op::RW, b"ping".to_vec())]);
    bench.send(&data(&header, 4), b"pong");
    assert_eq!(read(&mut client, 4), b"pong");
}

#[test]
fn what_a_client_sends_behind_its_first_line_is_for_the_guest() {
    let mut bench = bench();
    let mut client = bench.client();
    client.write_all(b"conn").unwrap();
    assert_eq!(bench.heard(), []);
    client.write_all(b"ect  9 \nearly").unwrap();
    let request = bench.received().pop().unwrap().0;
    assert_eq!((request.src_cid, request.dst_cid), (2, CID));
    assert_eq!(bench.heard(), [], "the guest has not answered");
    let header = packet(9, request.src_port);
    bench.send(&with(&header, op::RESPONSE, 0), &[]);
    assert_eq!(bench.heard(), [(op::RW, b"early".to_vec())]);
}

#[test]
fn a_client_that_says_something_else_goes() {
    let mut bench = bench();
    let long = "CONNECT                        1\n";
    for line in [
        "GET / HTTP/1.1\n",
        "CONNECT\n",
        "CONNECT 1 2\n",
        "CONNECT 4294967295\n",
        long,
    ] {
        let mut client = bench.client();
        client.write_all(line.as_bytes()).unwrap();
        assert_eq!(bench.heard(), []);
        let gone = client.read(&mut [0]);
        let is_gone = match &gone {
            Ok(length) => *length == 0,
            Err(error) => error.kind() == ErrorKind::ConnectionReset,
        };
        assert!(is_gone, "{line:?}: {gone:?}");
    }
    let mut half = bench.client();
    half.write_all(b"CONN").unwrap();
    drop(half);
    assert_eq!(bench.heard(), []);
    assert_eq!(bench.connected().1.src_port, 80, "others are served");
}

#[test]
fn a_client_that_the_guest_refuses_is_told_by_the_end() {
    let mut bench = bench();
    let mut client = bench.client();
    client.write_all(b"CONNECT 1\n").unwrap();
    let request = bench.received().pop().unwrap().0;
    bench.send(&with(&packet(1, request.src_port), op::RST, 0), &[]);
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    assert_eq!(bench.heard(), [], "a reset is not answered");
}

#[test]
fn the_guest_reaches_what_serves_a_port_of_the_hosts() {
    let mut bench = bench();
    let (mut server, header) = bench.connected_by_guest();
    // In parts, as Linux sends it.
    let bytes = data(&header, 6).to_bytes();
    bench.guest.poke(PACKETS, &bytes);
    bench.guest.poke(PACKETS + 0x100, b"abcdef");
    let parts = [
        (PACKETS, 44, NEXT),
        (PACKETS + 0x100, 2, NEXT),
        (PACKETS + 0x102, 4, 0),
    ];
    bench.offer(TX, &parts);
    bench.guest.worker.serve(TX);
    assert_eq!(read(&mut server, 6), b"abcdef");
    server.write_all(b"xyz").unwrap();
    assert_eq!(bench.heard(), [(op::RW, b"xyz".to_vec())]);
    let counts = bench.counts.take();
    let count = |name| counts.iter().find(|(known, _)| *known == name).unwrap().1;
    let expected = [
        ("tx_bytes_count", 6),
        ("rx_bytes_count", 3),
        ("tx_packets_count", 2),
    ];
    for (name, value) in expected {
        assert_eq!(count(name), value, "{name}");
    }
}

#[test]
fn a_port_that_nobody_serves_is_reset() {
    let mut bench = bench();
    bench.send(&with(&packet(1000, 8), op::REQUEST, 0), &[]);
    let reset = bench.received().pop().unwrap().0;
    assert_eq!(
        (reset.op, reset.src_port, reset.dst_port),
        (op::RST, 8, 1000)
    );
}

/// Sends all that the device has room for, and returns what that was.
fn send_all_there_is_room_for(bench: &mut Bench, header: &Header) -> Vec<u8> {
    let (mut sent, mut room) = (Vec::new(), BUFFER_BYTES as usize);
    let mut next = (0..=250).cycle();
    loop {
        for (told, _) in bench.received() {
            assert_eq!((told.op, told.buf_alloc), (op::CREDIT_UPDATE, BUFFER_BYTES));
            room = (told.buf_alloc + told.fwd_cnt) as usize - sent.len();
        }
        if room == 0 {
            return sent;
        }
        let chunk: Vec<u8> = next.by_ref().take(room.min(0x3000)).collect();
        bench.send(&data(header, chunk.len()), &chunk);
        room -= chunk.len();
        sent.extend(chunk);
        assert!(sent.len() < 8 << 20, "a reader that stalls stops the guest");
    }
}

#[test]
fn a_reader_that_stalls_stops_the_guest_and_gets_all_of_it_later() {
    let mut bench = bench();
    let (mut client, header) = bench.connected();
    let (mut other, other_header) = bench.connected_by_guest();
    let sent = send_all_there_is_room_for(&mut bench, &header);
    bench.send(&data(&other_header, 2), b"hi");
    assert_eq!(read(&mut other, 2), b"hi", "other connections go on");

    let mut got = read(&mut client, sent.len() - BUFFER_BYTES as usize);
    let update = bench.received().pop().unwrap().0;
    assert_eq!(update.op, op::CREDIT_UPDATE);
    assert_eq!(update.fwd_cnt as usize, sent.len());
    got.extend(read(&mut client, BUFFER_BYTES as usize));
    assert!(got == sent, "other bytes");
}

#[test]
fn a_guest_that_sends_more_than_there_is_room_for_loses_its_connection_alone() {
    let mut bench = bench();
    let (mut other, other_header) = bench.connected_by_guest();
    let (_client, header) = bench.connected();
    send_all_there_is_room_for(&mut bench, &header);
    // The device has told of all room but a quarter.
    for _ in 0..2 {
        bench.send(&data(&header, 0x3000), &[1; 0x3000]);
    }
    let heard = bench.heard();
    assert!(heard.contains(&(op::RST, vec![])), "{heard:?}");
    bench.send(&data(&other_header, 2), b"hi");
    assert_eq!(read(&mut other, 2), b"hi");
}

#[test]
fn a_guest_without_room_is_sent_nothing_and_asked_once_while_others_go_on() {
    let mut bench = bench();
    let (mut client, header) = bench.connected();
    let (mut other, _) = bench.connected_by_guest();
    let room = |bytes, forwarded| Header {
        buf_alloc: bytes,
        fwd_cnt: forwarded,
        ..with(&header, op::CREDIT_UPDATE, 0)
    };
    bench.send(&room(100, 0), &[]);
    client.write_all(&[7; 250]).unwrap();
    other.write_all(b"hi").unwrap();
    let mut heard = bench.heard();
    heard.sort();
    let expected = [
        (op::RW, vec![7; 100]),
        (op::RW, b"hi".to_vec()),
        (op::CREDIT_REQUEST, vec![]),
    ];
    assert_eq!(heard, expected);
    client.write_all(&[7; 50]).unwrap();
    assert_eq!(bench.heard(), [], "asked once");
    // It claims to have forwarded what it never got.
    bench.send(&room(100, 5000), &[]);
    assert_eq!(bench.heard(), []);
    bench.send(&room(250, 100), &[]);
    assert_eq!(bench.heard(), [(op::RW, vec![7; 200])]);
}

#[test]
fn each_direction_ends_by_itself() {
    let mut bench = bench();
    let (mut client, header) = bench.connected();
    client.write_all(b"last").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    let received = bench.received();
    assert_eq!(received[0].1, b"last");
    assert_eq!(
        (received[1].0.op, received[1].0.flags),
        (op::SHUTDOWN, SHUTDOWN_SEND)
    );
    bench.send(&data(&header, 6), b"answer");
    bench.send(&with(&header, op::SHUTDOWN, SHUTDOWN_SEND), &[]);
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "answer");
    let told = bench.received().pop().unwrap().0;
    let both = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;
    assert_eq!((told.op, told.flags), (op::SHUTDOWN, both));
    bench.send(&with(&header, op::SHUTDOWN, SHUTDOWN_RECEIVE), &[]);
    assert_eq!(bench.heard(), [(op::RST, vec![])], "now it is over");
}

#[test]
fn a_client_that_goes_ends_both_directions_once_its_data_are_with_the_guest() {
    let mut bench = bench();
    let (mut client, header) = bench.connected();
    client.write_all(b"last").unwrap();
    drop(client);
    let both = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;
    let received = bench.received();
    assert_eq!(received[0].1, b"last");
    assert_eq!(
        (received[1].0.op, received[1].0.flags),
        (op::SHUTDOWN, both)
    );
    bench.send(&data(&header, 1), b"x");
    bench.send(&with(&header, op::RST, 0), &[]);
    assert_eq!(bench.heard(), []);
    bench.send(&data(&header, 1), b"x");
    assert_eq!(bench.heard(), [(op::RST, vec![])], "it is forgotten");
}

#[test]
fn what_the_guest_sent_before_it_closed_reaches_a_slow_reader() {
    let mut bench = bench();
    let (mut client, header) = bench.connected();
    let sent = send_all_there_is_room_for(&mut bench, &header);
    let both = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;
    bench.send(&with(&header, op::SHUTDOWN, both), &[]);
    assert_eq!(bench.heard(), [], "some of it is here");
    // It waited long enough.
    bench.send(&with(&header, op::RST, 0), &[]);
    let mut got = read(&mut client, sent.len() - BUFFER_BYTES as usize);
    assert_eq!(bench.heard(), []);
    client.read_to_end(&mut got).unwrap();
    assert!(got == sent, "other bytes");
}

#[test]
fn a_driver_that_begins_anew_has_no_connections_and_can_have_new_ones() {
    let mut bench = bench();
    let (mut client, _) = bench.connected();
    bench.leave();
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    // Comes while no driver is there.
    let mut early = bench.client();
    early.write_all(b"CONNECT 80\n").unwrap();
    bench.guest.worker.serve(RX);
    bench.begin();
    assert_eq!(bench.heard(), [(op::REQUEST, vec![])]);
}

#[test]
fn the_guests_address_is_in_the_configuration_space() {
    let mut bench = bench();
    assert_eq!(bench.guest.read(0x100), 5);
    assert_eq!(bench.guest.read(0x104), 0);
    assert_eq!(bench.guest.read(0x108), 0, "nothing more");
}

#[test]
fn what_the_host_does_wakes_the_device_each_time() {
    let mut bench = bench();
    let events = EventLoop::new().unwrap();
    let worker = bench.guest.take_worker();
    let on_panic = Box::new(|text: String| panic!("{text}"));
    let id = events.remote().add(Box::new(worker), on_panic).unwrap();
    let mut clients = Vec::new();
    for count in 1..=3 {
        let mut client = bench.client();
        // Two events, so that the second finds the first one looked at.
        client.write_all(b"CONNECT").unwrap();
        client.write_all(b" 80\n").unwrap();
        let deadline = Instant::now() + Duration::from_secs(120);
        while bench.used_count(RX) < count {
            assert!(Instant::now() < deadline, "request {count}");
            std::thread::yield_now();
        }
        clients.push(client);
    }
    events.remote().remove(vec![id]).unwrap();
}
