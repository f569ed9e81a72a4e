//! A connection with what hyper does differently from Firecracker's server put right in its bytes:
//! requests by [`http10`](crate::http10), replies by [`unreadable`].
//!
//! Here too the head of a request gets its deadline. Rejected: hyper's own, which also runs while a
//! client is idle between two requests. Firecracker's clients stay connected and idle for hours.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

use crate::http10::Relabeller;
use crate::unreadable;

/// How long the head of a request may take to come, from its first byte on.
pub const HEAD_TIME: Duration = Duration::from_secs(10);

/// A connection of the API's socket.
#[derive(Debug)]
pub struct Wire<S> {
    stream: S,
    relabeller: Relabeller,
    /// While a head is on its way, and its rest has been waited for.
    head_deadline: Option<Pin<Box<Sleep>>>,
    outgoing: Outgoing,
}

#[derive(Debug)]
enum Outgoing {
    /// All that was written is on its way. hyper flushes when a reply is complete, and ours have
    /// bodies of one piece: what is written next is a reply's head.
    Flushed,
    /// Somewhere in a reply.
    InReply,
    /// A reply of ours goes out in place of one of `replaced_bytes`.
    StandIn {
        reply: Vec<u8>,
        sent_bytes: usize,
        replaced_bytes: usize,
    },
}

impl<S> Wire<S> {
    /// Wraps a fresh connection; nothing may have been read from it or written to it.
    pub fn new(stream: S) -> Wire<S> {
        Wire {
            stream,
            relabeller: Relabeller::new(),
            head_deadline: None,
            outgoing: Outgoing::Flushed,
        }
    }

    /// The connection itself, as it is after an upgrade.
    pub fn into_inner(self) -> S {
        self.stream
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Wire<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buf);
        if let Poll::Ready(Ok(())) = polled {
            self.relabeller.relabel(&mut buf.filled_mut()[before..]);
        }
        if !self.relabeller.is_in_head() {
            self.head_deadline = None;
        } else if polled.is_pending() {
            let begin = || Box::pin(sleep(HEAD_TIME));
            let deadline = self.head_deadline.get_or_insert_with(begin);
            ready!(deadline.as_mut().poll(cx));
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Wire<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let Wire {
            stream, outgoing, ..
        } = &mut *self;
        if let Outgoing::Flushed = outgoing {
            *outgoing = match unreadable::stand_in(bytes) {
                None => Outgoing::InReply,
                Some(reply) => Outgoing::StandIn {
                    reply,
                    sent_bytes: 0,
                    replaced_bytes: bytes.len(),
                },
            };
        }
        let Outgoing::StandIn {
            reply,
            sent_bytes,
            replaced_bytes,
        } = outgoing
        else {
            return Pin::new(stream).poll_write(cx, bytes);
        };
        while *sent_bytes < reply.len() {
            let rest = &reply[*sent_bytes..];
            match ready!(Pin::new(&mut *stream).poll_write(cx, rest))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                sent => *sent_bytes += sent,
            }
        }
        let replaced_bytes = *replaced_bytes;
        *outgoing = Outgoing::InReply;
        Poll::Ready(Ok(replaced_bytes))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.stream).poll_flush(cx);
        if let (Poll::Ready(Ok(())), Outgoing::InReply) = (&polled, &self.outgoing) {
            self.outgoing = Outgoing::Flushed;
        }
        polled
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
