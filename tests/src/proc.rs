//! What a process holds, counted in `/proc` (`fs/proc/`), so that a test can show that nothing was left behind.
//!
//! Memfd pages are counted in two ways: [`Holdings::memfd_pages`] asks the files and finds a page that nobody maps any
//! more, [`Mapped::memfd_mapped_pages`] asks the mappings and finds one that was mapped and forgotten.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Bytes of the unit of `st_blocks`, whatever the file system's own block size is (`stat(2)`).
const STAT_BLOCK_BYTES: u64 = 512;
/// Bytes of a page on x86-64.
const PAGE_BYTES: u64 = 4096;
/// Bytes of the unit of `smaps`.
const KIB_BYTES: u64 = 1024;
/// How the kernel names a memfd, in `maps` and behind a descriptor.
const MEMFD: &str = "/memfd:";

/// What a process holds at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holdings {
    /// Threads by their names.
    pub threads: BTreeMap<String, usize>,
    /// Open descriptors by what they are: a path, or a kind such as `socket` or `anon_inode:kvm-vcpu`.
    pub descriptors: BTreeMap<String, usize>,
    /// Pages that exist in memfds of which the process has a descriptor, mapped or not.
    pub memfd_pages: u64,
    /// What is mapped.
    pub mapped: Mapped,
}

/// The totals of `/proc/PID/smaps`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Mapped {
    /// Mappings (VMAs).
    pub mappings: usize,
    /// Mappings of memfds.
    pub memfd_mappings: usize,
    /// Resident pages of memfds, once for each mapping of them; private copies of them do not count.
    pub memfd_mapped_pages: u64,
    /// Proportional set size: resident bytes, those of a page shared by n mappings divided by n.
    pub pss_bytes: u64,
}

impl Holdings {
    /// Counts what `pid` holds.
    ///
    /// The figures are not of one instant: a process that changes meanwhile is counted in part before, in part after.
    ///
    /// # Errors
    /// If the process is gone, or belongs to somebody else.
    pub fn of(pid: u32) -> io::Result<Holdings> {
        let process = PathBuf::from(format!("/proc/{pid}"));
        let (descriptors, memfd_pages) = descriptors(&process)?;
        Ok(Holdings {
            threads: threads(&process)?,
            descriptors,
            memfd_pages,
            mapped: Mapped::parse(&fs::read_to_string(process.join("smaps"))?),
        })
    }

    /// The number of threads.
    pub fn thread_count(&self) -> usize {
        self.threads.values().sum()
    }

    /// The number of open descriptors.
    pub fn descriptor_count(&self) -> usize {
        self.descriptors.values().sum()
    }

    /// What there is more of than in `before`, in words for a test's message; empty if nothing leaked.
    ///
    /// `mappings_slack` forgives that many mappings: the C library keeps stacks of ended threads and its arenas. No
    /// thread, descriptor or memfd page is forgiven.
    pub fn leaked_since(&self, before: &Holdings, mappings_slack: usize) -> Vec<String> {
        let mut leaked = more("thread", &before.threads, &self.threads);
        leaked.extend(more("descriptor", &before.descriptors, &self.descriptors));
        let mut compare = |what: &str, before: u64, after: u64| {
            if after > before {
                leaked.push(format!("{what}: {before} before, {after} after"));
            }
        };
        let (old, new) = (&before.mapped, &self.mapped);
        compare("pages in memfds", before.memfd_pages, self.memfd_pages);
        compare(
            "mapped pages of memfds",
            old.memfd_mapped_pages,
            new.memfd_mapped_pages,
        );
        compare(
            "mappings of memfds",
            old.memfd_mappings as u64,
            new.memfd_mappings as u64,
        );
        if new.mappings > old.mappings + mappings_slack {
            compare("mappings", old.mappings as u64, new.mappings as u64);
        }
        leaked
    }
}

