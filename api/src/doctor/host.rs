//! What is known of a host: the files of its kernel, and the answers to some system calls.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use rustix::process::{Resource, getrlimit};

/// A host to be looked at.
#[derive(Debug)]
pub struct Host {
    /// The directory that has `proc` and `sys`.
    pub root: PathBuf,
    /// How long `KVM_CREATE_VM` took, or why there is no VM.
    pub kvm: io::Result<Duration>,
    /// Features of userfaultfd that the kernel lacks, or why there is no userfaultfd.
    pub userfaultfd: io::Result<Vec<&'static str>>,
    /// Descriptors that a process of ours may have, once it has raised its limit; `None` without a
    /// limit.
    pub descriptors_max: Option<u64>,
}

impl Host {
    /// The host that this process runs on. Makes a VM and a userfaultfd, and drops them.
    pub fn own() -> Host {
        Host {
            root: "/".into(),
            kvm: vmm::probe::kvm_create_vm_time(),
            userfaultfd: dedup::host::missing_userfaultfd_features(),
            descriptors_max: getrlimit(Resource::Nofile).maximum,
        }
    }

    /// What `path` below the root says, without blanks around it; `None` if it cannot be read.
    pub(super) fn text(&self, path: &str) -> Option<String> {
        let text = std::fs::read_to_string(self.root.join(path)).ok()?;
        Some(text.trim().to_owned())
    }

    /// The same as a number.
    pub(super) fn number(&self, path: &str) -> Option<u64> {
        self.text(path)?.parse().ok()
    }

    /// The word in brackets of a file such as `always [madvise] never`.
    pub(super) fn choice(&self, path: &str) -> Option<String> {
        let text = self.text(path)?;
        let (_, from_word) = text.split_once('[')?;
        let (word, _) = from_word.split_once(']')?;
        Some(word.to_owned())
    }
}
