//! The memory cgroup of a run.

use std::ffi::OsStr;
use std::io;
use std::path::Path;
use std::process::Command;

use super::error::HostError;
use super::left_over::wait_for;
use super::settings::HostSettings;
use crate::cgroup::{Counters, Hierarchy, MemoryGroup, Version, field};
use crate::density::model::Memory;

/// Puts the shell into a group, then becomes the program: all that the program ever takes is
/// charged to the group. To move a process later leaves behind what it has taken until then.
const ENTER: &str = r#"echo $$ > "$1" && shift && exec "$@""#;

/// A memory cgroup with a limit. It is removed on drop; its processes must have ended by then.
#[derive(Debug)]
pub struct Group {
    group: MemoryGroup,
}

impl Group {
    /// Makes one, which `settings` has removed if this process is killed. Any one that was noted
    /// there before is forgotten.
    ///
    /// # Errors
    /// If this host lets nobody make one, or the journal cannot be written.
    pub fn new(limit_bytes: u64, settings: &mut HostSettings) -> Result<Group, HostError> {
        let no_group = |reason| HostError::NoGroup {
            limit_bytes,
            reason,
        };
        let name = format!("samepage-density-{}", std::process::id());
        let mut reasons = Vec::new();
        for hierarchy in Hierarchy::all().map_err(no_group)? {
            settings.note_group(&hierarchy.parent.join(&name))?;
            match MemoryGroup::make(&hierarchy, &name, limit_bytes) {
                Ok(group) => return Ok(Group { group }),
                Err(error) => reasons.push(format!("{}: {error}", hierarchy.parent.display())),
            }
        }
        Err(no_group(reasons.join("; ")))
    }

    /// A command that runs `program` in the group from its first instruction on. Its pid is that of
    /// the process that is spawned; arguments may be added.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("sh");
        command
            .args(["-c", ENTER, "sh"])
            .arg(self.directory().join("cgroup.procs"))
            .arg(program);
        command
    }

    /// Where it is.
    pub fn directory(&self) -> &Path {
        self.group.directory()
    }

    /// A reader of its counters, which may outlive it.
    pub fn usage(&self) -> GroupUsage {
        GroupUsage(self.group.counters().clone())
    }

    /// Removes it once its processes have ended.
    ///
    /// # Errors
    /// If they do not, within a minute.
    pub fn remove(&self) -> Result<(), HostError> {
        let what = format!("{} is empty and removed", self.directory().display());
        wait_for(&what, || Ok(self.group.try_remove().is_ok()))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            eprintln!("{error}");
        }
    }
}

/// What the kernel tells of a group.
#[derive(Debug, Clone)]
pub struct GroupUsage(Counters);

impl GroupUsage {
    /// What it holds now, by kind.
    ///
    /// # Errors
    /// If the kernel does not tell; so for all others.
    pub fn memory(&self) -> Result<Memory, HostError> {
        self.read(read_memory)
    }

    /// The most that it ever held.
    ///
    /// # Errors
    /// See above.
    pub fn peak_bytes(&self) -> Result<u64, HostError> {
        self.read(Counters::peak_bytes)
    }

    /// How many of its processes the kernel's OOM killer ended.
    ///
    /// # Errors
    /// See above.
    pub fn oom_kills(&self) -> Result<u64, HostError> {
        self.read(Counters::oom_kills)
    }

    fn read<T>(&self, read: impl FnOnce(&Counters) -> io::Result<T>) -> Result<T, HostError> {
        read(&self.0).map_err(HostError::io("read counters of", self.0.directory()))
    }
}

fn read_memory(counters: &Counters) -> io::Result<Memory> {
    let stat = counters.text("memory.stat")?;
    let of = |name: &str| {
        field(&stat, name).ok_or_else(|| io::Error::other(format!("memory.stat: no {name}")))
    };
    let shmem_bytes = of("shmem")?;
    // In both versions, what is said of files includes memfds and tmpfs.
    let (anon, files) = match counters.version() {
        Version::V1 => ("rss", "cache"),
        Version::V2 => ("anon", "file"),
    };
    let kernel_bytes = match counters.version() {
        Version::V1 => counters.number("memory.kmem.usage_in_bytes")?,
        // Linux 5.18. The parts that an older one tells are not all of it.
        Version::V2 => of("kernel")?,
    };
    Ok(Memory {
        usage_bytes: counters.usage_bytes()?,
        anon_bytes: of(anon)?,
        shmem_bytes,
        file_bytes: of(files)?.saturating_sub(shmem_bytes),
        kernel_bytes,
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn memory(version: Version, files: &[(&str, &str)]) -> io::Result<Memory> {
        let group = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(group.path().join(name), text).unwrap();
        }
        read_memory(&Counters::of(group.path(), version))
    }

    const EXPECTED: Memory = Memory {
        usage_bytes: 1000,
        anon_bytes: 400,
        shmem_bytes: 300,
        file_bytes: 50,
        kernel_bytes: 200,
    };

    #[test]
    fn version_1_is_read() {
        let files = [
            (
                "memory.stat",
                "cache 350\nrss 400\nrss_huge 7\nshmem 300\ntotal_rss 9\n",
            ),
            ("memory.usage_in_bytes", "1000\n"),
            ("memory.kmem.usage_in_bytes", "200\n"),
        ];
        assert_eq!(memory(Version::V1, &files).unwrap(), EXPECTED);
    }

    #[test]
    fn version_2_is_read() {
        let files = [
            (
                "memory.stat",
                "anon 400\nfile 350\nkernel 200\nkernel_stack 3\nshmem 300\n",
            ),
            ("memory.current", "1000\n"),
        ];
        assert_eq!(memory(Version::V2, &files).unwrap(), EXPECTED);
    }

    #[test]
    fn a_counter_that_is_not_there_is_named() {
        let files = [
            ("memory.stat", "anon 4\nfile 3\nshmem 3\n"),
            ("memory.current", "9\n"),
        ];
        let error = memory(Version::V2, &files).unwrap_err().to_string();
        assert!(error.contains("kernel"), "{error}");
    }
}
