//! All connections of a device, and what its guest has yet to be told of them.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use thiserror::Error;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::connection::{BUFFER_BYTES, Connection, Violation};
use super::counts::{VsockCounts, add};
use super::first_line::{Line, first_line};
use super::host::VsockHost;
use super::packet::{HEADER_BYTES, HOST_CID, Header, TYPE_STREAM, op};
use super::ports::{self, FIRST_PORT, NO_PORT, Ports};

/// Most connections of a VM, those included whose client has not said yet where it wants to.
pub(super) const CONNECTIONS_MAX: usize = 256;
/// Most resets that wait to be sent before the guest's packets wait too (5.10.6.1.2).
pub(super) const RESETS_MAX: usize = 64;
/// Events of a turn: as many chains as a turn has.
const EVENTS_MAX: usize = 64;

/// What is told of in the log, for nobody else hears of it.
#[derive(Debug, Error)]
pub(super) enum Problem {
    #[error("packet of {0} bytes that has no header, or says that it is longer")]
    Length(usize),
    #[error("packet of a guest with cid {0}")]
    Sender(u64),
    #[error("{CONNECTIONS_MAX} connections: one more is refused")]
    Full,
    #[error("connections: {0}")]
    Host(#[from] io::Error),
}

pub(super) type Complain<'a> = &'a mut dyn FnMut(&dyn fmt::Display);

/// The connections of a device.
pub(super) struct Connections<H> {
    host: H,
    guest_cid: u64,
    /// Edge-triggered, so that it rings once each time that something comes.
    epoll: Epoll,
    open: BTreeMap<Ports, Connection>,
    /// Clients of the host's that have not said yet where they want to, by the port they will have.
    clients: BTreeMap<u32, UnixStream>,
    next_port: u32,
    /// Resets for the guest: the address that it used for the host, and the ports.
    resets: VecDeque<(u64, Ports)>,
    /// Connections with something for the guest, each once, in turn.
    ready: VecDeque<Ports>,
    pub(super) counts: Arc<VsockCounts>,
}

impl<H: VsockHost> Connections<H> {
    pub(super) fn new(host: H, guest_cid: u32, counts: Arc<VsockCounts>) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let event = EpollEvent::new(EventSet::IN, Ports::LISTENER.token());
        epoll.ctl(ControlOperation::Add, host.fd(), event)?;
        Ok(Connections {
            host,
            guest_cid: guest_cid.into(),
            epoll,
            open: BTreeMap::new(),
            clients: BTreeMap::new(),
            next_port: FIRST_PORT,
            resets: VecDeque::new(),
            ready: VecDeque::new(),
            counts,
        })
    }

    /// Is readable when the host has something.
    pub(super) fn fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    pub(super) fn guest_cid(&self) -> u64 {
        self.guest_cid
    }

    /// Closes all of them: the driver that had them is gone.
    pub(super) fn forget(&mut self) {
        add(&self.counts.conns_killed, self.open.len());
        self.open.clear();
        self.clients.clear();
        self.resets.clear();
        self.ready.clear();
    }

