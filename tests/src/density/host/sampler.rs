//! Looks at memory and CPU of a server, from outside.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use procfs::process::{Process, SmapsRollup};
use procfs::{Current, Meminfo, ProcError, ticks_per_second};

use super::error::HostError;
use super::group::{Group, GroupUsage};
use super::threads::{Ksmd, Threads};
use crate::density::model::{Cpu, Sample};

/// How close to look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Detail {
    /// What costs the server nothing.
    Quick,
    /// The proportional set size too: the kernel walks all of the server's page tables for it, with
    /// its mmap lock held to read.
    Full,
}

/// The longest part of the time that counting mappings may take.
const COUNTING_SHARE: u32 = 100;
const CHUNK_BYTES: usize = 1 << 16;

/// Looks at one server. The runner adds what the server itself tells.
#[derive(Debug)]
pub struct Sampler {
    pid: u32,
    began: Instant,
    usage: GroupUsage,
    threads: Threads,
    vmas: Vmas,
    ksmd: Option<Ksmd>,
    ksmd_before_ns: u64,
}

impl Sampler {
    /// A sampler of the server with `pid`, in `group`. Times are since `began`, CPU of `ksmd` since
    /// this call.
    ///
    /// # Errors
    /// If `ksmd` cannot be looked at.
    pub fn new(pid: u32, group: &Group, began: Instant) -> Result<Sampler, HostError> {
        let ksmd = Ksmd::find();
        let ksmd_before_ns = ksmd.as_ref().map_or(Ok(0), Ksmd::cpu_ns)?;
        Ok(Sampler {
            pid,
            began,
            usage: group.usage(),
            threads: Threads::of(pid),
            vmas: Vmas::of(pid),
            ksmd,
            ksmd_before_ns,
        })
    }

    /// Looks at all that can be seen from outside. The number of mappings is as new as a hundredth
    /// of the time allows.
    ///
    /// # Errors
    /// If the server is gone.
    pub fn look(&mut self, detail: Detail) -> Result<Sample, HostError> {
        let process = self.process()?;
        let threads = self.threads.look()?;
        let ksmd_ns = self.ksmd.as_ref().map_or(Ok(0), Ksmd::cpu_ns)?;
        let stat = process.stat().map_err(self.failed("stat"))?;
        let pss_bytes = match detail {
            Detail::Quick => None,
            Detail::Full => {
                let rollup = process.smaps_rollup();
                Some(pss_bytes(&rollup.map_err(self.failed("smaps_rollup"))?))
            }
        };
        Ok(Sample {
            at_s: self.began.elapsed().as_secs_f64(),
            memory: self.usage.memory()?,
            mem_available_bytes: mem_available_bytes()?,
            pss_bytes,
            cpu: Cpu {
                worker_s: seconds(threads.worker_ns),
                ksmd_s: seconds(ksmd_ns.saturating_sub(self.ksmd_before_ns)),
                vcpus_s: seconds(threads.vcpus_ns),
                // Of the whole process, so that ended threads are in it.
                server_s: (stat.utime + stat.stime) as f64 / ticks_per_second() as f64,
            },
            context_switches: threads.switches,
            vmas: self.vmas.count()?,
            ..Sample::default()
        })
    }

    fn process(&self) -> Result<Process, HostError> {
        let pid = i32::try_from(self.pid).unwrap_or(i32::MAX);
        Process::new(pid).map_err(self.failed(""))
    }

    fn failed(&self, file: &str) -> impl FnOnce(ProcError) -> HostError {
        let path = PathBuf::from(format!("/proc/{}", self.pid)).join(file);
        move |error| HostError::io("read", &path)(io::Error::other(error))
    }
}

fn seconds(ns: u64) -> f64 {
    Duration::from_nanos(ns).as_secs_f64()
}

/// The one mapping that a rollup consists of has the sums.
fn pss_bytes(rollup: &SmapsRollup) -> u64 {
    let sums = rollup.memory_map_rollup.iter();
    sums.filter_map(|map| map.extension.map.get("Pss")).sum()
}

fn mem_available_bytes() -> Result<u64, HostError> {
    let path = Path::new("/proc/meminfo");
    let info =
        Meminfo::current().map_err(|error| HostError::io("read", path)(io::Error::other(error)))?;
    info.mem_available.ok_or_else(|| HostError::Malformed {
        path: path.to_owned(),
        text: String::new(),
        expected: "a list with MemAvailable",
    })
}

/// Counts mappings, as often as a small part of the time allows.
#[derive(Debug)]
struct Vmas {
    maps: PathBuf,
    count: u64,
    next: Option<Instant>,
}

impl Vmas {
    fn of(pid: u32) -> Vmas {
        Vmas {
            maps: PathBuf::from(format!("/proc/{pid}/maps")),
            count: 0,
            next: None,
        }
    }

    /// The count, of now or of the last time.
    fn count(&mut self) -> Result<u64, HostError> {
        let begun = Instant::now();
        if self.next.is_none_or(|next| next <= begun) {
            self.count = lines(&self.maps).map_err(HostError::io("read", &self.maps))?;
            self.next = Some(Instant::now() + begun.elapsed() * COUNTING_SHARE);
        }
        Ok(self.count)
    }
}

/// Number of lines of a file; the kernel's text is not kept.
fn lines(path: &Path) -> io::Result<u64> {
    let mut file = File::open(path)?;
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut lines = 0;
    loop {
        match file.read(&mut chunk)? {
            0 => return Ok(lines),
            read => lines += chunk[..read].iter().filter(|&&byte| byte == b'\n').count() as u64,
        }
    }
}
