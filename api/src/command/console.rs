//! `samepage console`: a VM's serial console on this terminal.

use std::io::Write;
use std::process::ExitCode;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::cli::ConsoleArgs;
use crate::client::{Client, ClientError, ConsoleConnection};
use crate::command::CommandError;
use crate::note::note;
use crate::signals::EndSignals;
use crate::terminal::{self, END_SIGNALS, Keyboard, RawTerminal};

/// Shows the console until the VM ends or the user detaches.
///
/// # Errors
/// If there is no VM of this id, standard output cannot be written, or the server ends.
pub async fn console(client: &Client, args: &ConsoleArgs) -> Result<ExitCode, CommandError> {
    let id = args.id.as_str();
    if args.history {
        show(&client.console_history(id).await?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let stream = client.console_stream(id).await?;
    if args.no_input {
        watch(stream).await?;
        return ended(client, id).await;
    }
    let is_terminal = RawTerminal::is_present();
    if is_terminal {
        note(format_args!("attached to {id}; Ctrl-A x detaches"));
    }
    // Caught before the terminal is changed, so that it is put right whatever ends us.
    let mut signals = EndSignals::catch(&END_SIGNALS).map_err(CommandError::os("signals"))?;
    let terminal = RawTerminal::enter()?;
    let (keyboard, escape) = Keyboard::open(is_terminal)?;
    let lost_bytes = keyboard.lost_bytes();
    let attached = tokio::select! {
        attached = attach(stream, keyboard) => attached.map(|()| Left::Ended),
        () = escape.pressed() => Ok(Left::Detached),
        number = signals.came() => Ok(Left::Signal(number)),
    };
    drop(terminal);
    if is_terminal {
        // The guest may have left the cursor anywhere in a line.
        let _ = writeln!(std::io::stderr());
        note(format_args!("detached from {id}"));
    }
    terminal::note_lost(&lost_bytes);
    match attached? {
        Left::Ended => ended(client, id).await,
        Left::Detached => Ok(ExitCode::SUCCESS),
        Left::Signal(number) => Ok(ExitCode::from(128 + number)),
    }
}

/// Why the console was left.
enum Left {
    Ended,
    Detached,
    Signal(u8),
}

/// Tells the end of the VM from the end of its server: the stream looks the same.
async fn ended(client: &Client, id: &str) -> Result<ExitCode, CommandError> {
    match client.describe_vm(id).await {
        // Deleted, it has ended too.
        Ok(_) | Err(ClientError::Fault { .. }) => Ok(ExitCode::SUCCESS),
        Err(_) => Err(CommandError::Other(format!(
            "console of {id}: the server has ended"
        ))),
    }
}

fn show(bytes: &[u8]) -> Result<(), CommandError> {
    let mut stdout = std::io::stdout().lock();
    stdout
        .write_all(bytes)
        .and_then(|()| stdout.flush())
        .map_err(CommandError::os("standard output"))
}

async fn watch(mut stream: ConsoleConnection) -> Result<(), CommandError> {
    let mut buffer = [0; 4096];
    loop {
        let length = stream.read(&mut buffer).await;
        match length.map_err(CommandError::os("console"))? {
            0 => return Ok(()),
            length => show(&buffer[..length])?,
        }
    }
}

/// Types and shows until the console ends.
async fn attach(stream: ConsoleConnection, mut keyboard: Keyboard) -> Result<(), CommandError> {
    let (mut from_vm, mut to_vm) = tokio::io::split(stream);
    let typing = async move {
        while let Some(bytes) = keyboard.next().await {
            if to_vm.write_all(&bytes).await.is_err() {
                break;
            }
        }
        // The input has ended; both halves keep the connection open until dropped.
        to_vm
    };
    let mut typing = std::pin::pin!(typing);
    let mut still_typing = None;
    let mut buffer = [0; 4096];
    loop {
        tokio::select! {
            half = &mut typing, if still_typing.is_none() => still_typing = Some(half),
            length = from_vm.read(&mut buffer) => {
                match length.map_err(CommandError::os("console"))? {
                    0 => return Ok(()),
                    length => show(&buffer[..length])?,
                }
            }
        }
    }
}
