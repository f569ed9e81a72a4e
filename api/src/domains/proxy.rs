//! Requests and console streams, passed on to a monitor.
//!
//! Each request has a connection of its own, so none is left idle to go stale when its monitor ends.

use std::io;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::ext::ReasonPhrase;
use hyper::header::{CONNECTION, CONTENT_TYPE, HOST, UPGRADE};
use hyper::upgrade::OnUpgrade;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use crate::console_stream::{LOOK_INTERVAL, connection_of, is_there_after};
use crate::reply::CONSOLE_PROTOCOL;

/// Most of a monitor's reply that is read: a guest may have got into it. Its longest are lists.
const REPLY_BYTES_MAX: usize = 16 << 20;
/// What a console stream copies at a time.
const PIECE_BYTES: usize = 16 << 10;

/// A request as a client sent it, read to its end.
#[derive(Debug, Clone)]
pub struct Received {
    /// The method.
    pub method: Method,
    /// The path, as it was written.
    pub path: String,
    /// The body.
    pub body: Bytes,
}

impl Received {
    /// A request of the front door's own.
    pub fn get(path: impl Into<String>) -> Received {
        Received {
            method: Method::GET,
            path: path.into(),
            body: Bytes::new(),
        }
    }
}

/// Why a monitor gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    /// There is no connection.
    #[error("cannot connect: {0}")]
    Connect(#[from] io::Error),
    /// The connection broke.
    #[error(transparent)]
    Http(#[from] hyper::Error),
    /// The request cannot be written down.
    #[error(transparent)]
    Request(#[from] hyper::http::Error),
    /// The reply broke off, or was too long.
    #[error("its reply: {0}")]
    Reply(Box<dyn std::error::Error + Send + Sync>),
    /// The stream's connection is not the one that was opened.
    #[error("the stream's connection is of another kind")]
    Kind,
}

/// Passes a request on; gives the monitor's reply as it came.
///
/// # Errors
/// If the monitor goes before it has answered.
pub async fn forward(
    monitor: UnixStream,
    received: &Received,
) -> Result<Response<Full<Bytes>>, ProxyError> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(monitor)).await?;
    tokio::spawn(connection);
    let mut builder = Request::builder()
        .method(&received.method)
        .uri(&received.path)
        .header(HOST, "localhost");
    if !received.body.is_empty() {
        builder = builder.header(CONTENT_TYPE, "application/json");
    }
    let request = builder.body(Full::new(received.body.clone()))?;
    whole(sender.send_request(request).await?).await
}

async fn whole(response: Response<Incoming>) -> Result<Response<Full<Bytes>>, ProxyError> {
    let (parts, body) = response.into_parts();
    let body = Limited::new(body, REPLY_BYTES_MAX).collect().await;
    let body = body.map_err(ProxyError::Reply)?.to_bytes();
    let mut reply = Response::new(Full::new(body));
    *reply.status_mut() = parts.status;
    *reply.headers_mut() = parts.headers;
    // Firecracker's server sends none, and hyper would add one.
    reply
        .extensions_mut()
        .insert(ReasonPhrase::from_static(b""));
    Ok(reply)
}

/// A console stream that a monitor has opened, or its refusal.
#[derive(Debug)]
pub enum Opened {
    /// The connection, and what the monitor has sent on it already.
    Stream(UnixStream, Bytes),
    /// What to tell the client.
    Refused(Response<Full<Bytes>>),
}

/// Asks a monitor for a console stream.
///
/// # Errors
/// If the monitor goes before it has answered.
pub async fn open_stream(monitor: UnixStream, path: &str) -> Result<Opened, ProxyError> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(monitor)).await?;
    tokio::spawn(connection.with_upgrades());
    let request = Request::get(path)
        .header(HOST, "localhost")
        .header(CONNECTION, "Upgrade")
        .header(UPGRADE, CONSOLE_PROTOCOL)
        .body(Full::new(Bytes::new()))?;
    let mut response = sender.send_request(request).await?;
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        return Ok(Opened::Refused(whole(response).await?));
    }
    let upgraded = hyper::upgrade::on(&mut response).await?;
    let parts = upgraded
        .downcast::<TokioIo<UnixStream>>()
        .map_err(|_| ProxyError::Kind)?;
    Ok(Opened::Stream(parts.io.into_inner(), parts.read_buf))
}

/// Joins a client's stream and a monitor's until the output ends or the client is gone.
pub async fn join(client: OnUpgrade, monitor: UnixStream, early: Bytes) {
    let Some((client, typed)) = connection_of(client).await else {
        return;
    };
    let (from_client, to_client) = client.into_split();
    let (from_monitor, to_monitor) = monitor.into_split();
    // Either side's end drops the other, and the monitor sees the client hang up.
    tokio::select! {
        () = pass_output(from_monitor, to_client, early) => {}
        () = pass_input(from_client, to_monitor, typed) => {}
    }
}

/// Shows a client what there is to show of a console, and ends its stream.
pub async fn show(client: OnUpgrade, shown: &[u8]) {
    if let Some((mut client, _)) = connection_of(client).await
        && client.write_all(shown).await.is_ok()
    {
        // The client may be gone already; then there is nobody to tell.
        let _ = client.shutdown().await;
    }
}

async fn pass_output(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, early: Bytes) {
    let mut piece = early.to_vec();
    while to.write_all(&piece).await.is_ok() && read_piece(&mut from, &mut piece).await {}
    // The client may be gone already; then there is nobody to tell.
    let _ = to.shutdown().await;
}

async fn pass_input(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, early: Bytes) {
    let mut piece = early.to_vec();
    while deliver(&piece, &mut to, &from).await && read_piece(&mut from, &mut piece).await {}
    // Either may be gone already; then there is nobody to tell.
    let _ = to.shutdown().await;
    // The client gave up typing, or it is gone altogether: a read cannot tell, a hang-up does. If the
    // monitor takes no more, what it said last is still on its way.
    while is_there_after(&from, LOOK_INTERVAL).await {}
}

/// Reads what is there next; false if there is no more.
async fn read_piece(from: &mut OwnedReadHalf, piece: &mut Vec<u8>) -> bool {
    piece.clear();
    piece.reserve(PIECE_BYTES);
    from.read_buf(piece).await.is_ok_and(|length| length > 0)
}

/// Writes `piece`; false if either side is gone. A guest that does not read makes it wait, and its
/// client may leave meanwhile.
async fn deliver(piece: &[u8], to: &mut OwnedWriteHalf, client: &OwnedReadHalf) -> bool {
    let mut writing = std::pin::pin!(to.write_all(piece));
    loop {
        tokio::select! {
            written = &mut writing => return written.is_ok(),
            is_there = is_there_after(client, LOOK_INTERVAL) => if !is_there {
                return false;
            },
        }
    }
}
