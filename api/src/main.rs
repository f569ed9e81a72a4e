//! The `samepage` command.

#![forbid(unsafe_code)]
#![warn(clippy::print_stdout, clippy::print_stderr)]

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use samepage::cli::{Cli, Command};
use samepage::note::{LogTarget, last_note, note, open_log};
use samepage::{command, lock_down};

/// How long the end of the process waits for requests that still run, if all is well so far.
const LAST_WAIT: Duration = Duration::from_secs(3);

fn main() -> ExitCode {
    let cli = Cli::parse();
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn"))
        .target(env_logger::Target::Pipe(Box::new(LogTarget::default())))
        .init();
    let is_server = matches!(cli.command, Command::Serve(_) | Command::Monitor(_));
    if let Command::Monitor(args) = &cli.command {
        // Before there is a second thread, which it would not hold for.
        for part in lock_down::lock_down(args.console_tails.as_deref()) {
            // Its front door warns, once.
            log::info!("this monitor is not fully locked down: {part}");
        }
    }
    if is_server {
        // From the beginning, so that a line takes neither a thread nor a descriptor.
        open_log();
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            note(format_args!("error: cannot start: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let done = runtime.block_on(command::execute(cli));
    match &done {
        Ok(_) => runtime.shutdown_timeout(LAST_WAIT),
        Err(_) => runtime.shutdown_background(),
    }
    match done {
        Ok(code) => code,
        Err(error) if error.is_broken_pipe() => ExitCode::SUCCESS,
        Err(error) => {
            let tell = if is_server { last_note } else { note };
            tell(format_args!("error: {error}"));
            ExitCode::FAILURE
        }
    }
}
