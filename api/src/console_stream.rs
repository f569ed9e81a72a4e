//! The two-way console stream: raw bytes over an upgraded connection.
//!
//! Server to client: what the console has shown so far, then what it shows from now on; the
//! server shuts its side when the VM has ended. Client to server: keystrokes; a client that shuts
//! its side only gives up typing.

use std::time::Duration;

use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;
use vmm::{Console, ConsoleRead};

use crate::wire::Wire;

/// Pieces of output on their way to a client that reads slowly.
const PIECES_MAX: usize = 16;
/// How often the reading thread looks whether its client is still there.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// How long to wait before input that the guest did not take is tried again.
const INPUT_RETRY: Duration = Duration::from_millis(5);

/// Connects the upgraded connection with the console until either ends.
pub async fn pump(upgrade: OnUpgrade, console: Console) {
    let upgraded = match upgrade.await {
        Ok(upgraded) => upgraded,
        Err(error) => {
            log::debug!("console stream: {error}");
            return;
        }
    };
    let Ok(parts) = upgraded.downcast::<TokioIo<Wire<UnixStream>>>() else {
        log::error!("console stream: the connection is not one of the api socket");
        return;
    };
    let stream = parts.io.into_inner().into_inner();
    let (from_client, to_client) = stream.into_split();
    let (pieces, arriving) = mpsc::channel(PIECES_MAX);
    let reading = console.clone();
    tokio::task::spawn_blocking(move || read_console(&reading, &pieces));
    // Either side's end drops the other: the reading thread finds its channel closed.
    tokio::select! {
        () = forward_output(to_client, arriving) => {}
        () = forward_input(from_client, parts.read_buf.to_vec(), console) => {}
    }
}

/// Reads the console until the VM ends or the client is gone.
fn read_console(console: &Console, pieces: &mpsc::Sender<Vec<u8>>) {
    let mut reader = console.subscribe();
    loop {
        match reader.read(LOOK_INTERVAL) {
            ConsoleRead::Bytes(bytes) => {
                if pieces.blocking_send(bytes).is_err() {
                    return;
                }
            }
            ConsoleRead::TimedOut if pieces.is_closed() => return,
            ConsoleRead::TimedOut => {}
            ConsoleRead::Ended => return,
        }
    }
}

async fn forward_output(mut to_client: OwnedWriteHalf, mut arriving: mpsc::Receiver<Vec<u8>>) {
    while let Some(bytes) = arriving.recv().await {
        if to_client.write_all(&bytes).await.is_err() {
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
        while !left.is_empty() {
            // Nothing is taken while the guest does not read, nor before the VM was started.
            let taken = console.write_input(left).unwrap_or(0);
            left = &left[taken..];
            if taken == 0 && !is_there_after(&from_client, INPUT_RETRY).await {
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
async fn is_there_after(client: &OwnedReadHalf, time: Duration) -> bool {
    tokio::time::sleep(time).await;
    let ready = client.as_ref().ready(Interest::WRITABLE);
    match tokio::time::timeout(Duration::ZERO, ready).await {
        Ok(Ok(ready)) => !ready.is_write_closed(),
        Ok(Err(_)) => false,
        // Not writable: it exists, and reads slowly.
        Err(_) => true,
    }
}