impl Mapped {
    /// Adds up the text of a `smaps` file.
    pub fn parse(smaps: &str) -> Mapped {
        let mut totals = Mapped::default();
        let mut is_memfd = false;
        let mut resident_bytes = 0;
        for line in smaps.lines() {
            let Some((field, bytes)) = field(line) else {
                if is_head(line) {
                    is_memfd = line.contains(MEMFD);
                    totals.mappings += 1;
                    totals.memfd_mappings += usize::from(is_memfd);
                }
                continue;
            };
            match field {
                "Pss" => totals.pss_bytes += bytes,
                "Rss" => resident_bytes = bytes,
                // The last of the two in a mapping's list. Copies made on write are resident and anonymous.
                "Anonymous" if is_memfd => {
                    totals.memfd_mapped_pages += resident_bytes.saturating_sub(bytes) / PAGE_BYTES;
                }
                _ => {}
            }
        }
        totals
    }
}

/// A line such as `Rss:    8 kB`, in bytes.
fn field(line: &str) -> Option<(&str, u64)> {
    let (name, value) = line.split_once(':')?;
    let kib: u64 = value.strip_suffix(" kB")?.trim().parse().ok()?;
    Some((name, kib * KIB_BYTES))
}

/// Whether a line opens a mapping: `55c1bcbcb000-55c1bcbcd000 r--p ...`.
fn is_head(line: &str) -> bool {
    let range = line.split(' ').next().unwrap_or("");
    range.split_once('-').is_some_and(|(start, end)| {
        [start, end]
            .iter()
            .all(|address| u64::from_str_radix(address, 16).is_ok())
    })
}

fn threads(process: &Path) -> io::Result<BTreeMap<String, usize>> {
    let mut names = BTreeMap::new();
    for thread in fs::read_dir(process.join("task"))? {
        // One that ended since the directory was read is not held.
        if let Ok(name) = fs::read_to_string(thread?.path().join("comm")) {
            *names.entry(name.trim_end().to_owned()).or_insert(0) += 1;
        }
    }
    Ok(names)
}

/// The open descriptors by kind, and the pages in all memfds among them.
fn descriptors(process: &Path) -> io::Result<(BTreeMap<String, usize>, u64)> {
    let mut kinds = BTreeMap::new();
    let mut memfd_pages = BTreeMap::new();
    for entry in fs::read_dir(process.join("fd"))? {
        let path = entry?.path();
        let Ok(target) = fs::read_link(&path) else {
            continue;
        };
        let target = target.to_string_lossy();
        // The descriptor of the directory that is being read, where a process counts itself.
        if target.starts_with("/proc/") && target.ends_with("/fd") {
            continue;
        }
        if target.starts_with(MEMFD)
            && let Ok(file) = fs::metadata(&path)
        {
            // By inode: two descriptors of one memfd hold its pages once.
            memfd_pages.insert(file.ino(), file.blocks() * STAT_BLOCK_BYTES / PAGE_BYTES);
        }
        *kinds.entry(kind(&target)).or_insert(0) += 1;
    }
    Ok((kinds, memfd_pages.values().sum()))
}

/// `socket:[4711]` is a `socket`; the number differs for each.
fn kind(target: &str) -> String {
    match target.split_once(":[") {
        Some((kind, number)) if number.trim_end_matches(']').parse::<u64>().is_ok() => {
            kind.to_owned()
        }
        _ => target.to_owned(),
    }
}

