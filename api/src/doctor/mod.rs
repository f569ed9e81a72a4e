//! Whether a host is fit for Samepage: what it lacks, what makes it slow, and how to mend it.
//!
//! The judgement is pure: [`examine`] reads files below a root directory and takes the answers of
//! system calls as values. So a test makes any host out of a directory.
//!
//! | module | holds |
//! |---|---|
//! | [`host`] | files and answers of system calls |
//! | `needs` | what Samepage cannot do without |
//! | `memory` | what makes merging slow, narrow or unsafe |
//! | `starts` | what makes the start of a VM slow |

pub mod host;
mod memory;
mod needs;
mod starts;

#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

use self::host::Host;

/// How a host does in one respect; the worst is the greatest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Nothing to do.
    Ok,
    /// Samepage runs, but slower, with fewer VMs or less safe than it could.
    Warning,
    /// Samepage cannot run, or no VM can.
    Missing,
}

impl Status {
    /// As the report and its JSON form have it.
    pub fn name(self) -> &'static str {
        match self {
            Status::Ok => "ok",
            Status::Warning => "warning",
            Status::Missing => "missing",
        }
    }
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// What was looked at, for programs too: it never changes.
    pub name: String,
    /// How the host does there.
    pub status: Status,
    /// What was found and what it means, in a sentence or two.
    pub found: String,
    /// What to do about it; null if nothing has to be done.
    pub mend: Option<String>,
}

impl Check {
    fn ok(name: &str, found: impl Into<String>) -> Check {
        Check {
            name: name.to_owned(),
            status: Status::Ok,
            found: found.into(),
            mend: None,
        }
    }

    fn warning(name: &str, found: impl Into<String>, mend: impl Into<String>) -> Check {
        Check {
            status: Status::Warning,
            mend: Some(mend.into()),
            ..Check::ok(name, found)
        }
    }

    fn missing(name: &str, found: impl Into<String>, mend: impl Into<String>) -> Check {
        Check {
            status: Status::Missing,
            ..Check::warning(name, found, mend)
        }
    }
}

/// All that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The worst status of all checks.
    pub status: Status,
    /// The checks, always the same ones in the same order.
    pub checks: Vec<Check>,
}

/// Looks at everything. Changes nothing.
pub fn examine(host: &Host) -> Report {
    let checks = vec![
        needs::kvm(host),
        needs::userfaultfd(host),
        needs::kernel(host),
        needs::descriptors(host),
        memory::mappings(host),
        memory::huge_pages(host),
        memory::kernel_ksm(host),
        memory::swap(host),
        starts::nx_huge_pages(host),
        starts::cgroup_lock(host),
    ];
    let worst = checks.iter().map(|check| check.status).max();
    Report {
        status: worst.unwrap_or(Status::Ok),
        checks,
    }
}
