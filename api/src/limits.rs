//! Limits of the process (setrlimit(2)): open files, and sizes of files.

use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};

/// Raises the soft limits of open files and of file sizes to the hard ones.
///
/// The soft limit of open files is usually 1024, for programs that call `select`, which this one does
/// not. A running VM of one vCPU takes 5 descriptors and each of its disks 3, a connection takes one.
/// The pool of a merge domain is a sparse file of 512 GiB, which a limit of file sizes counts.
///
/// # Errors
/// If the system refuses; what came before it is done then.
pub fn raise() -> std::io::Result<()> {
    for resource in [Resource::Nofile, Resource::Fsize] {
        let limit = getrlimit(resource);
        let raised = Rlimit {
            current: limit.maximum,
            ..limit
        };
        setrlimit(resource, raised)?;
    }
    Ok(())
}

/// Has a write past the limit of file sizes fail with `EFBIG`, which its VM is told, instead of
/// ending the process. Must be called within a tokio runtime, and holds for good.
///
/// # Errors
/// If the system refuses.
pub fn survive_large_files() -> std::io::Result<()> {
    // A handler that does nothing; it stays when the stream is dropped. Rejected: ignoring the
    // signal, which programs that we start would inherit.
    drop(signal(SignalKind::from_raw(Signal::XFSZ.as_raw()))?);
    Ok(())
}
