//! `samepage serve`: the REST server.

use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use tokio::net::UnixListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

use crate::cli::ServeArgs;
use crate::command::CommandError;
use crate::front_door::FrontDoor;
use crate::limits;
use crate::note::note;
use crate::server;
use crate::socket::ApiSocket;

/// Serves on `path` until SIGINT, SIGTERM or SIGHUP.
///
/// # Errors
/// If the socket is taken or cannot be made, or a declared domain cannot be opened.
pub async fn serve(path: &Path, args: ServeArgs) -> Result<(), CommandError> {
    // Caught from before the socket exists: whoever can see the socket can stop us cleanly.
    let mut interrupt = signal(SignalKind::interrupt()).map_err(CommandError::os("sigint"))?;
    let mut terminate = signal(SignalKind::terminate()).map_err(CommandError::os("sigterm"))?;
    let mut hang_up = watch_hang_up()?;
    limits::survive_large_files().map_err(CommandError::os("sigxfsz"))?;
    if let Err(error) = limits::raise() {
        log::warn!("cannot raise the limits of open files and file sizes: {error}");
    }
    let settings = dedup::Settings {
        run: dedup::Run::Merge,
        memory_budget_bytes: args
            .memory_budget_mib
            .filter(|&mib| mib > 0)
            .map(|mib| u64::from(mib) << 20),
        ..dedup::Settings::default()
    };
    let door = Arc::new(FrontDoor::new(settings));
    for domain in args.domains {
        door.declare(domain)
            .map_err(|fault| CommandError::Other(fault.message))?;
    }
    let (socket, listener) = ApiSocket::bind(path)?;
    listener
        .set_nonblocking(true)
        .map_err(CommandError::os("api socket"))?;
    let listener = UnixListener::from_std(listener).map_err(CommandError::os("api socket"))?;
    // A parent process that holds our standard input knows, and has its own things to say.
    if !args.stop_on_stdin_end {
        note(format_args!("serving on {}", socket.path().display()));
    }

    let stdin_end = watch_stdin(args.stop_on_stdin_end)?;
    let stop = async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            Some(()) = next(&mut hang_up) => {}
            Ok(()) = stdin_end => {}
        }
    };
    let served = server::serve(listener, door, stop).await;
    served.map_err(CommandError::os("api socket"))
}

/// Catches SIGHUP, unless our parent had it ignored: whoever uses nohup wants us to stay.
fn watch_hang_up() -> Result<Option<Signal>, CommandError> {
    let status = std::fs::read_to_string("/proc/self/status");
    let status = status.map_err(CommandError::os("own signals"))?;
    if ignores(&status, SignalKind::hangup()) {
        return Ok(None);
    }
    let hang_up = signal(SignalKind::hangup()).map_err(CommandError::os("sighup"))?;
    Ok(Some(hang_up))
}

/// Whether the process of this `/proc/PID/status` ignores `signal`: bit n - 1 of `SigIgn` is
/// signal n (`proc_pid_status(5)`).
fn ignores(status: &str, signal: SignalKind) -> bool {
    let mask = status
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal.as_raw_value() - 1) & 1 == 1)
}

/// The next of these signals; never if they are not caught.
async fn next(caught: &mut Option<Signal>) -> Option<()> {
    match caught {
        Some(caught) => caught.recv().await,
        None => std::future::pending().await,
    }
}

/// Completes at the end of standard input if `is_wanted`, and fails at once if not.
fn watch_stdin(is_wanted: bool) -> Result<oneshot::Receiver<()>, CommandError> {
    let (ended, end) = oneshot::channel();
    if is_wanted {
        // A thread of its own: a read of standard input cannot be taken back.
        let watching = std::thread::Builder::new().name("stdin".to_owned());
        let read_to_end = move || {
            let mut scrap = [0; 256];
            let mut stdin = std::io::stdin().lock();
            while stdin.read(&mut scrap).is_ok_and(|length| length > 0) {}
            // Nobody listens any more: the server is stopping already.
            let _ = ended.send(());
        };
        watching
            .spawn(read_to_end)
            .map_err(CommandError::os("thread for standard input"))?;
    }
    Ok(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ignored_signals_are_told_from_the_others() {
        let status = "Name:\tsamepage\nSigBlk:\t0000000000000001\nSigIgn:\t0000000000001001\n";
        assert!(ignores(status, SignalKind::hangup()));
        assert!(ignores(status, SignalKind::pipe()));
        assert!(!ignores(status, SignalKind::terminate()));
        assert!(!ignores("", SignalKind::hangup()));
    }
}
