//! One connection: a stream of the host's, and how far each side has come.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use super::packet::{DATA_BYTES_MAX, Header, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, op};

/// Most bytes of the guest's that lie here until the host takes them. The guest is told, and stops.
pub(super) const BUFFER_BYTES: u32 = 64 << 10;
/// Bytes that left the buffer after which the guest is told.
const TELL_BYTES: u32 = BUFFER_BYTES / 4;
const BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// The guest did what the protocol forbids.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Violation;

/// A packet for the guest.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Outgoing {
    pub(super) op: u16,
    pub(super) flags: u32,
    /// Bytes of data that were put into the buffer.
    pub(super) length_bytes: u32,
}

/// A connection that one side asked for.
#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    /// The guest is to be sent this, before anything else.
    opening: Option<u16>,
    /// Both sides agreed.
    is_open: bool,
    /// The stream may have something to read, and may take something: until it says otherwise.
    may_read: bool,
    may_write: bool,
    /// The stream's other end is closed, both ways.
    is_hung_up: bool,
    /// Flags of what the host's side has ended, and of what of that the guest was told.
    host_ended: u32,
    host_ended_told: u32,
    /// Flags of what the guest has ended.
    guest_ended: u32,
    /// The guest reset it after it had sent all: what lies here is still the host's.
    is_forsaken: bool,
    /// Data of the guest's that the stream did not take yet.
    buffer: VecDeque<u8>,
    /// Bytes that left the buffer, modulo 2^32, and what the guest was told last.
    forwarded: u32,
    forwarded_told: u32,
    owes_credit: bool,
    /// Bytes sent to the guest, modulo 2^32.
    sent: u32,
    guest_room: u32,
    guest_forwarded: u32,
    /// The guest was asked for its credit since it had some.
    has_asked: bool,
    /// It is in the queue of those that have something for the guest.
    pub(super) is_queued: bool,
}

impl Connection {
    /// A connection to a server of the guest's.
    pub(super) fn to_guest(stream: UnixStream) -> Connection {
        Connection::new(stream, op::REQUEST)
    }

    /// A connection that the guest asked for.
    pub(super) fn of_guest(stream: UnixStream, header: &Header) -> Connection {
        let mut connection = Connection::new(stream, op::RESPONSE);
        connection.is_open = true;
        connection.note_credit(header);
        connection
    }

    fn new(stream: UnixStream, opening: u16) -> Connection {
        Connection {
            stream,
            opening: Some(opening),
            is_open: false,
            may_read: true,
            may_write: true,
            is_hung_up: false,
            host_ended: 0,
            host_ended_told: 0,
            guest_ended: 0,
            is_forsaken: false,
            buffer: VecDeque::new(),
            forwarded: 0,
            forwarded_told: 0,
            owes_credit: false,
            sent: 0,
            guest_room: 0,
            guest_forwarded: 0,
            has_asked: false,
            is_queued: false,
        }
    }

    pub(super) fn fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// Bytes that left the buffer, for a header.
    pub(super) fn forwarded(&self) -> u32 {
        self.forwarded
    }

    pub(super) fn is_forsaken(&self) -> bool {
        self.is_forsaken
    }

    /// Whether the guest knows of it.
    pub(super) fn is_known(&self) -> bool {
        !self.is_forsaken && self.opening != Some(op::REQUEST)
    }

    /// Whether nothing of it is left to be done: the guest has ended it both ways and its data are
    /// with the host, or the host went before the guest answered.
    pub(super) fn is_over(&self) -> bool {
        let is_ended = self.is_forsaken || self.guest_ended == BOTH;
        (is_ended && self.buffer.is_empty()) || (!self.is_open && self.is_hung_up)
    }

    /// Whether there is something for the guest.
    pub(super) fn wants(&self) -> bool {
        if self.is_forsaken {
            return false;
        }
        let more = self.can_read() && (self.credit() > 0 || !self.has_asked)
            || self.host_ended != self.host_ended_told
            || self.owes_credit;
        self.opening.is_some() || (self.is_open && more)
    }

    fn can_read(&self) -> bool {
        let is_closed = self.host_ended & SHUTDOWN_SEND | self.guest_ended & SHUTDOWN_RECEIVE != 0;
        self.may_read && !is_closed
    }

    /// Bytes that the guest has room for. None if it says that it forwarded what it never got.
    fn credit(&self) -> u32 {
        let under_way = self.sent.wrapping_sub(self.guest_forwarded);
        self.guest_room.saturating_sub(under_way)
    }

    /// Takes what each packet of the guest's says of its room.
    pub(super) fn note_credit(&mut self, header: &Header) {
        self.guest_room = header.buf_alloc;
        self.guest_forwarded = header.fwd_cnt;
        self.has_asked &= self.credit() == 0;
    }

    /// The stream can do more, or its other end is closed.
    pub(super) fn wake(&mut self, can_read: bool, can_write: bool, is_hung_up: bool) {
        self.may_read |= can_read;
        self.may_write |= can_write;
        if is_hung_up {
            self.is_hung_up = true;
            if self.host_ended & SHUTDOWN_SEND != 0 {
                self.host_ended = BOTH;
            }
        }
        self.flush();
    }

