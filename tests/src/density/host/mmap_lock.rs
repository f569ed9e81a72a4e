//! Waits on the server's mmap lock, as the kernel's tracepoints tell: threads of the server and
//! others, such as `ksmd`.
//!
//! Counted in the kernel: each time that the lock is asked for to write. Timed: each wait in which a
//! thread slept. A writer that finds the lock taken spins for some microseconds first, and a wait
//! that ends then is in neither. To time them all takes a record for each time that the lock is
//! taken, hundreds of thousands a second, which would change what is measured.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use perf_event::data::Record;
use perf_event::{Counter, Sampler};

use super::error::HostError;
use super::group::Group;
use super::tracepoint::{Event, Tracefs, online_cpus};
use crate::density::model::MmapLock;

const START_LOCKING: &str = "mmap_lock/mmap_lock_start_locking";
const CONTENTION_BEGIN: &str = "lock/contention_begin";
const CONTENTION_END: &str = "lock/contention_end";
/// More than the size of the kernel's `struct mm_struct`. The mmap lock is the only sleeping lock in
/// it.
const MM_BYTES: u64 = 2048;
/// `LCB_F_SPIN` of `include/trace/events/lock.h`.
const SPIN: u32 = 1;
/// Memory for records that nobody has read yet, over all CPUs, and for each buffer.
const BUFFERS_BYTES_MAX: usize = 32 << 20;
const BUFFER_BYTES: (usize, usize) = (64 << 10, 2 << 20);

/// A thread begins or ends to wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Moment {
    time_ns: u64,
    tid: u32,
    is_end: bool,
}

/// Watches the mmap lock of one server until it is dropped.
#[derive(Debug)]
pub struct MmapLockWatch {
    writes: Vec<Counter>,
    begins: Vec<Samples>,
    ends: Vec<Samples>,
    moments: Vec<Moment>,
    lost: u64,
}

struct Samples(Sampler);

impl std::fmt::Debug for Samples {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Samples").field(self.0.as_counter()).finish()
    }
}

impl MmapLockWatch {
    /// Begins to watch the server with `pid`, which has become the program that it is to be.
    ///
    /// # Errors
    /// If this kernel has no such tracepoints, or does not let this process use them: a run goes on
    /// without.
    pub fn start(pid: u32, group: &Group) -> Result<MmapLockWatch, HostError> {
        MmapLockWatch::try_start(pid, group.directory())
            .map_err(HostError::io("watch the mmap lock of", &process(pid)))
    }

    fn try_start(pid: u32, group: &Path) -> io::Result<MmapLockWatch> {
        let tracefs = Tracefs::open()?;
        let start_locking = tracefs.event(START_LOCKING)?;
        let mm = mm_address(pid, group, &start_locking)?;
        let writes = format!("mm == {mm:#x} && write == 1");
        let end = mm + MM_BYTES;
        let here = format!("lock_addr >= {mm:#x} && lock_addr < {end:#x}");
        let sleeps = format!("{here} && !(flags & {SPIN})");
        let begin = tracefs.event(CONTENTION_BEGIN)?;
        let ends = tracefs.event(CONTENTION_END)?;
        let cpus = online_cpus()?;
        let bytes = BUFFERS_BYTES_MAX / (2 * cpus.len().max(1));
        let bytes = bytes.clamp(BUFFER_BYTES.0, BUFFER_BYTES.1);
        let samples = |event: &Event, filter: &str| -> io::Result<Vec<Samples>> {
            let of = |&cpu: &usize| event.sample(cpu, filter, bytes).map(Samples);
            cpus.iter().map(of).collect()
        };
        Ok(MmapLockWatch {
            writes: cpus
                .iter()
                .map(|&cpu| start_locking.count(cpu, &writes))
                .collect::<io::Result<_>>()?,
            // The ends first: a wait without a begin is left out, one without an end cannot be.
            ends: samples(&ends, &here)?,
            begins: samples(&begin, &sleeps)?,
            moments: Vec::new(),
            lost: 0,
        })
    }

