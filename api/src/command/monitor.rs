//! `samepage monitor`: the process of one merge domain.
//!
//! It serves its socket as `serve` does, but makes VMs of its own domain alone. It is told nothing
//! by its parent once it runs, so it goes on when the parent is gone, unless it is to end then.
//!
//! The socket comes as standard input, because a process can be started with that without unsafe
//! code. It comes bound; the monitor listens on it itself. From then on `SO_PEERCRED` names the
//! monitor to its clients, whoever bound the socket (`net/unix/af_unix.c`, `unix_listen`), so a
//! supervisor that was started anew can tell which process it talks to.

use std::fs::File;
use std::future::pending;
use std::io::{stdin, stdout};
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener as StdListener;
use std::sync::Arc;

use rustix::net::{AddressFamily, SocketType, listen, sockopt};
use rustix::stdio::dup2_stdin;
use tokio::io::Interest;
use tokio::net::UnixListener;
use tokio::net::unix::pipe;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use crate::cli::MonitorArgs;
use crate::command::{CommandError, print, serve};
use crate::connections::CONNECTIONS_MAX;
use crate::console_tails::ConsoleTails;
use crate::domains::process::READY;
use crate::front_door::FrontDoor;
use crate::limits;
use crate::lock_down;
use crate::server::{self, Backend, Serving};
use crate::signals::EndSignals;

/// Serves one merge domain until SIGTERM. A second one ends the monitor at once.
///
/// # Errors
/// If standard input is no unix socket, the domain cannot be opened, or VMs did not end in time.
pub async fn monitor(args: MonitorArgs) -> Result<(), CommandError> {
    let mut signals =
        EndSignals::catch(&[SignalKind::terminate()]).map_err(CommandError::os("signals"))?;
    // Ctrl-C and a terminal that is closed are meant for the supervisor. Caught by a handler that
    // does nothing: what is ignored would be ignored in programs that are started too.
    for kind in [SignalKind::interrupt(), SignalKind::hangup()] {
        drop(signal(kind).map_err(CommandError::os("signals"))?);
    }
    limits::survive_large_files().map_err(CommandError::os("sigxfsz"))?;
    if let Err(error) = limits::raise() {
        log::warn!("cannot raise the limits of open files and file sizes: {error}");
    }
    lock_down::forbid_core_dumps().map_err(CommandError::os("core dumps"))?;
    let listener = inherited_listener()?;
    let settings = serve::settings(args.memory_budget_mib);
    let tails = args.console_tails.map(ConsoleTails::new);
    let door = FrontDoor::of_one_domain(args.domain, settings, tails)
        .map_err(|fault| CommandError::Other(fault.message))?;
    // Requests are served after this alone. If nobody is there to be told, the supervisor has died
    // over the start; its successor must find no monitor rather than one that nobody waited for.
    print(READY)?;
    let output = args.end_with_parent.then(watched_output).transpose()?;
    let (stop, stopped) = oneshot::channel();
    let (cut, is_cut) = oneshot::channel();
    tokio::spawn(async move {
        tokio::select! {
            _ = signals.came() => {}
            () = reader_gone(output) => {}
        }
        // Nobody listens to either if the server has ended by itself.
        let _ = stop.send(());
        signals.came().await;
        let _ = cut.send(());
    });
    let stop = async { drop(stopped.await) };
    let backend = Backend::InProcess(Arc::new(door));
    tokio::select! {
        served = server::serve(listener, Serving::new(backend, None), stop) => {
            served.map_err(|error| CommandError::Other(error.to_string()))
        }
        Ok(()) = is_cut => {
            Err(CommandError::Other("ended by a second signal, not all vms in order".to_owned()))
        }
    }
}

/// Standard output, to be watched for the end of its reader.
fn watched_output() -> Result<pipe::Sender, CommandError> {
    let output = stdout().as_fd().try_clone_to_owned();
    output
        .and_then(pipe::Sender::from_owned_fd)
        .map_err(CommandError::os("standard output"))
}

/// Waits until nobody holds the other end of `output`; for ever without one. The kernel reports that
/// as an error of the pipe.
async fn reader_gone(output: Option<pipe::Sender>) {
    match output {
        // Fails only without a reactor, and then nothing here works.
        Some(output) => drop(output.ready(Interest::ERROR).await),
        None => pending().await,
    }
}

/// Takes the socket over from standard input, which is empty from then on.
fn inherited_listener() -> Result<UnixListener, CommandError> {
    let input = stdin().as_fd().try_clone_to_owned();
    let input = input.map_err(CommandError::os("standard input"))?;
    let is_stream_of_unix = sockopt::socket_domain(&input) == Ok(AddressFamily::UNIX)
        && sockopt::socket_type(&input) == Ok(SocketType::STREAM);
    if !is_stream_of_unix {
        return Err(CommandError::Other(
            "standard input: is not a unix socket to listen on".to_owned(),
        ));
    }
    let most = i32::try_from(CONNECTIONS_MAX).unwrap_or(i32::MAX);
    listen(&input, most).map_err(|error| CommandError::os("listen")(error.into()))?;
    // Else the socket would still be open when the server has closed it, and clients would wait.
    let nothing = File::open("/dev/null").map_err(CommandError::os("open /dev/null"))?;
    dup2_stdin(&nothing).map_err(|error| CommandError::os("standard input")(error.into()))?;
    let listener = StdListener::from(input);
    listener
        .set_nonblocking(true)
        .and_then(|()| UnixListener::from_std(listener))
        .map_err(CommandError::os("api socket"))
}