    /// The guest takes the connection. `port` is told to the host's client, as with Firecracker.
    pub(super) fn accept(&mut self, port: u32) -> Result<(), Violation> {
        if self.is_open || self.opening.is_some() {
            return Err(Violation);
        }
        self.is_open = true;
        // A new stream has room for it.
        if self
            .stream
            .write_all(format!("OK {port}\n").as_bytes())
            .is_err()
        {
            self.stop_writing();
        }
        Ok(())
    }

    /// Takes data of the guest's.
    pub(super) fn receive(&mut self, data: &[u8]) -> Result<(), Violation> {
        let room = BUFFER_BYTES as usize - self.buffer.len();
        if !self.is_open || self.guest_ended & SHUTDOWN_SEND != 0 || data.len() > room {
            return Err(Violation);
        }
        let done = match self.buffer.is_empty() && self.may_write {
            true => self.write(data),
            false => 0,
        };
        self.buffer.extend(&data[done..]);
        self.flush();
        Ok(())
    }

    /// The guest ends one direction or both.
    pub(super) fn end(&mut self, flags: u32) -> Result<(), Violation> {
        if !self.is_open {
            return Err(Violation);
        }
        self.guest_ended |= flags & BOTH;
        if self.guest_ended & SHUTDOWN_RECEIVE != 0 {
            let _gone = self.stream.shutdown(Shutdown::Read);
        }
        self.flush();
        Ok(())
    }

    /// The guest resets it. False if it is to be kept for what it has for the host.
    pub(super) fn reset(&mut self) -> bool {
        self.is_forsaken = self.guest_ended & SHUTDOWN_SEND != 0 && !self.buffer.is_empty();
        !self.is_forsaken
    }

    pub(super) fn owe_credit(&mut self) {
        self.owes_credit = true;
    }

    /// Gives the stream what it takes of the buffer.
    fn flush(&mut self) {
        // A connection at rest keeps no memory.
        let mut buffer = std::mem::take(&mut self.buffer);
        while self.may_write && !buffer.is_empty() {
            let written = self.write(buffer.as_slices().0);
            buffer.drain(..written);
        }
        if self.host_ended & SHUTDOWN_RECEIVE != 0 {
            self.forward(buffer.len());
            buffer.clear();
        }
        if !buffer.is_empty() {
            self.buffer = buffer;
        } else if self.guest_ended & SHUTDOWN_SEND != 0 {
            let _gone = self.stream.shutdown(Shutdown::Write);
        }
    }

    /// Gives the stream some of `data`. Returns how much it took.
    fn write(&mut self, data: &[u8]) -> usize {
        loop {
            match self.stream.write(data) {
                Ok(written) => {
                    self.forward(written);
                    return written;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.may_write = false,
                Err(_) => self.stop_writing(),
            }
            return 0;
        }
    }

    /// Nobody reads at the other end any more.
    fn stop_writing(&mut self) {
        self.may_write = false;
        self.host_ended |= SHUTDOWN_RECEIVE;
    }

    /// Counts data that need no room any more.
    fn forward(&mut self, length: usize) {
        let length = u32::try_from(length).unwrap_or_default();
        self.forwarded = self.forwarded.wrapping_add(length);
        self.owes_credit |= self.forwarded.wrapping_sub(self.forwarded_told) >= TELL_BYTES;
    }

    /// The next packet for the guest, with its data at the front of `data`, which has room.
    pub(super) fn next(&mut self, data: &mut [u8]) -> Option<Outgoing> {
        let outgoing = self.pick(data)?;
        self.owes_credit = false;
        self.forwarded_told = self.forwarded;
        Some(outgoing)
    }

    fn pick(&mut self, data: &mut [u8]) -> Option<Outgoing> {
        let control = |op| Outgoing {
            op,
            ..Outgoing::default()
        };
        if self.is_forsaken {
            return None;
        }
        if let Some(op) = self.opening.take() {
            return Some(control(op));
        }
        if !self.is_open {
            return None;
        }
        if self.can_read() {
            let credit = self.credit() as usize;
            if credit == 0 {
                if !std::mem::replace(&mut self.has_asked, true) {
                    return Some(control(op::CREDIT_REQUEST));
                }
            } else {
                let length_bytes = data.len().min(credit).min(DATA_BYTES_MAX);
                let length_bytes = self.read(&mut data[..length_bytes]);
                if length_bytes > 0 {
                    return Some(Outgoing {
                        length_bytes,
                        ..control(op::RW)
                    });
                }
            }
        }
        if self.host_ended != self.host_ended_told {
            self.host_ended_told = self.host_ended;
            return Some(Outgoing {
                flags: self.host_ended,
                ..control(op::SHUTDOWN)
            });
        }
        self.owes_credit.then(|| control(op::CREDIT_UPDATE))
    }

    /// Reads from the stream. None where there is nothing now, or no more.
    fn read(&mut self, data: &mut [u8]) -> u32 {
        loop {
            match self.stream.read(data) {
                Ok(length) if length > 0 => {
                    let length = u32::try_from(length).unwrap_or_default();
                    self.sent = self.sent.wrapping_add(length);
                    return length;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.may_read = false,
                // Its end, be it that the other end went with data of the guest's unread.
                Ok(_) | Err(_) => {
                    let ended = if self.is_hung_up { BOTH } else { SHUTDOWN_SEND };
                    self.host_ended |= ended;
                }
            }
            return 0;
        }
    }
}
