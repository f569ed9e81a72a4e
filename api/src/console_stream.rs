//! The two-way console streams: raw bytes over upgraded connections.
//!
//! Server to client: what the console has shown so far, then what it shows from now on; the
//! server shuts its side when the VM has ended or was deleted. Client to server: keystrokes; a
//! client that shuts its side only gives up typing.
//!
//! A stream is a task and nothing more. Rejected: a thread for each, blocked until the guest
//! prints; hundreds of idle streams then take all of tokio's, and requests wait behind them.

use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Bytes;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use vmm::{Console, ConsoleReader};

use crate::fault::Fault;
use crate::wire::Wire;

/// Most streams that a server has open at a time, over all its VMs.
pub const STREAMS_MAX: u32 = 1024;

/// How often it is looked whether a client that gave up typing is still there.
pub(crate) const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// How long to wait before input that the guest did not take is tried again; twice as long each
/// time, up to [`LOOK_INTERVAL`].
const INPUT_RETRY: Duration = Duration::from_millis(5);

/// The open streams of a server. Clones are the same streams.
#[derive(Debug, Clone)]
pub struct ConsoleStreams {
    places: Arc<Semaphore>,
}

impl Default for ConsoleStreams {
    fn default() -> ConsoleStreams {
        ConsoleStreams {
            places: Arc::new(Semaphore::new(STREAMS_MAX as usize)),
        }
    }
}

impl ConsoleStreams {
    /// Connects the connection with the console, once it is upgraded, until either ends.
    ///
    /// # Errors
    /// 503 if [`STREAMS_MAX`] are open.
    pub fn open(&self, upgrade: OnUpgrade, console: Console) -> Result<(), Fault> {
        let place = self.place()?;
        tokio::spawn(async move {
            pump(upgrade, console).await;
            drop(place);
        });
        Ok(())
    }

    /// A place among the streams, for as long as the permit lives.
    ///
    /// # Errors
    /// As [`ConsoleStreams::open`].
    pub(crate) fn place(&self) -> Result<OwnedSemaphorePermit, Fault> {
        Arc::clone(&self.places).try_acquire_owned().map_err(|_| {
            let most = format!("the server has {STREAMS_MAX} of them open, which is the most");
            Fault::unavailable(format!("console stream: {most}"))
        })
    }

    /// Waits until no stream is open. They end with their VMs, or when their clients leave.
    pub async fn ended(&self) {
        // Fails only if the semaphore is closed, which nobody does.
        let _ = self.places.acquire_many(STREAMS_MAX).await;
    }
}

async fn pump(upgrade: OnUpgrade, console: Console) {
    let Some((stream, early)) = connection_of(upgrade).await else {
        return;
    };
    let (from_client, to_client) = stream.into_split();
    // Either side's end drops the other.
    tokio::select! {
        () = forward_output(to_client, console.subscribe()) => {}
        () = forward_input(from_client, early.to_vec(), console) => {}
    }
}

/// The connection of the API's socket that was upgraded, and what the client has sent already.
pub(crate) async fn connection_of(upgrade: OnUpgrade) -> Option<(UnixStream, Bytes)> {
    let upgraded = match upgrade.await {
        Ok(upgraded) => upgraded,
        Err(error) => {
            log::debug!("console stream: {error}");
            return None;
        }
    };
    let Ok(parts) = upgraded.downcast::<TokioIo<Wire<UnixStream>>>() else {
        log::error!("console stream: the connection is not one of the api socket");
        return None;
    };
    Some((parts.io.into_inner().into_inner(), parts.read_buf))
}

/// What a reader has been told of the output that it missed.
#[derive(Debug, Default)]
pub struct LostOutput {
    told_bytes: u64,
}

impl LostOutput {
    /// A line to show before what `reader` gave last; empty if it missed nothing since the last one.
    pub fn note(&mut self, reader: &ConsoleReader) -> String {
        let lost_bytes = reader.lost_bytes() - self.told_bytes;
        self.told_bytes = reader.lost_bytes();
        match lost_bytes {
            0 => String::new(),
            _ => format!("\r\n[samepage: {lost_bytes} bytes of output are lost]\r\n"),
        }
    }
}

/// Sends what the console shows until the VM ends or the client is gone. A client that reads
/// slowly holds one piece here; what it misses beyond the console's history it never gets, but for a
/// line that says so.
async fn forward_output(mut to_client: OwnedWriteHalf, mut reader: ConsoleReader) {
    let mut lost = LostOutput::default();
    while let Some(bytes) = poll_fn(|cx| reader.poll_read(cx)).await {
        let note = lost.note(&reader);
        let sent = async {
            to_client.write_all(note.as_bytes()).await?;
            to_client.write_all(&bytes).await
        };
        if sent.await.is_err() {
            return;
        }
    }
    // The client may be gone already; then there is nobody to tell.
    let _ = to_client.shutdown().await;
}

/// Types `early` and then what the client sends; returns when the client is gone.
async fn forward_input(mut from_client: OwnedReadHalf, early: Vec<u8>, console: Console) {
    let mut buffer = early;
    loop {
        let mut left = &buffer[..];
        let mut retry = INPUT_RETRY;
        while !left.is_empty() {
            // Nothing is taken while the guest does not read, nor before the VM was started.
            let taken = console.write_input(left).unwrap_or(0);
            left = &left[taken..];
            if taken > 0 {
                retry = INPUT_RETRY;
            } else if is_there_after(&from_client, retry).await {
                retry = LOOK_INTERVAL.min(2 * retry);
            } else {
                return;
            }
        }
        buffer.clear();
        match from_client.read_buf(&mut buffer).await {
            Ok(0) => break,
            Ok(_) => {}
            Err(_) => return,
        }
    }
    // It gave up typing, or it is gone altogether: a read cannot tell, a hang-up does.
    while is_there_after(&from_client, LOOK_INTERVAL).await {}
}

/// Whether, after `time`, the client's end of the connection still exists.
pub(crate) async fn is_there_after(client: &OwnedReadHalf, time: Duration) -> bool {
    tokio::time::sleep(time).await;
    let ready = client.as_ref().ready(Interest::WRITABLE);
    match tokio::time::timeout(Duration::ZERO, ready).await {
        Ok(Ok(ready)) => !ready.is_write_closed(),
        Ok(Err(_)) => false,
        // Not writable: it exists, and reads slowly.
        Err(_) => true,
    }
}
