//! The commands: a module each, and what they have in common.

pub mod console;
pub mod demo;
pub mod doctor;
pub mod launch;
pub mod monitor;
pub mod ps;
pub mod run;
pub mod serve;
pub mod stats;
pub mod vm;

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use crate::cli::{Cli, Command};
use crate::client::{Client, ClientError};
use crate::request::DesiredState;
use crate::socket::SocketError;

/// Why a command failed: one clear line behind `samepage: error: `.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// A call to the server.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The server's socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The monitor, where a command runs one itself.
    #[error(transparent)]
    Monitor(#[from] vmm::MonitorError),
    /// The arguments and the config file do not make a VM.
    #[error(transparent)]
    VmArgs(#[from] crate::vm_args::VmArgsError),
    /// A system call.
    #[error("{what}: {source}")]
    Os {
        /// What was tried.
        what: String,
        /// The system's answer.
        source: io::Error,
    },
    /// Anything else, in words.
    #[error("{0}")]
    Other(String),
}

impl CommandError {
    /// For `map_err` on a system call: `what` was tried.
    pub fn os(what: impl Into<String>) -> impl FnOnce(io::Error) -> CommandError {
        let what = what.into();
        move |source| CommandError::Os { what, source }
    }

    /// Whether the reader of our standard output has gone, as `head` does.
    pub fn is_broken_pipe(&self) -> bool {
        matches!(self, CommandError::Os { source, .. }
            if source.kind() == io::ErrorKind::BrokenPipe)
    }
}

/// Runs a command to its end.
///
/// # Errors
/// See [`CommandError`].
pub async fn execute(cli: Cli) -> Result<ExitCode, CommandError> {
    let socket = cli.api_sock.unwrap_or_else(default_socket);
    let client = Client::new(&socket);
    match cli.command {
        Command::Serve(args) => serve::serve(&socket, &args).await?,
        Command::Monitor(args) => monitor::monitor(args).await?,
        Command::Run(args) => return run::run(&args).await,
        Command::Launch(args) => launch::launch(&client, &args).await?,
        Command::Ps(args) => ps::ps(&client, &args).await?,
        Command::Pause(args) => vm::set_state(&client, &args, DesiredState::Paused).await?,
        Command::Resume(args) => vm::set_state(&client, &args, DesiredState::Resumed).await?,
        Command::Stop(args) => vm::stop(&client, &args).await?,
        Command::Merge(args) => vm::merge(&client, &args).await?,
        Command::Rm(args) => vm::rm(&client, &args).await?,
        Command::Console(args) => return console::console(&client, &args).await,
        Command::Stats(args) => stats::stats(&client, &args).await?,
        Command::Doctor(args) => return doctor::doctor(&args).await,
        Command::Demo(args) => return demo::demo(&args).await,
    }
    Ok(ExitCode::SUCCESS)
}

fn default_socket() -> PathBuf {
    socket_from(|name| std::env::var_os(name).map(PathBuf::from))
}

/// Where the server is if `--api-sock` does not say.
fn socket_from(variable: impl Fn(&str) -> Option<PathBuf>) -> PathBuf {
    let given = |name| variable(name).filter(|value| !value.as_os_str().is_empty());
    given("SAMEPAGE_SOCKET").unwrap_or_else(|| {
        given("XDG_RUNTIME_DIR")
            .as_deref()
            .unwrap_or(Path::new("/run"))
            .join("samepage.sock")
    })
}

/// Writes to standard output, with an error where `print!` would panic.
///
/// # Errors
/// When nobody reads it any more, among others.
pub fn print(text: &str) -> Result<(), CommandError> {
    use io::Write;
    let mut stdout = io::stdout().lock();
    stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
        .map_err(CommandError::os("standard output"))
}

/// `value` as indented JSON with a newline at its end.
///
/// # Errors
/// If it has no JSON form; all of ours have one.
pub fn to_pretty_json(value: &impl serde::Serialize) -> Result<String, CommandError> {
    serde_json::to_string_pretty(value)
        .map(|json| json + "\n")
        .map_err(|error| CommandError::Other(format!("no json form: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_is_found_in_the_documented_order() {
        let all = |name: &str| match name {
            "SAMEPAGE_SOCKET" => Some(PathBuf::from("/s.sock")),
            "XDG_RUNTIME_DIR" => Some(PathBuf::from("/run/user/7")),
            _ => None,
        };
        assert_eq!(socket_from(all), Path::new("/s.sock"));
        let no_own = |name: &str| all(name).filter(|_| name != "SAMEPAGE_SOCKET");
        assert_eq!(socket_from(no_own), Path::new("/run/user/7/samepage.sock"));
        assert_eq!(socket_from(|_| None), Path::new("/run/samepage.sock"));
        assert_eq!(
            socket_from(|_| Some(PathBuf::new())),
            Path::new("/run/samepage.sock")
        );
    }
}
