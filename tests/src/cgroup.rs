//! A memory cgroup of the test's own, where the machine lets it make one.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::wait::{PATIENCE, wait_until};

/// How the names of groups begin that [`MemoryGroup::new`] makes; the maker's process id follows.
const PREFIX: &str = "samepage-test-";

/// Tells the groups of one test program apart.
static NUMBER: AtomicU32 = AtomicU32::new(0);

/// The version of a cgroup hierarchy, which its files' names depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// A hierarchy of the memory controller alone (`cgroup-v1/memory.rst`).
    V1,
    /// The unified hierarchy (`cgroup-v2.rst`).
    V2,
}

/// Where groups can be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hierarchy {
    /// The group that a new one is made in.
    pub parent: PathBuf,
    /// Its version.
    pub version: Version,
}

/// A group with a limit, removed on drop; its processes must have ended by then.
#[derive(Debug)]
pub struct MemoryGroup {
    counters: Counters,
}

/// What the kernel tells of a group. Holds nothing of it, so it may outlive it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counters {
    directory: PathBuf,
    version: Version,
}

impl Hierarchy {
    /// Those of this host in which a group can have a memory limit, best first.
    ///
    /// # Errors
    /// If there is none: why, for each.
    pub fn all() -> Result<Vec<Hierarchy>, String> {
        let candidates = [
            ("/sys/fs/cgroup/memory", Version::V1),
            ("/sys/fs/cgroup", Version::V2),
        ];
        let mut usable = Vec::new();
        let mut reasons = Vec::new();
        for (parent, version) in candidates {
            let hierarchy = Hierarchy {
                parent: PathBuf::from(parent),
                version,
            };
            match hierarchy.has_memory() {
                Ok(()) => usable.push(hierarchy),
                Err(error) => reasons.push(format!("{parent}: {error}")),
            }
        }
        if usable.is_empty() {
            return Err(reasons.join("; "));
        }
        Ok(usable)
    }

    /// Makes sure that groups below have the memory controller.
    fn has_memory(&self) -> io::Result<()> {
        if self.version == Version::V1 {
            return fs::metadata(self.parent.join("memory.limit_in_bytes")).map(drop);
        }
        let has = |file: &str| {
            let text = fs::read_to_string(self.parent.join(file))?;
            io::Result::Ok(text.split_whitespace().any(|name| name == "memory"))
        };
        if !has("cgroup.controllers")? {
            return Err(io::Error::other("no memory controller"));
        }
        if !has("cgroup.subtree_control")? {
            fs::write(self.parent.join("cgroup.subtree_control"), "+memory")?;
        }
        Ok(())
    }
}

impl Hierarchy {
    /// Removes groups whose makers are gone. One that a process is still in stays for the next time.
    ///
    /// A maker whose id another process has by now looks alive: its groups stay for longer.
    fn remove_stale(&self) {
        let entries = fs::read_dir(&self.parent).into_iter().flatten().flatten();
        for entry in entries {
            let name = entry.file_name();
            let maker = name.to_str().and_then(maker_of);
            if maker.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
                remove_group(&entry.path());
            }
        }
    }
}

/// The process that made a group of this name.
fn maker_of(name: &str) -> Option<u32> {
    let (pid, number) = name.strip_prefix(PREFIX)?.split_once('-')?;
    number.parse::<u32>().ok()?;
    pid.parse().ok()
}

/// Removes a group and those below it, as far as they have no processes. What does not go is left.
fn remove_group(directory: &Path) {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let below = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    below.for_each(|group| remove_group(&group.path()));
    if let Err(error) = fs::remove_dir(directory) {
        eprintln!(
            "{}: left by a test that was killed: {error}",
            directory.display()
        );
    }
}

impl MemoryGroup {
    /// Makes a group with a limit; `None`, with a word of why, where that is not possible. Groups of
    /// test programs that were killed are removed first.
    pub fn new(limit_bytes: u64) -> Option<MemoryGroup> {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("{PREFIX}{}-{number}", std::process::id());
        let hierarchies = Hierarchy::all()
            .inspect_err(|reason| eprintln!("no memory cgroup: {reason}"))
            .unwrap_or_default();
        for hierarchy in hierarchies {
            hierarchy.remove_stale();
            match MemoryGroup::make(&hierarchy, &name, limit_bytes) {
                Ok(group) => return Some(group),
                Err(error) => eprintln!("no memory cgroup in {hierarchy:?}: {error}"),
            }
        }
        None
    }

