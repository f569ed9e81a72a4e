//! Kernel KSM: whether this kernel has it, and what it tells of the VMs whose memory it merges.
//!
//! The kernel's sources: `Documentation/admin-guide/mm/ksm.rst`, `fs/proc/base.c`
//! (`proc_pid_ksm_stat`), `fs/proc/task_mmu.c` (`show_smap`). Kernels tell more the newer they are;
//! what one does not tell is `None`.
//!
//! `smaps` takes a walk through the page tables of every mapping up to the last one asked for. So it
//! is read when somebody asks for these VMs, once for all of them, and with no lock held: a VM that
//! starts where another one ended meanwhile is told of that one's pages, once.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::ops::Range;
use std::path::{Path, PathBuf};

use dedup::{PAGE_SIZE_BYTES, Run};

use crate::id::VmId;
use crate::info::KsmProcess;

/// Why kernel KSM cannot merge a VM's memory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KsmError {
    /// The kernel was built without KSM, or hides it from this process.
    #[error("merge: \"ksm\" needs a kernel with KSM, and {0:?} is not there")]
    NoDirectory(PathBuf),
    /// The kernel was built without KSM.
    #[error("merge: \"ksm\" needs a kernel with KSM, and madvise does not know MADV_MERGEABLE")]
    UnknownAdvice,
    /// The kernel has no room for its records of the memory.
    #[error("merge: \"ksm\": madvise(MADV_MERGEABLE): {0}")]
    Refused(#[source] io::Error),
}

impl KsmError {
    /// What an `madvise` that failed says.
    pub(crate) fn of_madvise(error: io::Error) -> KsmError {
        match error.raw_os_error() {
            Some(libc::EINVAL) => KsmError::UnknownAdvice,
            _ => KsmError::Refused(error),
        }
    }
}

/// Where the kernel tells of KSM.
#[derive(Debug, Clone)]
pub(crate) struct Ksm {
    sysfs: PathBuf,
    process: PathBuf,
}

impl Default for Ksm {
    fn default() -> Ksm {
        Ksm {
            sysfs: "/sys/kernel/mm/ksm".into(),
            process: "/proc/self".into(),
        }
    }
}

impl Ksm {
    /// A stand-in for a kernel, which tells what is in `directory`.
    #[cfg(test)]
    pub(crate) fn told_by(directory: &Path) -> Ksm {
        Ksm {
            sysfs: directory.join("ksm"),
            process: directory.to_owned(),
        }
    }

    /// Whether this kernel has KSM.
    pub(crate) fn check(&self) -> Result<(), KsmError> {
        if self.sysfs.is_dir() {
            Ok(())
        } else {
            Err(KsmError::NoDirectory(self.sysfs.clone()))
        }
    }

    /// What kernel KSM does, for all of the host: its own `run`.
    pub(crate) fn run(&self) -> Option<Run> {
        match told(fs::read_to_string(self.sysfs.join("run")))?.trim() {
            "0" => Some(Run::Stop),
            "1" => Some(Run::Merge),
            "2" => Some(Run::Unmerge),
            _ => None,
        }
    }

    /// Its figures for this process, if the kernel has them.
    pub(crate) fn process(&self) -> Option<KsmProcess> {
        let text = told(fs::read_to_string(self.process.join("ksm_stat")))?;
        Some(ksm_stat(&text))
    }

    fn pages_merging(&self, places: &[KsmPlace]) -> Vec<Option<u64>> {
        let smaps = File::open(self.process.join("smaps"));
        let counted = smaps.and_then(|smaps| pages_merging(BufReader::new(smaps), places));
        told(counted).unwrap_or_else(|| vec![None; places.len()])
    }
}

/// An answer of the kernel; the log has why there is none.
fn told<T>(answer: io::Result<T>) -> Option<T> {
    answer
        .inspect_err(|error| log::debug!("kernel KSM's figures: {error}"))
        .ok()
}

/// Where the memory of a VM lies that kernel KSM merges.
#[derive(Debug, Clone)]
pub struct KsmPlace {
    vm: VmId,
    addresses: Range<usize>,
}

impl KsmPlace {
    pub(crate) fn new(vm: VmId, addresses: Range<usize>) -> KsmPlace {
        KsmPlace { vm, addresses }
    }
}

