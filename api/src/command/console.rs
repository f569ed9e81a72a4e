//! `samepage console`: a VM's serial console on this terminal.

use std::io::Write;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::cli::ConsoleArgs;
use crate::client::{Client, ConsoleConnection};
use crate::command::CommandError;
use crate::note::note;
use crate::terminal::{Key, Keyboard, RawTerminal};

/// Shows the console until the VM ends or the user detaches.
///
/// # Errors
/// If there is no VM of this id, or standard output cannot be written.
pub async fn console(client: &Client, args: &ConsoleArgs) -> Result<(), CommandError> {
    let id = args.id.as_str();
    if args.history {
        return show(&client.console_history(id).await?);
    }
    let stream = client.console_stream(id).await?;
    if args.no_input {
        return watch(stream).await;
    }
    let is_terminal = RawTerminal::is_present();
    if is_terminal {
        note(format_args!("attached to {id}; Ctrl-A x detaches"));
    }
    let terminal = RawTerminal::enter()?;
    let attached = attach(stream, Keyboard::open(is_terminal)?).await;
    drop(terminal);
    if is_terminal {
        // The guest may have left the cursor anywhere in a line.
        let _ = writeln!(std::io::stderr());
        note(format_args!("detached from {id}"));
    }
    attached
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

async fn attach(stream: ConsoleConnection, mut keyboard: Keyboard) -> Result<(), CommandError> {
    let (mut from_vm, mut to_vm) = tokio::io::split(stream);
    let typing = async move {
        while let Some(Key::Bytes(bytes)) = keyboard.next().await {
            if to_vm.write_all(&bytes).await.is_err() {
                break;
            }
        }
        // Detached, or the input has ended; both halves keep the connection open until dropped.
        (to_vm, keyboard.is_escaped())
    };
    let mut typing = std::pin::pin!(typing);
    let mut still_typing = None;
    let mut buffer = [0; 4096];
    loop {
        tokio::select! {
            (half, is_escaped) = &mut typing, if still_typing.is_none() => {
                if is_escaped {
                    return Ok(());
                }
                still_typing = Some(half);
            }
            length = from_vm.read(&mut buffer) => {
                match length.map_err(CommandError::os("console"))? {
                    0 => return Ok(()),
                    length => show(&buffer[..length])?,
                }
            }
        }
    }
}
