//! `samepage run`: one VM in the foreground, without a server.

use std::convert::Infallible;
use std::io::Write;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use vmm::{Console, ConsoleRead, EndReason, Monitor, VmConfig, VmId};

use crate::cli::RunArgs;
use crate::command::CommandError;
use crate::console_stream::LostOutput;
use crate::limits;
use crate::note::note;
use crate::signals::EndSignals;
use crate::terminal::{self, END_SIGNALS, Escape, Keyboard, RawTerminal};
use crate::vm_args;

/// How often the console's reader looks whether it is still wanted.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// How long to wait before a full input queue is tried again.
const INPUT_RETRY: Duration = Duration::from_millis(5);
/// How long the end of a VM may take.
const WAIT_TIME: Duration = Duration::from_secs(60);

/// What ended the wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cause {
    /// The VM, by itself.
    Vm,
    /// Ctrl-A x.
    Escape,
    /// Nobody reads the console's output any more.
    OutputLost,
    /// A signal, by its number.
    Signal(u8),
}

/// Runs the VM to its end.
///
/// # Errors
/// If the arguments make no VM, or it cannot start.
pub async fn run(args: &RunArgs) -> Result<ExitCode, CommandError> {
    let config = vm_args::to_config(&args.vm)?;
    limits::survive_large_files().map_err(CommandError::os("sigxfsz"))?;
    limits::raise().map_err(CommandError::os("limits of the process"))?;
    let id: VmId = "run"
        .parse()
        .map_err(|e| CommandError::Other(format!("{e}")))?;
    let starting = tokio::task::spawn_blocking({
        let id = id.clone();
        move || start(&id, config)
    });
    let (monitor, console) = starting.await.map_err(join_failed)??;

    let is_terminal = RawTerminal::is_present();
    if is_terminal {
        note(format_args!("Ctrl-A x ends the vm"));
    }
    let mut signals = EndSignals::catch(&END_SIGNALS).map_err(CommandError::os("signals"))?;
    let terminal = RawTerminal::enter()?;
    let (keyboard, escape) = Keyboard::open(is_terminal)?;
    let lost_bytes = keyboard.lost_bytes();
    let cause = until_end(&console, keyboard, escape, &mut signals).await;
    let reason = end(monitor, id, matches!(cause, Ok(Cause::Vm))).await;
    drop(terminal);
    let (cause, reason) = (cause?, reason?);
    if is_terminal {
        // The guest may have left the cursor anywhere in a line.
        let _ = writeln!(std::io::stderr());
    }
    terminal::note_lost(&lost_bytes);
    note(format_args!("vm ended: {reason}"));
    Ok(exit_code(cause, &reason))
}

fn start(id: &VmId, config: VmConfig) -> Result<(Monitor, Console), CommandError> {
    // Without a merge domain of its own it is the one VM of a monitor named after it.
    let domain = match &config.samepage.merge_domain {
        Some(domain) => domain.clone(),
        None => {
            let named = id.as_str().parse();
            named.map_err(|e| CommandError::Other(format!("{e}")))?
        }
    };
    let monitor = Monitor::new(domain, dedup::Settings::default())?;
    monitor.create(id.clone(), config)?;
    monitor.start(id)?;
    let console = monitor.console(id)?;
    Ok((monitor, console))
}

async fn until_end(
    console: &Console,
    keyboard: Keyboard,
    escape: Escape,
    signals: &mut EndSignals,
) -> Result<Cause, CommandError> {
    let (shown, all_shown) = oneshot::channel();
    let output = console.clone();
    std::thread::Builder::new()
        .name("console".to_owned())
        .spawn(move || {
            // The wait below may be over for another reason.
            let _ = shown.send(show(&output));
        })
        .map_err(CommandError::os("thread for the console"))?;
    let cause = tokio::select! {
        // The console ends with the VM, when its last words were shown.
        shown = all_shown => match shown {
            Ok(Err(error)) => {
                log::warn!("console: standard output: {error}");
                Cause::OutputLost
            }
            _ => Cause::Vm,
        },
        never = type_all(keyboard, console) => match never {},
        () = escape.pressed() => Cause::Escape,
        number = signals.came() => Cause::Signal(number),
    };
    Ok(cause)
}

/// Copies the console to standard output until the VM ends.
fn show(console: &Console) -> std::io::Result<()> {
    let mut reader = console.subscribe();
    let mut lost = LostOutput::default();
    loop {
        match reader.read(LOOK_INTERVAL) {
            ConsoleRead::Bytes(bytes) => {
                let mut stdout = std::io::stdout().lock();
                stdout.write_all(lost.note(&reader).as_bytes())?;
                stdout.write_all(&bytes)?;
                stdout.flush()?;
            }
            ConsoleRead::TimedOut => {}
            ConsoleRead::Ended => return Ok(()),
        }
    }
}

/// Gives the guest what is typed, and never comes back: at the end of the input the VM goes on.
async fn type_all(mut keyboard: Keyboard, console: &Console) -> Infallible {
    while let Some(bytes) = keyboard.next().await {
        let mut left = &bytes[..];
        while !left.is_empty() {
            // Nothing is taken while the guest does not read, nor any more when it has ended.
            let taken = console.write_input(left).unwrap_or(0);
            left = &left[taken..];
            if taken == 0 {
                tokio::time::sleep(INPUT_RETRY).await;
            }
        }
    }
    std::future::pending().await
}

/// Waits for the VM's end, and brings it about if it does not come by itself.
async fn end(monitor: Monitor, id: VmId, by_itself: bool) -> Result<EndReason, CommandError> {
    let ending = tokio::task::spawn_blocking(move || {
        if !by_itself {
            // It may end by itself at this very moment: then there is nothing to stop.
            let _ = monitor.stop(&id);
        }
        let reason = monitor.wait_ended(&id, Instant::now() + WAIT_TIME);
        reason.ok_or_else(|| CommandError::Other("the vm does not end".to_owned()))
    });
    ending.await.map_err(join_failed)?
}

#[expect(clippy::needless_pass_by_value, reason = "a function for map_err")]
fn join_failed(error: tokio::task::JoinError) -> CommandError {
    CommandError::Other(format!("the vm's task failed: {error}"))
}

/// The exit status that `run --help` documents.
fn exit_code(cause: Cause, reason: &EndReason) -> ExitCode {
    let code = match (cause, reason) {
        (Cause::OutputLost, _) => 1,
        (Cause::Signal(number), EndReason::Stopped) => 128 + number,
        (_, EndReason::GuestShutdown | EndReason::GuestReset | EndReason::Stopped) => 0,
        (_, EndReason::GuestPanic) => 3,
        (_, EndReason::TripleFault) => 4,
        (_, EndReason::EmulationFailure { .. }) => 5,
        (_, EndReason::Error(_) | EndReason::OomVictim) => 6,
    };
    ExitCode::from(code)
}
