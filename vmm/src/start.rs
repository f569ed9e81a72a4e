//! Starting a VM: errors for now.
use crate::error::ErrorKind;

/// Why a VM could not be created or started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// A file the configuration names cannot be used.
    #[error("{field}: {path:?}: {error}")]
    File {
        /// The configuration's field.
        field: &'static str,
        /// The file.
        path: std::path::PathBuf,
        /// Why.
        #[source]
        error: std::io::Error,
    },
}

impl StartError {
    /// Whose fault it is.
    pub fn kind(&self) -> ErrorKind {
        ErrorKind::InvalidInput
    }
}
