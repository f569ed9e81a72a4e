//! Why the host does not do what the benchmark asks.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use thiserror::Error;

/// A host that refuses, or is not as expected.
#[derive(Debug, Error)]
pub enum HostError {
    /// A file or directory.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// The verb.
        action: &'static str,
        /// Which one.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A setting does not take a value.
    #[error("cannot set {} to {value:?}: {source}", path.display())]
    Set {
        /// Its file.
        path: PathBuf,
        /// The value.
        value: String,
        /// Why not.
        source: io::Error,
    },
    /// The kernel took a value without an error, and does not show it.
    #[error("{} was set to {value:?} and shows {found:?}", path.display())]
    NotKept {
        /// Its file.
        path: PathBuf,
        /// The value.
        value: String,
        /// What it shows.
        found: String,
    },
    /// The kernel lacks a setting that is needed.
    #[error("this kernel has no {}, which is to be {value:?}", path.display())]
    Missing {
        /// Its file.
        path: PathBuf,
        /// What it was to be.
        value: String,
    },
    /// A text that is not what it should be.
    #[error("{}: {text:?} is not {expected}", path.display())]
    Malformed {
        /// The file with it.
        path: PathBuf,
        /// The text.
        text: String,
        /// What was expected.
        expected: &'static str,
    },
    /// Somebody else measures.
    #[error("another benchmark is running: it has {} locked", path.display())]
    InUse {
        /// What it has locked.
        path: PathBuf,
    },
    /// A run was killed.
    #[error(
        "{}: a benchmark (process {pid}) was killed and left host settings changed; \
         run `density --restore` first", path.display()
    )]
    LeftOver {
        /// The journal.
        path: PathBuf,
        /// The run's process.
        pid: u32,
    },
    /// No cgroup can be made.
    #[error("no memory cgroup of {limit_bytes} bytes can be made: {reason}")]
    NoGroup {
        /// Its limit.
        limit_bytes: u64,
        /// Why not, for each hierarchy.
        reason: String,
    },
    /// Something takes too long.
    #[error("not within {time:?}: {what}")]
    TooLate {
        /// What was waited for.
        what: String,
        /// How long.
        time: Duration,
    },
    /// More than one thing failed, all of which were tried.
    #[error("{}", messages(.0))]
    Several(Vec<HostError>),
}

impl HostError {
    /// An error of a file, to be used with `map_err`.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> HostError {
        move |source| HostError::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }

    /// Success if there were no errors; else the only one, or all of them.
    ///
    /// # Errors
    /// In the latter two cases.
    pub(crate) fn all(mut errors: Vec<HostError>) -> Result<(), HostError> {
        match errors.len() {
            0 => Ok(()),
            1 => Err(errors.remove(0)),
            _ => Err(HostError::Several(errors)),
        }
    }
}

fn messages(errors: &[HostError]) -> String {
    let all: Vec<String> = errors.iter().map(ToString::to_string).collect();
    all.join("; ")
}