/// What kernel KSM told at one moment.
#[derive(Debug, Clone, Default)]
pub struct KsmStats {
    /// What it does, for all of the host.
    pub run: Option<Run>,
    /// Its figures for this process: all merge domains in it together.
    pub process: Option<KsmProcess>,
    /// For each VM that was asked for, its pages that are mapped to a page of KSM.
    pub pages_merging: BTreeMap<VmId, Option<u64>>,
}

impl KsmStats {
    /// Asks for the VMs of `places`, which may be of several monitors if their ids differ. Takes a
    /// walk through their page tables, and none if there are no places.
    pub fn read(places: &[KsmPlace]) -> KsmStats {
        if places.is_empty() {
            return KsmStats::default();
        }
        let ksm = Ksm::default();
        let ids = places.iter().map(|place| place.vm.clone());
        KsmStats {
            run: ksm.run(),
            process: ksm.process(),
            pages_merging: ids.zip(ksm.pages_merging(places)).collect(),
        }
    }
}

/// `/proc/PID/ksm_stat`: a name and a value in each line, the names of newer lines with a colon.
fn ksm_stat(text: &str) -> KsmProcess {
    let value = |name: &str| {
        text.lines().find_map(|line| {
            let (found, value) = line.split_once(char::is_whitespace)?;
            (found.trim_end_matches(':') == name).then(|| value.trim())
        })
    };
    let count = |name| value(name)?.parse().ok();
    let answer = |name| match value(name)? {
        "yes" => Some(true),
        "no" => Some(false),
        _ => None,
    };
    KsmProcess {
        rmap_items: count("ksm_rmap_items"),
        zero_pages: count("ksm_zero_pages"),
        merging_pages: count("ksm_merging_pages"),
        profit_bytes: value("ksm_process_profit").and_then(|value| value.parse().ok()),
        merge_any: answer("ksm_merge_any"),
        mergeable: answer("ksm_mergeable"),
    }
}

/// `/proc/PID/smaps`: for each place the pages in it that are KSM's. Stops behind the last of them.
fn pages_merging(mut smaps: impl BufRead, places: &[KsmPlace]) -> io::Result<Vec<Option<u64>>> {
    let by_start: BTreeMap<usize, (usize, usize)> = (0..)
        .zip(places)
        .map(|(number, place)| (place.addresses.start, (place.addresses.end, number)))
        .collect();
    let end = by_start.values().map(|(end, _)| *end).max().unwrap_or(0);
    let place_of = |mapping: &Range<usize>| {
        let (_, &(end, number)) = by_start.range(..=mapping.start).next_back()?;
        (mapping.end <= end).then_some(number)
    };
    let mut counts = vec![None; places.len()];
    let mut place = None;
    let mut line = String::new();
    loop {
        line.clear();
        if smaps.read_line(&mut line)? == 0 {
            return Ok(counts);
        }
        if let Some(mapping) = mapping_of(&line) {
            if mapping.start >= end {
                return Ok(counts);
            }
            place = place_of(&mapping);
        } else if let (Some(number), Some(kib)) = (place, ksm_kib(&line)) {
            *counts[number].get_or_insert(0) += kib * 1024 / PAGE_SIZE_BYTES as u64;
        }
    }
}

/// The addresses in the first line of a mapping; the other lines begin with a word and a colon.
fn mapping_of(line: &str) -> Option<Range<usize>> {
    let (start, end) = line.split_once(' ')?.0.split_once('-')?;
    let number = |text| usize::from_str_radix(text, 16).ok();
    Some(number(start)?..number(end)?)
}

fn ksm_kib(line: &str) -> Option<u64> {
    let value = line.strip_prefix("KSM:")?.trim();
    value.strip_suffix(" kB")?.parse().ok()
}

