//! The JSON file of a report.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;
use thiserror::Error;

use super::model::Report;

/// A file that cannot be read or written.
#[derive(Debug, Error)]
pub enum StoreError {
    /// The operating system refuses.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// The verb.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is no report.
    #[error("{}: is no report of this version of the benchmark: {source}", path.display())]
    NoReport {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        source: serde_json::Error,
    },
}

/// Reads a report.
///
/// # Errors
/// If there is none.
pub fn read(path: &Path) -> Result<Report, StoreError> {
    let text = fs::read(path).map_err(io_error("read", path))?;
    serde_json::from_slice(&text).map_err(|source| StoreError::NoReport {
        path: path.to_owned(),
        source,
    })
}

/// Finds out whether a report can be written there, before an hour is spent on one. Makes the
/// directory if there is none.
///
/// # Errors
/// If it cannot.
pub fn check(path: &Path) -> Result<(), StoreError> {
    let directory = directory(path);
    fs::create_dir_all(directory).map_err(io_error("make", directory))?;
    NamedTempFile::new_in(directory)
        .map(drop)
        .map_err(io_error("write to", directory))
}

/// Writes a report: the file is the old one or the new one at any time.
///
/// # Errors
/// If it cannot be written.
pub fn write(path: &Path, report: &Report) -> Result<(), StoreError> {
    let failed = || io_error("write", path);
    let draft = NamedTempFile::new_in(directory(path)).map_err(failed())?;
    write_to(draft.as_file(), report).map_err(failed())?;
    let written = draft.persist(path).map_err(|error| failed()(error.error))?;
    // A draft is for its owner alone; a report is a file like any other.
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    written.set_permissions(mode).map_err(failed())
}

fn write_to(file: &File, report: &Report) -> io::Result<()> {
    let mut writer = BufWriter::new(file);
    serde_json::to_writer_pretty(&mut writer, report)?;
    writer.write_all(b"\n")?;
    writer.flush()?;
    file.sync_all()
}

fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::Io {
        action,
        path,
        source,
    }
}
