//! `samepage serve`: the REST server.

use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use tokio::net::UnixListener;
use tokio::signal::unix::SignalKind;
use tokio::sync::oneshot;

use crate::cli::ServeArgs;
use crate::command::CommandError;
use crate::domains::cgroup::CgroupParent;
use crate::domains::gateway::Gateway;
use crate::domains::process::StartSettings;
use crate::domains::state_dir::StateDir;
use crate::fault::Fault;
use crate::front_door::FrontDoor;
use crate::limits;
use crate::note::note;
use crate::server::{self, Backend, Serving};
use crate::signals::EndSignals;
use crate::socket::ApiSocket;
use crate::vm_sockets::VmSockets;

/// Serves on `path` until SIGINT, SIGTERM or SIGHUP. A second one ends the server at once.
///
/// # Errors
/// If the socket is taken or cannot be made, a declared domain cannot be opened, or VMs did not end
/// in time.
pub async fn serve(path: &Path, args: &ServeArgs) -> Result<(), CommandError> {
    // Caught from before the socket exists: whoever can see the socket can stop us cleanly.
    let kinds = [
        SignalKind::interrupt(),
        SignalKind::terminate(),
        SignalKind::hangup(),
    ];
    let mut signals = EndSignals::catch(&kinds).map_err(CommandError::os("signals"))?;
    limits::survive_large_files().map_err(CommandError::os("sigxfsz"))?;
    if let Err(error) = limits::raise() {
        log::warn!("cannot raise the limits of open files and file sizes: {error}");
    }
    let backend = open_backend(args).await?;
    let serving = Serving::new(backend.clone(), open_vm_sockets(args)?);
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
    let (stop, stopped) = oneshot::channel();
    let (cut, is_cut) = oneshot::channel();
    tokio::spawn(async move {
        let is_signal = tokio::select! {
            _ = signals.came() => true,
            Ok(()) = stdin_end => false,
        };
        // Nobody listens to either if the server has ended by itself.
        let _ = stop.send(());
        // A parent may close our input and send a signal as well.
        if !is_signal {
            signals.came().await;
        }
        signals.came().await;
        let _ = cut.send(());
    });
    let stop = async { drop(stopped.await) };
    let serving = server::serve(listener, serving, stop);
    let served = tokio::select! {
        served = serving => served.map_err(|error| CommandError::Other(error.to_string())),
        Ok(()) = is_cut => {
            Err(CommandError::Other("ended by a second signal, not all vms in order".to_owned()))
        }
    };
    if let (Err(_), Backend::PerDomain(gateway)) = (&served, &backend) {
        gateway.kill_all();
    }
    served
}

/// Opens the domains that are declared: as processes if there is a state directory, else in here.
async fn open_backend(args: &ServeArgs) -> Result<Backend, CommandError> {
    let other = |fault: Fault| CommandError::Other(fault.message);
    let Some(path) = &args.state_dir else {
        let door = FrontDoor::new(settings(args.memory_budget_mib));
        for domain in &args.domains {
            door.declare(domain.clone()).map_err(other)?;
        }
        return Ok(Backend::InProcess(Arc::new(door)));
    };
    let state = StateDir::open(path).map_err(|error| CommandError::Other(error.to_string()))?;
    let cgroup = args.cgroup.as_deref().map(CgroupParent::open).transpose();
    let settings = StartSettings {
        memory_budget_mib: args.memory_budget_mib,
        ends_with_parent: args.stop_all_on_exit,
        cgroup: cgroup.map_err(|error| CommandError::Other(error.to_string()))?,
    };
    let gateway = Gateway::open(state, settings, &args.domains).await;
    gateway.map(Backend::PerDomain).map_err(other)
}

/// The VMs' own sockets, in their directory or in that of the state.
fn open_vm_sockets(args: &ServeArgs) -> Result<Option<Arc<VmSockets>>, CommandError> {
    let of_state = args.state_dir.as_ref().map(|state| state.join("vms"));
    let Some(directory) = args.vm_sockets.clone().or(of_state) else {
        return Ok(None);
    };
    let sockets = VmSockets::in_directory(&directory);
    let sockets = sockets.map_err(|error| CommandError::Other(error.to_string()))?;
    Ok(Some(Arc::new(sockets)))
}

/// How the engine of each domain starts; no budget and one of 0 are none.
pub(super) fn settings(memory_budget_mib: Option<u32>) -> dedup::Settings {
    dedup::Settings {
        run: dedup::Run::Merge,
        memory_budget_bytes: memory_budget_mib
            .filter(|&mib| mib > 0)
            .map(|mib| u64::from(mib) << 20),
        ..dedup::Settings::default()
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
