//! Tracepoints of the kernel, counted and sampled by `perf_event_open(2)`.
//!
//! The kernel drops them with the process, so a kill leaves nothing behind; an instance of tracefs
//! would stay.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use perf_event::events::Tracepoint;
use perf_event::{Builder, Clock, Counter, SampleFlag, Sampler};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};

use super::perf_filter::set_filter;

/// A tracefs that nobody else sees, or one that is mounted.
#[derive(Debug)]
pub(crate) struct Tracefs {
    directory: PathBuf,
    _mount: Option<OwnedFd>,
}

impl Tracefs {
    /// Finds one, or mounts one without a place in the file system: it goes with this value.
    pub(crate) fn open() -> io::Result<Tracefs> {
        let directory = PathBuf::from("/sys/kernel/tracing");
        if directory.join("events").exists() {
            return Ok(Tracefs {
                directory,
                _mount: None,
            });
        }
        let context = fsopen("tracefs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_create(context.as_fd())?;
        let flags = FsMountFlags::FSMOUNT_CLOEXEC;
        let mount = fsmount(context, flags, MountAttrFlags::MOUNT_ATTR_NOEXEC)?;
        Ok(Tracefs {
            directory: PathBuf::from(format!("/proc/self/fd/{}", mount.as_raw_fd())),
            _mount: Some(mount),
        })
    }

    /// The tracepoint with a name such as `lock/contention_begin`.
    pub(crate) fn event(&self, name: &str) -> io::Result<Event> {
        let text = |file: &str| {
            let path = self.directory.join("events").join(name).join(file);
            fs::read_to_string(path).map_err(|error| {
                io::Error::new(error.kind(), format!("tracepoint {name}: {error}"))
            })
        };
        let id = text("id")?.trim().parse().map_err(io::Error::other)?;
        Ok(Event {
            tracepoint: Tracepoint::with_id(id),
            format: text("format")?,
        })
    }
}

/// A tracepoint.
#[derive(Debug)]
pub(crate) struct Event {
    tracepoint: Tracepoint,
    format: String,
}

impl Event {
    fn builder(&self) -> Builder<'_> {
        let mut builder = Builder::new(self.tracepoint);
        // Tracepoints are in the kernel, which is left out otherwise.
        builder.include_kernel().include_hv();
        builder
    }

    /// Where a field of eight bytes is in a record.
    pub(crate) fn offset(&self, field: &str) -> Option<usize> {
        let named = |line: &&str| {
            let declaration = line.split(';').next().unwrap_or("");
            declaration.split([' ', '*']).next_back() == Some(field)
        };
        let line = self.format.lines().find(named)?;
        let (_, rest) = line.split_once("offset:")?;
        rest.split(';').next()?.parse().ok()
    }

    /// Counts what passes the filter on a CPU, from now on.
    pub(crate) fn count(&self, cpu: usize, filter: &str) -> io::Result<Counter> {
        let mut counter = self.builder().any_pid().one_cpu(cpu).build()?;
        set_filter(&counter, filter)?;
        counter.enable()?;
        Ok(counter)
    }

    /// Takes note of thread and time of each that passes the filter on a CPU, from now on.
    pub(crate) fn sample(&self, cpu: usize, filter: &str, bytes: usize) -> io::Result<Sampler> {
        let mut builder = self.builder();
        builder
            .any_pid()
            .one_cpu(cpu)
            .sample_period(1)
            .sample(SampleFlag::TID | SampleFlag::TIME)
            .clockid(Clock::MONOTONIC);
        sampler(&builder, filter, bytes)
    }

    /// Takes note of each that passes the filter in the calling thread, with the event's fields.
    pub(crate) fn sample_own(&self, filter: &str, bytes: usize) -> io::Result<Sampler> {
        let mut builder = self.builder();
        builder
            .observe_self()
            .any_cpu()
            .sample_period(1)
            .sample(SampleFlag::RAW);
        sampler(&builder, filter, bytes)
    }
}

fn sampler(builder: &Builder<'_>, filter: &str, bytes: usize) -> io::Result<Sampler> {
    let counter = builder.build()?;
    set_filter(&counter, filter)?;
    let mut sampler = counter.sampled(bytes)?;
    sampler.enable()?;
    Ok(sampler)
}

/// The CPUs that are on.
pub(crate) fn online_cpus() -> io::Result<Vec<usize>> {
    let path = Path::new("/sys/devices/system/cpu/online");
    let text = fs::read_to_string(path)?;
    let malformed = || io::Error::other(format!("{}: {text:?} is no list", path.display()));
    cpu_list(text.trim()).ok_or_else(malformed)
}

/// A list such as `0-3,6`.
fn cpu_list(text: &str) -> Option<Vec<usize>> {
    let mut cpus = Vec::new();
    for range in text.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        cpus.extend(first..=last);
    }
    Some(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_found_by_its_name() {
        let format = "\
name: mmap_lock_start_locking
ID: 677
format:
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;

\tfield:struct mm_struct * mm;\toffset:8;\tsize:8;\tsigned:0;
\tfield:u64 memcg_id;\toffset:16;\tsize:8;\tsigned:0;
";
        let event = Event {
            tracepoint: Tracepoint::with_id(677),
            format: format.to_owned(),
        };
        assert_eq!(event.offset("mm"), Some(8));
        assert_eq!(event.offset("memcg_id"), Some(16));
        assert_eq!(event.offset("memcg"), None);
    }

    #[test]
    fn ranges_of_cpus_are_spelled_out() {
        assert_eq!(cpu_list("0-3,6"), Some(vec![0, 1, 2, 3, 6]));
        assert_eq!(cpu_list("0"), Some(vec![0]));
        assert_eq!(cpu_list(""), None);
    }
}