    /// Takes over what the kernel has recorded. To be called about once a second, as its buffers
    /// hold some ten thousand waits.
    pub fn look(&mut self) {
        for (all, is_end) in [(&mut self.begins, false), (&mut self.ends, true)] {
            for samples in all {
                while let Some(record) = samples.0.next_record() {
                    match record.parse_record() {
                        Ok(Record::Sample(sample)) => self.moments.push(Moment {
                            time_ns: sample.time().unwrap_or(0),
                            tid: sample.tid().unwrap_or(0),
                            is_end,
                        }),
                        Ok(Record::Lost(lost)) => self.lost += lost.lost,
                        _ => {}
                    }
                }
            }
        }
    }

    /// Records that did not fit: where there are any, the waits were longer than told.
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// What was seen since the start.
    ///
    /// # Errors
    /// If the kernel does not tell its counters.
    pub fn total(&mut self) -> Result<MmapLock, HostError> {
        self.look();
        let mut write_locks = 0;
        for counter in &mut self.writes {
            let count = counter.read();
            write_locks += count.map_err(HostError::io("count", Path::new(START_LOCKING)))?;
        }
        // Each CPU has a buffer of its own, and threads move.
        self.moments.sort_unstable();
        Ok(MmapLock {
            write_locks,
            waited_s: Duration::from_nanos(waited_ns(&self.moments)).as_secs_f64(),
        })
    }
}

/// Sum of the waits that both begin and end.
fn waited_ns(moments: &[Moment]) -> u64 {
    let mut begun: HashMap<u32, u64> = HashMap::new();
    let mut waited_ns = 0;
    for moment in moments {
        if !moment.is_end {
            begun.insert(moment.tid, moment.time_ns);
        } else if let Some(begin_ns) = begun.remove(&moment.tid) {
            waited_ns += moment.time_ns - begin_ns;
        }
    }
    waited_ns
}

fn process(pid: u32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}"))
}

/// Where the kernel has the server's `mm_struct`, as an event tells that this thread causes: to read
/// the server's `smaps_rollup` takes the server's mmap lock. The group tells it from this thread's
/// own.
fn mm_address(pid: u32, group: &Path, start_locking: &Event) -> io::Result<u64> {
    let group_id = fs::metadata(group)?.ino();
    let filter = format!("memcg_id == {group_id}");
    let offset = start_locking
        .offset("mm")
        .ok_or_else(|| io::Error::other("mmap_lock_start_locking has no mm"))?;
    let mut sampler = start_locking.sample_own(&filter, BUFFER_BYTES.0)?;
    fs::read(process(pid).join("smaps_rollup"))?;
    while let Some(record) = sampler.next_record() {
        if let Ok(Record::Sample(sample)) = record.parse_record()
            && let Some(raw) = sample.raw()
            && let Some(bytes) = raw.get(offset..).and_then(|rest| rest.first_chunk())
        {
            return Ok(u64::from_ne_bytes(*bytes));
        }
    }
    Err(io::Error::other(
        "the tracepoints do not tell which lock it is",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moment(time_ns: u64, tid: u32, is_end: bool) -> Moment {
        Moment {
            time_ns,
            tid,
            is_end,
        }
    }

    #[test]
    fn waits_of_threads_add_up() {
        let moments = [
            moment(10, 1, false),
            moment(12, 2, false),
            moment(15, 1, true),
            moment(20, 2, true),
            moment(30, 1, false),
            moment(31, 1, true),
        ];
        assert_eq!(waited_ns(&moments), 5 + 8 + 1);
    }

    #[test]
    fn a_wait_without_begin_or_end_does_not_count() {
        let moments = [moment(10, 1, true), moment(12, 2, false)];
        assert_eq!(waited_ns(&moments), 0);
    }
}
