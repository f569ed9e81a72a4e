//! Why a run came to no good end.

use std::io;
use std::process::ExitStatus;
use std::time::Duration;

use samepage::client::ClientError;
use thiserror::Error;

use crate::density::host::HostError;

/// What ends a run before its time.
#[derive(Debug, Error)]
pub(crate) enum RunError {
    /// The host does not do what the run needs.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The server does not answer, or not in time.
    #[error("the server: {0}")]
    Client(#[from] ClientError),
    /// The server ended.
    #[error("the server died ({status}): {last_words}")]
    ServerDied {
        /// How.
        status: ExitStatus,
        /// The end of its standard error.
        last_words: String,
    },
    /// It ended before it could be looked at.
    #[error("the server ended at once")]
    NoServer,
    /// Something took too long.
    #[error("not within {time:?}: {what}")]
    Late {
        /// What was waited for.
        what: String,
        /// How long.
        time: Duration,
    },
    /// The operating system refused something.
    #[error("{what}: {source}")]
    Os {
        /// What was to be done.
        what: &'static str,
        /// Its answer.
        source: io::Error,
    },
}

impl RunError {
    /// To be used with `map_err`.
    pub(crate) fn os(what: &'static str) -> impl FnOnce(io::Error) -> RunError {
        move |source| RunError::Os { what, source }
    }
}
