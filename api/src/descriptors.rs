//! How many files the process may have open.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises the soft limit of open files to the hard one.
///
/// The soft limit's usual 1024 is there for programs that call `select`, which this one does not.
/// A running VM of one vCPU takes 5 descriptors and each of its disks 3, a connection takes one.
///
/// # Errors
/// If the system refuses; the limit is as before then.
pub fn raise_limit() -> std::io::Result<()> {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    Ok(setrlimit(Resource::Nofile, raised)?)
}
