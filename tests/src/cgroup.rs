//! A memory cgroup of the test's own, where the machine lets it make one.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::wait::{PATIENCE, wait_until};

/// Tells the groups of one test program apart.
static NUMBER: AtomicU32 = AtomicU32::new(0);

/// A group with a limit, removed on drop; its processes must have ended by then.
#[derive(Debug)]
pub struct MemoryGroup {
    directory: PathBuf,
    is_v2: bool,
}

impl MemoryGroup {
    /// Makes a group with a limit; `None`, with a word of why, where that is not possible.
    pub fn new(limit_bytes: u64) -> Option<MemoryGroup> {
        let candidates = [
            (PathBuf::from("/sys/fs/cgroup/memory"), false),
            (PathBuf::from("/sys/fs/cgroup"), true),
        ];
        for (parent, is_v2) in candidates {
            match MemoryGroup::make(&parent, is_v2, limit_bytes) {
                Ok(group) => return Some(group),
                Err(error) => eprintln!("no memory cgroup in {}: {error}", parent.display()),
            }
        }
        None
    }

    fn make(parent: &Path, is_v2: bool, limit_bytes: u64) -> io::Result<MemoryGroup> {
        if is_v2 {
            let controllers = fs::read_to_string(parent.join("cgroup.controllers"))?;
            if !controllers.split_whitespace().any(|name| name == "memory") {
                return Err(io::Error::other("no memory controller"));
            }
            fs::write(parent.join("cgroup.subtree_control"), "+memory")?;
        }
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("samepage-test-{}-{number}", std::process::id());
        let directory = parent.join(name);
        fs::create_dir(&directory)?;
        let group = MemoryGroup { directory, is_v2 };
        let limit = if is_v2 {
            "memory.max"
        } else {
            "memory.limit_in_bytes"
        };
        fs::write(group.directory.join(limit), limit_bytes.to_string())?;
        Ok(group)
    }

    /// Moves a process in, with all its threads. What it has taken before stays where it was.
    ///
    /// # Panics
    /// If it is gone.
    pub fn adopt(&self, pid: u32) {
        let procs = self.directory.join("cgroup.procs");
        fs::write(procs, pid.to_string()).expect("move a process into the group");
    }

    /// How many processes the kernel killed here for want of memory.
    ///
    /// # Panics
    /// If the kernel does not tell; so for [`MemoryGroup::peak_bytes`].
    pub fn oom_kills(&self) -> u64 {
        let file = if self.is_v2 {
            "memory.events"
        } else {
            "memory.oom_control"
        };
        let text = fs::read_to_string(self.directory.join(file)).expect("counters of the group");
        let count = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        count.expect("oom_kill").trim().parse().expect("a number")
    }

    /// The most that was ever in use at once.
    pub fn peak_bytes(&self) -> u64 {
        let file = if self.is_v2 {
            "memory.peak"
        } else {
            "memory.max_usage_in_bytes"
        };
        let text = fs::read_to_string(self.directory.join(file)).expect("counters of the group");
        text.trim().parse().expect("a number")
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        let gone = || fs::remove_dir(&self.directory).is_ok();
        if std::thread::panicking() {
            // Left behind rather than a second panic.
            gone();
        } else {
            wait_until("the group's processes have ended", PATIENCE, gone);
        }
    }
}
