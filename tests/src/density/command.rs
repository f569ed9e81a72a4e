//! The benchmark as a program: from its arguments to its exit status.

use std::ffi::OsString;
use std::path::Path;
use std::process::{Command, ExitCode};

use clap::Parser;
use indicatif::HumanDuration;
use jiff::{Timestamp, Unit};

use super::cli::Cli;
use super::guests::Images;
use super::host::{HostError, HostSettings, Restored, machine, restore_left_over};
use super::model::{Arm, Report};
use super::plan::{self, NothingToRun};
use super::report::{self, DocumentError};
use super::run::{Ended, Progress, StopSignals, carry_out};
use super::store::{self, StoreError};
use crate::binary;

/// Exit status after a signal, as a shell has it for SIGINT.
const INTERRUPTED: u8 = 130;
/// What repeats a run from a checkout, before its arguments.
const PROGRAM: &str = "cargo run --release -p samepage-tests --bin density --";

/// Why the benchmark as a whole fails.
#[derive(Debug, thiserror::Error)]
enum CommandError {
    #[error(transparent)]
    NothingToRun(#[from] NothingToRun),
    #[error(transparent)]
    Host(#[from] HostError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Document(#[from] DocumentError),
    #[error("{what}: {source}")]
    Os {
        what: String,
        source: std::io::Error,
    },
}

/// Runs the benchmark with the arguments of this process.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(status) => status,
        Err(error) => {
            eprintln!("density: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<ExitCode, CommandError> {
    if cli.restore {
        match restore_left_over()? {
            Restored::Nothing => println!("nothing to restore"),
            Restored::Done(done) => done.iter().for_each(|what| println!("{what}")),
        }
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(file) = &cli.from {
        let found = store::read(file)?;
        publish(cli, &found)?;
        return Ok(ExitCode::SUCCESS);
    }
    let arms = plan::arms(&cli.wishes())?;
    if let Some(path) = &cli.document {
        report::check_document(&arms, path)?;
    }
    // Before anything is changed: a build that fails or is interrupted leaves nothing to restore.
    binary::samepage();
    let images = Images::prepare(&arms);
    if let Some(file) = &cli.json {
        store::check(file)?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(os("async runtime"))?;
    let (found, is_interrupted) = runtime.block_on(make_runs(cli, &arms, &images))?;
    if is_interrupted {
        let kept = match (&cli.json, found.runs.len()) {
            (Some(file), 1..) => format!("the runs before are in {}", file.display()),
            _ => "nothing is kept".to_owned(),
        };
        eprintln!("density: interrupted; {kept}");
        return Ok(ExitCode::from(INTERRUPTED));
    }
    publish(cli, &found)?;
    let is_good = found.runs.iter().all(|run| run.errors.is_empty());
    Ok(if is_good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Makes all runs; true if a signal ended them early. The JSON file is written after each.
async fn make_runs(
    cli: &Cli,
    arms: &[Arm],
    images: &Images,
) -> Result<(Report, bool), CommandError> {
    let mut stop = StopSignals::catch().map_err(os("signals"))?;
    let mut settings = HostSettings::open()?;
    let mut found = Report {
        command: command_line(std::env::args_os().skip(1)),
        commit: commit(),
        date: today(),
        host: machine::describe()?,
        runs: Vec::new(),
    };
    let mut progress = Progress::new(arms);
    let mut is_interrupted = false;
    for &arm in arms {
        progress.begin(arm);
        match carry_out(arm, images, &mut settings, &mut stop, &progress).await {
            Ended::Over(run) => {
                progress.end(&run);
                found.runs.push(*run);
                // Not before there is one: the file may hold an earlier report.
                if let Some(file) = &cli.json {
                    store::write(file, &found)?;
                }
            }
            Ended::Interrupted => {
                is_interrupted = true;
                break;
            }
        }
    }
    progress.clear();
    settings.restore()?;
    eprintln!("took {}", HumanDuration(progress.elapsed()));
    Ok((found, is_interrupted))
}

/// Shows what was found in every form that was asked for.
fn publish(cli: &Cli, found: &Report) -> Result<(), CommandError> {
    println!("{}", report::table(found));
    if let Some(directory) = &cli.svg {
        let what = format!("plots in {}", directory.display());
        report::plots(found, directory).map_err(os(what))?;
    }
    if let Some(file) = &cli.document {
        report::document(found, file)?;
    }
    Ok(())
}

/// The command that repeats it.
fn command_line(arguments: impl Iterator<Item = OsString>) -> String {
    let mut line = PROGRAM.to_owned();
    for argument in arguments {
        line.push(' ');
        line += &argument.to_string_lossy();
    }
    line
}

/// Commit of the sources this was built from.
fn commit() -> String {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR"));
    let git = |arguments: &[&str]| {
        let output = Command::new("git")
            .arg("-C")
            .arg(sources)
            .args(arguments)
            .output();
        let output = output.ok().filter(|output| output.status.success())?;
        Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let Some(commit) = git(&["rev-parse", "HEAD"]) else {
        return "unknown".to_owned();
    };
    // A file that is not in the repository may be part of the build as well.
    match git(&["status", "--porcelain"]) {
        Some(changes) if changes.is_empty() => commit,
        _ => commit + "-dirty",
    }
}

fn today() -> String {
    let now = Timestamp::now();
    now.round(Unit::Second).unwrap_or(now).to_string()
}

fn os(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> CommandError {
    move |source| CommandError::Os {
        what: what.into(),
        source,
    }
}
