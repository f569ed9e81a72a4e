//! A memory cgroup for each domain, whose limit is the domain's budget: what its guard watches is then
//! what the kernel counts, and no two domains share a limit.
//!
//! Sources: `Documentation/admin-guide/cgroup-v2.rst` and `cgroup-v1/memory.rst`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::Pid;

use crate::domain_name::DomainName;

/// Version 1 has no word for "no limit" but a number that no machine holds.
const NO_LIMIT_BYTES: u64 = 1 << 60;
/// A group whose last process has just ended may be busy for a moment.
const REMOVE_TRIES: u32 = 50;
const REMOVE_RETRY: Duration = Duration::from_millis(20);

/// Why no groups can be made somewhere.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The directory is of no hierarchy that can limit memory.
    #[error("cgroup {}: has no memory controller", .0.display())]
    NoMemory(PathBuf),
    /// A system call failed.
    #[error("cgroup {}: cannot {what}: {source}", path.display())]
    Os {
        /// The group.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// The system's answer.
        source: io::Error,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    /// A hierarchy of the memory controller alone.
    V1,
    /// The unified hierarchy.
    V2,
}

impl Version {
    fn of(path: &Path) -> Version {
        if path.join(Version::V1.limit()).exists() {
            Version::V1
        } else {
            Version::V2
        }
    }

    fn limit(self) -> &'static str {
        match self {
            Version::V1 => "memory.limit_in_bytes",
            Version::V2 => "memory.max",
        }
    }

    fn usage(self) -> &'static str {
        match self {
            Version::V1 => "memory.usage_in_bytes",
            Version::V2 => "memory.current",
        }
    }

    /// What lifts the limit.
    fn no_limit(self) -> &'static str {
        match self {
            Version::V1 => "-1",
            Version::V2 => "max",
        }
    }
}

/// The group that those of the domains are made in.
#[derive(Debug, Clone)]
pub struct CgroupParent {
    path: PathBuf,
}

impl CgroupParent {
    /// Takes the group at `path`, made now if it is not there. It may have no processes of its own
    /// (version 2 forbids that beside groups with a limit).
    ///
    /// # Errors
    /// [`CgroupError`].
    pub fn open(path: &Path) -> Result<CgroupParent, CgroupError> {
        let os = |what| {
            move |source| CgroupError::Os {
                path: path.to_owned(),
                what,
                source,
            }
        };
        match fs::create_dir(path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(os("make it")(error));
            }
            _ => {}
        }
        if Version::of(path) == Version::V1 {
            return Ok(CgroupParent {
                path: path.to_owned(),
            });
        }
        let has_memory = |file: &str| {
            let text = fs::read_to_string(path.join(file)).unwrap_or_default();
            text.split_whitespace().any(|name| name == "memory")
        };
        if !has_memory("cgroup.controllers") {
            return Err(CgroupError::NoMemory(path.to_owned()));
        }
        if !has_memory("cgroup.subtree_control") {
            let enabled = fs::write(path.join("cgroup.subtree_control"), "+memory");
            enabled.map_err(os("give its memory controller to groups in it"))?;
        }
        Ok(CgroupParent {
            path: path.to_owned(),
        })
    }

    /// A domain's group, which may not be there yet.
    pub fn of(&self, name: &DomainName) -> DomainCgroup {
        DomainCgroup {
            path: self.path.join(format!("domain-{name}")),
            version: Version::of(&self.path),
        }
    }
}

/// The group of one domain.
#[derive(Debug, Clone)]
pub struct DomainCgroup {
    path: PathBuf,
    version: Version,
}

impl DomainCgroup {
    /// The group at `path`, which some front door has made.
    pub fn at(path: PathBuf) -> DomainCgroup {
        let version = Version::of(&path);
        DomainCgroup { path, version }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the group and puts a process into it, with all that it starts.
    ///
    /// # Errors
    /// [`CgroupError`].
    pub fn take(&self, pid: Pid, limit_bytes: Option<u64>) -> Result<(), CgroupError> {
        match fs::create_dir(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(self.error("make it", error));
            }
            _ => {}
        }
        self.set_limit(limit_bytes)?;
        let pid = pid.as_raw_nonzero().to_string();
        fs::write(self.path.join("cgroup.procs"), pid)
            .map_err(|error| self.error("put a monitor into it", error))
    }

    /// Its limit; `None` without one.
    ///
    /// # Errors
    /// [`CgroupError`].
    pub fn limit(&self) -> Result<Option<u64>, CgroupError> {
        let limit = self.read(self.version.limit())?;
        Ok(limit.filter(|bytes| *bytes < NO_LIMIT_BYTES))
    }