/// Says so in the log if kernel KSM would merge a VM's memory but does nothing.
pub(crate) fn warn_if_stopped(ksm: &Ksm, vm: &VmId) {
    if matches!(ksm.run(), Some(Run::Stop | Run::Unmerge)) {
        let run = Path::join(&ksm.sysfs, "run");
        log::warn!("vm {vm}: merge is \"ksm\", but {run:?} is not 1: the kernel merges nothing");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(vm: &str, addresses: Range<usize>) -> KsmPlace {
        KsmPlace::new(vm.parse().unwrap(), addresses)
    }

    #[test]
    fn a_kernel_without_ksm_is_named_with_what_is_missing() {
        let directory = tempfile::tempdir().unwrap();
        let ksm = Ksm::told_by(directory.path());
        let error = ksm.check().unwrap_err().to_string();
        assert!(error.starts_with("merge: \"ksm\" needs a kernel with KSM"));
        assert!(error.contains(&format!("{:?}", ksm.sysfs)), "{error}");
        assert_eq!(ksm.run(), None);
        assert!(ksm.process().is_none());
        fs::create_dir(&ksm.sysfs).unwrap();
        ksm.check().unwrap();
        let unknown = KsmError::of_madvise(io::Error::from_raw_os_error(libc::EINVAL));
        assert!(matches!(unknown, KsmError::UnknownAdvice));
        let full = KsmError::of_madvise(io::Error::from_raw_os_error(libc::EAGAIN));
        assert!(matches!(full, KsmError::Refused(_)));
    }

    #[test]
    fn run_has_our_words() {
        let directory = tempfile::tempdir().unwrap();
        let ksm = Ksm::told_by(directory.path());
        fs::create_dir(&ksm.sysfs).unwrap();
        for (text, run) in [
            ("0\n", Some(Run::Stop)),
            ("1\n", Some(Run::Merge)),
            ("2\n", Some(Run::Unmerge)),
            ("7\n", None),
        ] {
            fs::write(ksm.sysfs.join("run"), text).unwrap();
            assert_eq!(ksm.run(), run, "{text}");
        }
    }

    #[test]
    fn figures_of_older_and_newer_kernels_are_read() {
        let new = ksm_stat(
            "ksm_rmap_items 9\nksm_zero_pages 2\nksm_merging_pages 5\nksm_process_profit -3\n\
             ksm_merge_any: no\nksm_mergeable: yes\n",
        );
        let expected = KsmProcess {
            rmap_items: Some(9),
            zero_pages: Some(2),
            merging_pages: Some(5),
            profit_bytes: Some(-3),
            merge_any: Some(false),
            mergeable: Some(true),
        };
        assert_eq!(new, expected);
        let old = ksm_stat("ksm_rmap_items 9\n");
        assert_eq!((old.rmap_items, old.zero_pages), (Some(9), None));
        assert_eq!((old.profit_bytes, old.mergeable), (None, None));
    }

    #[test]
    fn pages_are_counted_for_the_place_that_they_lie_in_and_nothing_behind_it_is_read() {
        let smaps = "\
            1000-3000 rw-p 00000000 00:00 0 \nSize: 8 kB\nKSM:                4 kB\n\
            a000-c000 rw-p 00000000 00:00 0 \nSize: 8 kB\nKSM:                8 kB\n\
            c000-e000 rw-p 00000000 00:00 0 \nSize: 8 kB\nKSM:                4 kB\n\
            f000-ff000 rw-p 00000000 00:00 0 \nnot read: \u{0}";
        let places = [
            place("b", 0xa000..0xe000),
            place("a", 0x1000..0x3000),
            place("gone", 0x4000..0x6000),
        ];
        let mut unread = smaps.as_bytes();
        let counts = pages_merging(&mut unread, &places).unwrap();
        assert_eq!(counts, [Some(3), Some(1), None]);
        assert!(unread.starts_with(b"not read"));
        let across = pages_merging(smaps.as_bytes(), &[place("a", 0xa000..0xb000)]).unwrap();
        assert_eq!(
            across,
            [None],
            "a mapping of others too tells nothing of one"
        );
    }

    #[test]
    fn this_kernel_is_understood() {
        let ksm = Ksm::default();
        if ksm.check().is_err() {
            eprintln!("skipped: this kernel has no KSM");
            return;
        }
        ksm.run().expect("its run");
        let process = ksm.process().expect("ksm_stat");
        process.rmap_items.expect("ksm_rmap_items");
        process.merging_pages.expect("ksm_merging_pages");
    }
}
