//! The HTTP server: connections in, [`Request`]s to the front door, replies out.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::UPGRADE;
use hyper::server::conn::http1::{self, UpgradeableConnection};
use hyper::service::{Service, service_fn};
use hyper::{Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use vmm::VmId;

use crate::connections::{CONNECTIONS_MAX, Connections, Turn};
use crate::console_stream::ConsoleStreams;
use crate::domains::gateway::Gateway;
use crate::domains::proxy::Received;
use crate::fault::Fault;
use crate::firecracker::{self, Asked};
use crate::front_door::FrontDoor;
use crate::reply::{self, CONSOLE_PROTOCOL};
use crate::request::Request;
use crate::request_body::read_body;
use crate::route::route;
use crate::vm_sockets::VmSockets;
use crate::wire::Wire;

/// Largest head of a request, and what is read of a connection ahead of time.
const HEAD_MAX_BYTES: usize = 16 << 10;
/// Waits between two tries to accept where there are no descriptors left: twice as long each time.
const ACCEPT_RETRY: Duration = Duration::from_millis(10);
const ACCEPT_RETRY_MAX: Duration = Duration::from_secs(1);

/// How long the end of all VMs may take when the server stops; what has not ended then ends with the
/// process. With `DIRECTORY_TIME` of the VMs' sockets, `FAREWELL_TIME` and the last wait of `main` it
/// makes 20 s.
pub const CLOSE_TIME: Duration = Duration::from_secs(14);
/// How long open connections may take to finish when the server stops. Nothing else of its end
/// waits for a client.
const FAREWELL_TIME: Duration = Duration::from_secs(2);

/// Who carries requests out.
#[derive(Debug, Clone)]
pub enum Backend {
    /// Monitors in this process.
    InProcess(Arc<FrontDoor>),
    /// A process for each merge domain.
    PerDomain(Arc<Gateway>),
}

impl Backend {
    /// The VMs there are.
    pub fn vm_ids(&self) -> BTreeSet<VmId> {
        match self {
            Backend::InProcess(door) => door.vm_ids(),
            Backend::PerDomain(gateway) => gateway.vm_ids(),
        }
    }
}

/// What a connection is served with.
#[derive(Debug, Clone)]
pub struct Serving {
    /// Who carries requests out.
    pub backend: Backend,
    /// The VMs' own sockets, if there are any.
    pub sockets: Option<Arc<VmSockets>>,
    /// The VM whose socket the connection is on; `None` on the server's.
    pub vm: Option<VmId>,
    /// The console streams.
    pub(crate) streams: ConsoleStreams,
}

impl Serving {
    /// On the server's own socket.
    pub fn new(backend: Backend, sockets: Option<Arc<VmSockets>>) -> Serving {
        Serving {
            backend,
            sockets,
            vm: None,
            streams: ConsoleStreams::default(),
        }
    }

    /// Brings the VMs' sockets in line with the VMs.
    async fn follow_vms(&self) {
        if let Some(sockets) = &self.sockets {
            sockets.follow(self.clone()).await;
        }
    }
}

/// The VMs did not all end when the server was told to stop.
#[derive(Debug, thiserror::Error)]
#[error("not all vms ended within {CLOSE_TIME:?}")]
pub struct NotClosed;

/// Serves until `stop` is done; then ends all VMs and lets open requests and streams finish. Errors
/// of single connections are logged.
///
/// # Errors
/// If a VM hangs at its end.
pub async fn serve(
    listener: UnixListener,
    serving: Serving,
    stop: impl Future<Output = ()>,
) -> Result<(), NotClosed> {
    let (stopping, stopped) = watch::channel(false);
    let mut connections = Connections::at_most(CONNECTIONS_MAX);
    // Those of VMs that an earlier server left.
    serving.follow_vms().await;
    let mut stop = std::pin::pin!(stop);
    loop {
        tokio::select! {
            () = &mut stop => break,
            (stream, _) = accept(|| listener.accept()) => connections.add(stream, |stream, turn| {
                converse(stream, turn, serving.clone(), stopped.clone())
            }),
        }
    }
    drop(listener);
    let Serving {
        backend,
        sockets,
        streams,
        ..
    } = serving;
    if let Some(sockets) = sockets {
        sockets.close().await;
    }
    // Streams of VMs that go on would not end.
    let waits_for_streams = match &backend {
        Backend::InProcess(_) => true,
        Backend::PerDomain(gateway) => !gateway.leaves_vms(),
    };
    close(backend).await?;
    stopping.send_replace(true);
    let farewell = async {
        connections.ended().await;
        // With their VMs they have ended; what those said last is still on its way.
        if waits_for_streams {
            streams.ended().await;
        }
    };
    if tokio::time::timeout(FAREWELL_TIME, farewell).await.is_err() {
        log::warn!("connections cut that did not finish in {FAREWELL_TIME:?}");
    }
    Ok(())
}

/// Serves on a VM's socket until the other end of `stopped` says so or is gone; then lets open
/// requests finish. There are `most` connections at a time.
pub async fn accept_until(
    listener: UnixListener,
    most: usize,
    serving: Serving,
    mut stopped: watch::Receiver<bool>,
) {
    let mut connections = Connections::at_most(most);
    let theirs = stopped.clone();
    // The guard of the watched value is dropped before anything is awaited.
    let stop = async { drop(stopped.wait_for(|&is_stopping| is_stopping).await) };
    let mut stop = std::pin::pin!(stop);
    loop {
        tokio::select! {
            () = &mut stop => break,
            (stream, _) = accept(|| listener.accept()) => connections.add(stream, |stream, turn| {
                converse(stream, turn, serving.clone(), theirs.clone())
            }),
        }
    }
    drop(listener);
    // A client that does not read its reply is cut.
    let _ = tokio::time::timeout(FAREWELL_TIME, connections.ended()).await;
}

/// The next connection that `accept_one` gives.
async fn accept<C, F>(mut accept_one: impl FnMut() -> F) -> C
where
    F: Future<Output = io::Result<C>>,
{
    let mut retry = ACCEPT_RETRY;
    loop {
        match accept_one().await {
            Ok(connection) => return connection,
            // Out of file descriptors: the next try may find one again.
            Err(error) => {
                if retry == ACCEPT_RETRY {
                    log::warn!("api socket: cannot accept: {error}");
                }
                tokio::time::sleep(retry).await;
                retry = ACCEPT_RETRY_MAX.min(2 * retry);
            }
        }
    }
}

/// Ends all VMs.
async fn close(backend: Backend) -> Result<(), NotClosed> {
    let closing = match backend {
        Backend::InProcess(door) => tokio::task::spawn_blocking(move || door.close()),
        Backend::PerDomain(gateway) => tokio::spawn(async move { gateway.close().await }),
    };
    match tokio::time::timeout(CLOSE_TIME, closing).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => {
            log::error!("closing the merge domains: {error}");
            Ok(())
        }
        Err(_) => Err(NotClosed),
    }
}