    /// Whether there is something for the guest.
    pub(super) fn wants(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    /// Whether packets of the guest's have to wait until it takes some of ours.
    pub(super) fn is_congested(&self) -> bool {
        self.resets.len() >= RESETS_MAX
    }

    /// Looks at what the host's side did, a bounded part of it. Whether there is more.
    pub(super) fn poll(&mut self, complain: Complain<'_>) -> bool {
        let mut events = [EpollEvent::default(); EVENTS_MAX];
        let count = match self.epoll.wait(0, &mut events) {
            Ok(count) => count,
            Err(error) => {
                complain(&Problem::Host(error));
                return false;
            }
        };
        let mut has_more = count == EVENTS_MAX;
        for event in &events[..count] {
            let ports = Ports::of_token(event.data());
            if ports == Ports::LISTENER {
                has_more |= self.accept(complain);
            } else if ports.guest == NO_PORT {
                let ends = EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR;
                self.hear(ports.host, event.event_set().intersects(ends));
            } else {
                self.wake(ports, event.event_set());
            }
        }
        has_more
    }

    fn wake(&mut self, ports: Ports, events: EventSet) {
        if let Some(connection) = self.open.get_mut(&ports) {
            connection.wake(
                events.intersects(EventSet::IN | EventSet::READ_HANG_UP),
                events.contains(EventSet::OUT),
                events.intersects(EventSet::HANG_UP | EventSet::ERROR),
            );
            self.settle(ports);
        }
    }

    /// Takes clients of the host's, a bounded number. Whether there may be more.
    fn accept(&mut self, complain: Complain<'_>) -> bool {
        for _ in 0..EVENTS_MAX {
            let stream = match self.host.accept() {
                Ok(stream) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
                Err(error) => {
                    // The socket is watched level-triggered: it is looked at again in the next turn.
                    complain(&Problem::Host(error));
                    return false;
                }
            };
            if self.is_full() {
                complain(&Problem::Full);
                continue;
            }
            let port = self.free_port();
            let ports = Ports {
                host: port,
                guest: NO_PORT,
            };
            match self.watch(ControlOperation::Add, stream.as_raw_fd(), ports) {
                Ok(()) => {
                    self.clients.insert(port, stream);
                }
                Err(error) => complain(&Problem::Host(error)),
            }
        }
        true
    }

    fn watch(&self, operation: ControlOperation, fd: RawFd, ports: Ports) -> io::Result<()> {
        let events =
            EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        let event = EpollEvent::new(events, ports.token());
        self.epoll.ctl(operation, fd, event)
    }

    fn is_full(&self) -> bool {
        self.open.len() + self.clients.len() >= CONNECTIONS_MAX
    }

    /// A port of the host's that no connection and no client has. There are far more than
    /// connections.
    fn free_port(&mut self) -> u32 {
        loop {
            let port = self.next_port;
            self.next_port = ports::after(port);
            let [first, last] = [0, NO_PORT].map(|guest| Ports { host: port, guest });
            if !self.clients.contains_key(&port) && self.open.range(first..=last).next().is_none() {
                return port;
            }
        }
    }

    /// Reads a client's first line, if it is there. One that says something else goes.
    fn hear(&mut self, port: u32, has_ended: bool) {
        let Some(stream) = self.clients.get(&port) else {
            return;
        };
        let wanted = match first_line(stream) {
            Line::None if !has_ended => return,
            Line::Connect(wanted) if wanted != NO_PORT => wanted,
            _ => {
                self.clients.remove(&port);
                return;
            }
        };
        let Some(stream) = self.clients.remove(&port) else {
            return;
        };
        let ports = Ports {
            host: port,
            guest: wanted,
        };
        self.open(
            ports,
            Connection::to_guest(stream),
            ControlOperation::Modify,
        );
    }

    /// Begins a connection. False if it cannot be watched: it is closed then.
    fn open(&mut self, ports: Ports, connection: Connection, how: ControlOperation) -> bool {
        let watched = self.watch(how, connection.fd(), ports);
        if watched.is_ok() {
            self.open.insert(ports, connection);
            add(&self.counts.conns_added, 1);
            self.settle(ports);
        }
        watched.is_ok()
    }

    /// Ends a connection that is over, and remembers one that has something for the guest.
    fn settle(&mut self, ports: Ports) {
        let Some(connection) = self.open.get_mut(&ports) else {
            return;
        };
        if connection.is_over() {
            let is_known = connection.is_known();
            self.open.remove(&ports);
            add(&self.counts.conns_removed, 1);
            if is_known {
                self.resets.push_back((HOST_CID, ports));
            }
        } else if connection.wants() && !connection.is_queued {
            connection.is_queued = true;
            self.ready.push_back(ports);
        }
    }

    fn kill(&mut self, ports: Ports) {
        if self.open.remove(&ports).is_some() {
            add(&self.counts.conns_killed, 1);
        }
    }

    /// Takes a packet of the guest's.
    pub(super) fn receive(&mut self, packet: &[u8], complain: Complain<'_>) {
        let Some((header, data)) = packet.split_first_chunk::<HEADER_BYTES>() else {
            complain(&Problem::Length(packet.len()));
            return;
        };
        let header = Header::parse(header);
        if header.src_cid != self.guest_cid {
            complain(&Problem::Sender(header.src_cid));
            return;
        }
        add(&self.counts.tx_packets, 1);
        let ports = Ports {
            host: header.dst_port,
            guest: header.src_port,
        };
        let data = data.get(..header.length_bytes as usize);
        if data.is_none() {
            complain(&Problem::Length(packet.len()));
        }
        let is_ours = header.dst_cid == HOST_CID && header.kind == TYPE_STREAM;
        let taken = match data.filter(|_| is_ours) {
            Some(data) => self.carry_out(&header, ports, data, complain),
            None => Err(Violation),
        };
        match taken {
            Ok(()) => self.settle(ports),
            Err(Violation) => {
                if is_ours {
                    self.kill(ports);
                }
                // A reset is not answered: two sides could do so for ever.
                if header.op != op::RST {
                    self.resets.push_back((header.dst_cid, ports));
                }
            }
        }
    }

    fn carry_out(
        &mut self,
        header: &Header,
        ports: Ports,
        data: &[u8],
        complain: Complain<'_>,
    ) -> Result<(), Violation> {
        if header.op == op::REQUEST {
            return self.request(header, ports, complain);
        }
        let connection = self.open.get_mut(&ports).ok_or(Violation)?;
        if connection.is_forsaken() {
            return Ok(());
        }
        connection.note_credit(header);
        match header.op {
            op::RESPONSE => connection.accept(ports.host),
            op::RST if connection.reset() => Err(Violation),
            op::RST | op::CREDIT_UPDATE => Ok(()),
            op::SHUTDOWN => connection.end(header.flags),
            op::RW => {
                add(&self.counts.tx_bytes, data.len());
                connection.receive(data)
            }
            op::CREDIT_REQUEST => {
                connection.owe_credit();
                Ok(())
            }
            _ => Err(Violation),
        }
    }

    /// The guest wants a connection to a server of the host's.
    fn request(
        &mut self,
        header: &Header,
        ports: Ports,
        complain: Complain<'_>,
    ) -> Result<(), Violation> {
        // A guest may use its port again; what the connection before has for the host is lost.
        if self.open.get(&ports).is_some_and(Connection::is_forsaken) {
            self.kill(ports);
        }
        let is_taken = self.open.contains_key(&ports);
        if is_taken || ports.guest == NO_PORT || ports.host == NO_PORT {
            return Err(Violation);
        }
        if self.is_full() {
            complain(&Problem::Full);
            return Err(Violation);
        }
        // Most often nobody serves the port, which is the guest's to hear.
        let stream = self.host.connect(ports.host).map_err(|_| Violation)?;
        let connection = Connection::of_guest(stream, header);
        match self.open(ports, connection, ControlOperation::Add) {
            true => Ok(()),
            false => Err(Violation),
        }
    }

    /// The next packet for the guest: its header, and its data at the front of `data`, which has
    /// room for some.
    pub(super) fn next(&mut self, data: &mut [u8]) -> Option<Header> {
        let header = self.pick(data)?;
        add(&self.counts.rx_packets, 1);
        add(&self.counts.rx_bytes, header.length_bytes as usize);
        Some(header)
    }

    fn pick(&mut self, data: &mut [u8]) -> Option<Header> {
        let header = |src_cid, ports: Ports| Header {
            src_cid,
            dst_cid: self.guest_cid,
            src_port: ports.host,
            dst_port: ports.guest,
            kind: TYPE_STREAM,
            op: op::RST,
            ..Header::default()
        };
        if let Some((src_cid, ports)) = self.resets.pop_front() {
            return Some(header(src_cid, ports));
        }
        while let Some(ports) = self.ready.pop_front() {
            let Some(connection) = self.open.get_mut(&ports) else {
                continue;
            };
            connection.is_queued = false;
            let Some(outgoing) = connection.next(data) else {
                continue;
            };
            let header = Header {
                op: outgoing.op,
                flags: outgoing.flags,
                length_bytes: outgoing.length_bytes,
                buf_alloc: BUFFER_BYTES,
                fwd_cnt: connection.forwarded(),
                ..header(HOST_CID, ports)
            };
            self.settle(ports);
            return Some(header);
        }
        None
    }
}