    /// Lowers its limit, unless the group holds nearly as much: the kernel would then end a process
    /// of it to make room.
    ///
    /// # Errors
    /// [`CgroupError`].
    pub fn lower_limit(&self, limit_bytes: Option<u64>) -> Result<(), CgroupError> {
        if let Some(limit_bytes) = limit_bytes {
            let use_bytes = self.read(self.version.usage())?.unwrap_or(u64::MAX);
            if use_bytes > limit_bytes - limit_bytes / 16 {
                let full = "holds too much for a limit so low, and keeps its old one";
                return Err(self.error("lower its limit", io::Error::other(full)));
            }
        }
        self.set_limit(limit_bytes)
    }

    /// Sets its limit; `None` lifts it.
    ///
    /// # Errors
    /// [`CgroupError`].
    pub fn set_limit(&self, limit_bytes: Option<u64>) -> Result<(), CgroupError> {
        let limit = match limit_bytes {
            Some(bytes) => bytes.to_string(),
            None => self.version.no_limit().to_owned(),
        };
        fs::write(self.path.join(self.version.limit()), limit)
            .map_err(|error| self.error("set its limit", error))
    }

    /// Removes it, once its processes have ended.
    pub async fn remove(&self) {
        for _ in 0..REMOVE_TRIES {
            match fs::remove_dir(&self.path) {
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                    tokio::time::sleep(REMOVE_RETRY).await;
                }
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    log::warn!("{}", self.error("remove it", error));
                    return;
                }
                _ => return,
            }
        }
        log::warn!(
            "{}",
            self.error("remove it", io::ErrorKind::ResourceBusy.into())
        );
    }

    /// A file's number; `None` for a word.
    fn read(&self, file: &str) -> Result<Option<u64>, CgroupError> {
        let text = fs::read_to_string(self.path.join(file));
        let text = text.map_err(|error| self.error("read its limit", error))?;
        Ok(text.trim().parse().ok())
    }

    fn error(&self, what: &'static str, source: io::Error) -> CgroupError {
        CgroupError::Os {
            path: self.path.clone(),
            what,
            source,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory with the files of a group of version 2.
    fn fake_v2(controllers: &str) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("cgroup.controllers"), controllers).unwrap();
        fs::write(root.path().join("cgroup.subtree_control"), "").unwrap();
        root
    }

    #[test]
    fn group_of_version_2_gets_the_limit_and_the_process() {
        let root = fake_v2("cpu memory pids\n");
        let parent = CgroupParent::open(root.path()).unwrap();
        let read = |file: &str| fs::read_to_string(root.path().join(file)).unwrap();
        assert_eq!(read("cgroup.subtree_control"), "+memory");
        let group = parent.of(&"vm:a".parse().unwrap());
        let pid = rustix::process::getpid();
        group.take(pid, Some(256 << 20)).unwrap();
        assert_eq!(read("domain-vm:a/memory.max"), "268435456");
        assert_eq!(
            read("domain-vm:a/cgroup.procs"),
            pid.as_raw_nonzero().to_string()
        );
        assert_eq!(group.limit().unwrap(), Some(256 << 20));
        group.set_limit(None).unwrap();
        assert_eq!(read("domain-vm:a/memory.max"), "max");
        assert_eq!(group.limit().unwrap(), None);
    }

    #[test]
    fn limit_is_not_lowered_below_what_the_group_holds() {
        let root = fake_v2("memory\n");
        let parent = CgroupParent::open(root.path()).unwrap();
        let group = parent.of(&"ci".parse().unwrap());
        group
            .take(rustix::process::getpid(), Some(512 << 20))
            .unwrap();
        let usage = root.path().join("domain-ci/memory.current");
        fs::write(&usage, (250_u64 << 20).to_string()).unwrap();
        group.lower_limit(Some(256 << 20)).unwrap_err();
        assert_eq!(group.limit().unwrap(), Some(512 << 20));
        fs::write(&usage, (100_u64 << 20).to_string()).unwrap();
        group.lower_limit(Some(256 << 20)).unwrap();
        assert_eq!(group.limit().unwrap(), Some(256 << 20));
    }

    #[test]
    fn group_of_version_1_is_told_by_its_files() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("memory.limit_in_bytes"), "").unwrap();
        let parent = CgroupParent::open(root.path()).unwrap();
        let group = parent.of(&"ci".parse().unwrap());
        group.take(rustix::process::getpid(), None).unwrap();
        let limit = root.path().join("domain-ci/memory.limit_in_bytes");
        assert_eq!(fs::read_to_string(limit).unwrap(), "-1");
    }

    #[test]
    fn directory_without_a_memory_controller_is_refused() {
        let root = fake_v2("cpu pids\n");
        let error = CgroupParent::open(root.path()).unwrap_err().to_string();
        assert!(error.ends_with("has no memory controller"), "{error}");
    }

    #[tokio::test]
    async fn group_that_is_gone_is_removed_without_a_word() {
        let root = fake_v2("memory\n");
        let parent = CgroupParent::open(root.path()).unwrap();
        parent.of(&"ci".parse().unwrap()).remove().await;
    }
}