    /// Makes a group in a hierarchy, with a limit for memory and swap together: memory beyond it is
    /// not swapped, but refused.
    ///
    /// # Errors
    /// If there is a group of this name, or there must be none.
    pub fn make(hierarchy: &Hierarchy, name: &str, limit_bytes: u64) -> io::Result<MemoryGroup> {
        let directory = hierarchy.parent.join(name);
        fs::create_dir(&directory)?;
        let version = hierarchy.version;
        let group = MemoryGroup {
            counters: Counters { directory, version },
        };
        let limit_text = limit_bytes.to_string();
        // The first file must be there, the second one is only in a kernel that can swap.
        let [memory, swap] = match version {
            Version::V1 => [
                ("memory.limit_in_bytes", limit_text.as_str()),
                ("memory.memsw.limit_in_bytes", limit_text.as_str()),
            ],
            Version::V2 => [
                ("memory.max", limit_text.as_str()),
                ("memory.swap.max", "0"),
            ],
        };
        fs::write(group.directory().join(memory.0), memory.1)?;
        let swap_file = group.directory().join(swap.0);
        if swap_file.exists() {
            fs::write(swap_file, swap.1)?;
        }
        Ok(group)
    }

    /// Where it is.
    pub fn directory(&self) -> &Path {
        &self.counters.directory
    }

    /// What the kernel tells of it.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Moves a process in, with all its threads. What it has taken before stays where it was.
    ///
    /// # Panics
    /// If it is gone.
    pub fn adopt(&self, pid: u32) {
        let procs = self.directory().join("cgroup.procs");
        fs::write(procs, pid.to_string()).expect("move a process into the group");
    }

    /// Removes it, if that works now: if its processes have ended, and the kernel is done with them.
    ///
    /// # Errors
    /// If it does not.
    pub fn try_remove(&self) -> io::Result<()> {
        match fs::remove_dir(self.directory()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

impl Counters {
    /// Counters of a group that somebody else made.
    pub fn of(directory: &Path, version: Version) -> Counters {
        Counters {
            directory: directory.to_owned(),
            version,
        }
    }

    /// Version of the group's hierarchy.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Where the group is.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// How many processes the kernel killed here for want of memory.
    ///
    /// # Errors
    /// If the kernel does not tell; so for all others.
    pub fn oom_kills(&self) -> io::Result<u64> {
        let file = match self.version {
            Version::V1 => "memory.oom_control",
            Version::V2 => "memory.events",
        };
        field(&self.text(file)?, "oom_kill")
            .ok_or_else(|| io::Error::other(format!("{file}: no oom_kill")))
    }

    /// The most that was ever in use at once.
    ///
    /// # Errors
    /// See above.
    pub fn peak_bytes(&self) -> io::Result<u64> {
        self.number(match self.version {
            Version::V1 => "memory.max_usage_in_bytes",
            Version::V2 => "memory.peak",
        })
    }

    /// What is in use now, as the limit counts.
    ///
    /// # Errors
    /// See above.
    pub fn usage_bytes(&self) -> io::Result<u64> {
        self.number(match self.version {
            Version::V1 => "memory.usage_in_bytes",
            Version::V2 => "memory.current",
        })
    }

    /// The text of one of its files.
    ///
    /// # Errors
    /// If it cannot be read; the error names the file.
    pub fn text(&self, file: &str) -> io::Result<String> {
        fs::read_to_string(self.directory.join(file))
            .map_err(|error| io::Error::new(error.kind(), format!("{file}: {error}")))
    }

    /// The number that is all there is in one of its files.
    ///
    /// # Errors
    /// If it cannot be read, or is none.
    pub fn number(&self, file: &str) -> io::Result<u64> {
        let text = self.text(file)?;
        let number = text.trim().parse();
        number.map_err(|_| io::Error::other(format!("{file}: {text:?} is not a number")))
    }
}

/// The number behind a name in a file of lines such as `rss 4096`.
pub fn field(text: &str, name: &str) -> Option<u64> {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(first, _)| *first == name)
        .and_then(|(_, number)| number.trim().parse().ok())
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        let gone = || self.try_remove().is_ok();
        if std::thread::panicking() {
            // Left behind rather than a second panic.
            gone();
        } else {
            wait_until("the group's processes have ended", PATIENCE, gone);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn groups_of_programs_that_were_killed_are_removed_and_others_are_not() {
        let Some(alive) = MemoryGroup::new(1 << 30) else {
            return;
        };
        let mut dead = Command::new("true").spawn().expect("a process");
        dead.wait().expect("its end");
        let parent = alive.directory().parent().expect("a hierarchy");
        let stale = parent.join(format!("{PREFIX}{}-7", dead.id()));
        fs::create_dir_all(stale.join("below")).expect("a group in a group");
        let other = parent.join(format!("{PREFIX}named-{}", dead.id()));
        fs::create_dir(&other).expect("a group");

        let next = MemoryGroup::new(1 << 30).expect("another group");
        assert!(!stale.exists());
        assert!(alive.directory().exists() && next.directory().exists());
        assert!(other.exists(), "who made it is not known");
        fs::remove_dir(&other).expect("it is empty");
    }
}