/// What `after` has more of than `before`.
fn more(
    what: &str,
    before: &BTreeMap<String, usize>,
    after: &BTreeMap<String, usize>,
) -> Vec<String> {
    after
        .iter()
        .map(|(name, &count)| (name, before.get(name).copied().unwrap_or(0), count))
        .filter(|(_, old, new)| new > old)
        .map(|(name, old, new)| format!("{what} {name}: {old} before, {new} after"))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::process::{Child, Command, Stdio};
    use std::sync::mpsc;
    use std::thread;

    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;
    use crate::wait::{PATIENCE, wait_until};

    const SMAPS: &str = "\
55c1bcbcb000-55c1bcbcd000 r--p 00000000 fe:00 247282                     /usr/bin/head
Size:                  8 kB
Rss:                   8 kB
Pss:                   4 kB
Pss_Dirty:             0 kB
Anonymous:             0 kB
VmFlags: rd mr mw me sd
7f0000000000-7f0000010000 rw-p 00003000 00:01 1025                       /memfd:samepage-pool (deleted)
Size:                 64 kB
Rss:                  40 kB
Pss:                  12 kB
Anonymous:             8 kB
THPeligible:           0
7ffd5e9c6000-7ffd5e9e7000 rw-p 00000000 00:00 0                          [stack]
Rss:                  12 kB
Pss:                  12 kB
Anonymous:            12 kB
";

    fn own() -> Holdings {
        Holdings::of(std::process::id()).unwrap()
    }

    fn waiting_child() -> Child {
        Command::new("cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap()
    }

    #[test]
    fn smaps_are_added_up() {
        let expected = Mapped {
            mappings: 3,
            memfd_mappings: 1,
            memfd_mapped_pages: 8,
            pss_bytes: 28 * 1024,
        };
        assert_eq!(Mapped::parse(SMAPS), expected);
    }

    #[test]
    fn a_named_thread_is_counted_while_it_runs() {
        let (end, ended) = mpsc::channel::<()>();
        let (up, is_up) = mpsc::channel();
        let thread = thread::Builder::new()
            .name("counted-here".to_owned())
            .spawn(move || {
                up.send(()).unwrap();
                ended.recv().unwrap_err();
            })
            .unwrap();
        is_up.recv().unwrap();

        let during = own();
        drop(end);
        thread.join().unwrap();

        assert_eq!(during.threads.get("counted-here"), Some(&1));
        // The kernel wakes who joins a thread a little before it takes the thread out of `/proc`.
        wait_until("the thread is gone", PATIENCE, || {
            !own().threads.contains_key("counted-here")
        });
    }

    #[test]
    fn pages_of_a_memfd_are_counted_once_and_only_where_they_exist() {
        let mut memfd = File::from(memfd_create("counted", MemfdFlags::CLOEXEC).unwrap());
        memfd.set_len(64 * PAGE_BYTES).unwrap();
        memfd.write_all(&[1; 3 * 4096]).unwrap();
        let twin = memfd.try_clone().unwrap();

        // Seen through a child, which shares no descriptor with the tests beside this one.
        let mut child = Command::new("cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::from(memfd))
            .stderr(Stdio::from(twin))
            .spawn()
            .unwrap();
        let holdings = Holdings::of(child.id());
        child.kill().unwrap();
        child.wait().unwrap();

        let holdings = holdings.unwrap();
        assert_eq!(holdings.memfd_pages, 3);
        assert_eq!(
            holdings.descriptors.get("/memfd:counted (deleted)"),
            Some(&2)
        );
    }

    #[test]
    fn what_was_not_there_before_is_named() {
        let before = own();
        let mut after = before.clone();
        *after.threads.entry("vcpu0".to_owned()).or_insert(0) += 2;
        *after
            .descriptors
            .entry("anon_inode:kvm-vm".to_owned())
            .or_insert(0) += 1;
        after.memfd_pages += 5;
        after.mapped.mappings += 3;

        let leaked = after.leaked_since(&before, 3);
        let first = &before.memfd_pages;
        assert_eq!(
            leaked,
            [
                "thread vcpu0: 0 before, 2 after".to_owned(),
                "descriptor anon_inode:kvm-vm: 0 before, 1 after".to_owned(),
                format!("pages in memfds: {first} before, {} after", first + 5),
            ]
        );
        assert_eq!(after.leaked_since(&before, 2).len(), 4);
        assert!(before.leaked_since(&after, 0).is_empty());
    }

    #[test]
    fn a_process_is_counted_until_it_is_gone() {
        let mut child = waiting_child();
        let holdings = Holdings::of(child.id()).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();

        assert_eq!(holdings.thread_count(), 1);
        assert!(holdings.descriptor_count() >= 3);
        assert!(holdings.mapped.mappings > 0 && holdings.mapped.pss_bytes > 0);
        Holdings::of(child.id()).unwrap_err();
    }
}
