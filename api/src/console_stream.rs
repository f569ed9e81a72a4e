//! The two-way console stream: raw bytes over an upgraded connection.
//!
//! Server to client: what the console has shown so far, then what it shows from now on; the
//! server shuts its side when the VM has ended. Client to server: keystrokes; a client that shuts
//! its side only gives up typing.

use std::time::Duration;

use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::mpsc;
use vmm::{Console, ConsoleRead};

/// Pieces of output on their way to a client that reads slowly.
const PIECES_MAX: usize = 16;
/// How often the reading thread looks whether its client is still there.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// How long to wait before a full input queue is tried again.
const INPUT_RETRY: Duration = Duration::from_millis(5);

type Stream = TokioIo<Upgraded>;

/// Connects the upgraded connection with the console until either ends.
pub async fn pump(upgrade: OnUpgrade, console: Console) {
    let stream = match upgrade.await {
        Ok(upgraded) => TokioIo::new(upgraded),
        Err(error) => {
            log::debug!("console stream: {error}");
            return;
        }
    };
    let (from_client, to_client) = tokio::io::split(stream);
    let (pieces, arriving) = mpsc::channel(PIECES_MAX);
    let reading = console.clone();
    tokio::task::spawn_blocking(move || read_console(&reading, &pieces));
    let typing = tokio::spawn(forward_input(from_client, console));
    forward_output(to_client, arriving).await;
    typing.abort();
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

async fn forward_output(mut to_client: WriteHalf<Stream>, mut arriving: mpsc::Receiver<Vec<u8>>) {
    while let Some(bytes) = arriving.recv().await {
        if to_client.write_all(&bytes).await.is_err() {
            return;
        }
    }
    // The client may be gone already; then there is nobody to tell.
    let _ = to_client.shutdown().await;
}

async fn forward_input(mut from_client: ReadHalf<Stream>, console: Console) {
    let mut buffer = [0; 1024];
    loop {
        let Ok(length) = from_client.read(&mut buffer).await else {
            return;
        };
        if length == 0 {
            return;
        }
        let mut left = &buffer[..length];
        while !left.is_empty() {
            match console.write_input(left) {
                // The guest has not read what came before.
                Ok(0) => tokio::time::sleep(INPUT_RETRY).await,
                Ok(taken) => left = &left[taken..],
                // The VM has ended.
                Err(_) => return,
            }
        }
    }
}