async fn converse(
    stream: UnixStream,
    turn: Arc<Turn>,
    serving: Serving,
    mut stopped: watch::Receiver<bool>,
) {
    let service = service_fn(move |request| {
        let (serving, turn) = (serving.clone(), Arc::clone(&turn));
        async move {
            let response = answer(&serving, &turn, request).await;
            turn.answered();
            Ok::<_, Infallible>(response)
        }
    });
    let mut connection = std::pin::pin!(connection(stream, service));
    // The guard of the watched value is dropped before anything is awaited.
    let stop = async { drop(stopped.wait_for(|&is_stopping| is_stopping).await) };
    let done = tokio::select! {
        done = &mut connection => done,
        () = stop => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = done {
        log::debug!("api connection: {error}");
    }
}

/// HTTP on `stream`, spoken as Firecracker's server does, with `service` for the answers.
pub(crate) fn connection<S, V>(stream: S, service: V) -> UpgradeableConnection<TokioIo<Wire<S>>, V>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    V: Service<hyper::Request<Incoming>, Response = Response<Full<Bytes>>, Error = Infallible>,
{
    http1::Builder::new()
        .auto_date_header(false)
        .title_case_headers(true)
        .half_close(true)
        .max_buf_size(HEAD_MAX_BYTES)
        .serve_connection(TokioIo::new(Wire::new(stream)), service)
        .with_upgrades()
}

async fn answer(
    serving: &Serving,
    turn: &Turn,
    request: hyper::Request<Incoming>,
) -> Response<Full<Bytes>> {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let answered = answer_or_fault(serving, turn, request).await;
    let mut response = answered.unwrap_or_else(|fault| {
        if fault.status == StatusCode::INTERNAL_SERVER_ERROR {
            log::error!("{method} {path}: {}", fault.message);
        }
        fault.into_response()
    });
    if serving.vm.is_some() {
        response = firecracker::refuse_alike(response);
    }
    log::debug!("{method} {path}: {}", response.status());
    response
}

async fn answer_or_fault(
    serving: &Serving,
    turn: &Turn,
    request: hyper::Request<Incoming>,
) -> Result<Response<Full<Bytes>>, Fault> {
    let (mut parts, body) = request.into_parts();
    let body = read_body(body).await?;
    turn.request_came();
    let path = match &serving.vm {
        None => parts.uri.path().to_owned(),
        Some(id) => firecracker::path_of(id, &parts.method, parts.uri.path())?,
    };
    let request = route(&parts.method, &path, &body)?;
    if let (Request::CreateVm(id, _), Some(sockets)) = (&request, &serving.sockets) {
        sockets.check(id)?;
    }
    let wants_stream = parts.headers.get(UPGRADE).is_some_and(|protocol| {
        protocol
            .as_bytes()
            .eq_ignore_ascii_case(CONSOLE_PROTOCOL.as_bytes())
    });
    if let (Request::VmConsole(_), true) = (&request, wants_stream) {
        let upgrade = parts
            .extensions
            .remove::<hyper::upgrade::OnUpgrade>()
            .ok_or_else(|| Fault::bad_request("console stream: needs `Connection: Upgrade`"));
        return open_stream(serving, &request, &path, upgrade?).await;
    }
    let asked = Asked::of(&request);
    // A list may take VMs on that were not known.
    let changes_vms = matches!(
        request,
        Request::CreateVm(..) | Request::DeleteVm(_) | Request::ListVms
    );
    let received = Received {
        method: parts.method,
        path,
        body,
    };
    let response = carry_out(&serving.backend, request, received).await;
    if changes_vms {
        serving.follow_vms().await;
    }
    match &serving.vm {
        None => response,
        Some(_) => firecracker::adapt(asked, response?).await,
    }
}

/// Joins a client's connection with a console.
async fn open_stream(
    serving: &Serving,
    request: &Request,
    path: &str,
    upgrade: hyper::upgrade::OnUpgrade,
) -> Result<Response<Full<Bytes>>, Fault> {
    match (&serving.backend, request) {
        (Backend::InProcess(door), Request::VmConsole(id)) => {
            serving.streams.open(upgrade, door.console(id)?)?;
            Ok(reply::switch_to_console())
        }
        (Backend::InProcess(_), _) => Err(Fault::internal(format!("{path}: is no console"))),
        (Backend::PerDomain(gateway), _) => {
            gateway
                .stream(request, path, upgrade, &serving.streams)
                .await
        }
    }
}

async fn carry_out(
    backend: &Backend,
    request: Request,
    received: Received,
) -> Result<Response<Full<Bytes>>, Fault> {
    let door = match backend {
        Backend::InProcess(door) => Arc::clone(door),
        Backend::PerDomain(gateway) => return gateway.answer(request, received).await,
    };
    let place = door.place_for(&request).await?;
    let handle = move || {
        let reply = door.handle(request);
        drop(place);
        reply
    };
    let handled = tokio::task::spawn_blocking(handle).await;
    let reply = handled.map_err(|error| Fault::internal(format!("request failed: {error}")))??;
    Ok(reply.into_response())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn without_descriptors_it_is_tried_again_once_a_second_and_no_more() {
        let mut tries = 0;
        let accepting = accept(|| {
            tries += 1;
            assert!(tries < 10_000, "it is tried again and again");
            async { Err::<(), _>(io::Error::from_raw_os_error(libc::EMFILE)) }
        });
        // The runtime's clock goes on when all wait.
        let minute = Duration::from_secs(60);
        tokio::time::timeout(minute, accepting).await.unwrap_err();
        assert!((60..=70).contains(&tries), "{tries}");
    }

    #[tokio::test(start_paused = true)]
    async fn connection_is_there_when_there_is_a_descriptor_again() {
        let mut tries = 0;
        let accepted = accept(|| {
            tries += 1;
            std::future::ready(match tries {
                1..5 => Err(io::Error::from_raw_os_error(libc::EMFILE)),
                _ => Ok("a client"),
            })
        });
        assert_eq!(accepted.await, "a client");
    }
}
