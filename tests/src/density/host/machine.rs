//! What the machine is, and how fast its memory is: figures of two hosts can be compared only with
//! both.

use std::fs;
use std::hint::black_box;
use std::io;
use std::path::Path;
use std::thread::available_parallelism;
use std::time::Duration;

use memmap2::{Advice, MmapMut};
use procfs::{CpuInfo, Current, Meminfo, ProcError};
use rustix::time::{ClockId, clock_gettime};

use super::error::HostError;
use crate::density::model::Host;

/// Memory that is read over and over; at least this, and four times the last cache.
const READ_BYTES_MIN: usize = 256 << 20;
const PASSES: usize = 5;
/// Memory that is touched.
const TOUCHED_BYTES: usize = 64 << 20;
const PAGE_BYTES: usize = 4096;
/// Sums that do not wait for each other, so that the loads are what takes the time.
const LANES: usize = 32;

/// Looks at the machine and measures its memory. Takes about a second.
///
/// # Errors
/// If the kernel does not tell, or has no memory for it.
pub fn describe() -> Result<Host, HostError> {
    let release = Path::new("/proc/sys/kernel/osrelease");
    let kernel = fs::read_to_string(release).map_err(HostError::io("read", release))?;
    let cpu_info = CpuInfo::current().map_err(failed("/proc/cpuinfo"))?;
    let memory = Meminfo::current().map_err(failed("/proc/meminfo"))?;
    let cpus =
        available_parallelism().map_err(HostError::io("count CPUs of", Path::new("/sys")))?;
    Ok(Host {
        kernel: kernel.trim().to_owned(),
        cpu: cpu_info.model_name(0).unwrap_or("unknown").to_owned(),
        cpus: cpus.get(),
        memory_bytes: memory.mem_total,
        memory_read_bytes_per_s: read_bytes_per_s(memory.mem_available.unwrap_or(u64::MAX)),
        first_touch_us: first_touch_us()?,
    })
}

fn failed(path: &'static str) -> impl FnOnce(ProcError) -> HostError {
    move |error| HostError::io("read", Path::new(path))(io::Error::other(error))
}

/// The best of several passes over more memory than the caches hold, by one CPU.
fn read_bytes_per_s(available_bytes: u64) -> f64 {
    let words = vec![1_u64; read_bytes(available_bytes) / size_of::<u64>()];
    let mut best_s = f64::INFINITY;
    for _ in 0..PASSES {
        let begun = cpu_time();
        black_box(sum(black_box(&words)));
        best_s = best_s.min((cpu_time() - begun).as_secs_f64());
    }
    (words.len() * size_of::<u64>()) as f64 / best_s
}

fn sum(words: &[u64]) -> u64 {
    let mut sums = [0_u64; LANES];
    for chunk in words.chunks_exact(LANES) {
        for (sum, &word) in sums.iter_mut().zip(chunk) {
            *sum = sum.wrapping_add(word);
        }
    }
    sums.into_iter().fold(0, u64::wrapping_add)
}

fn read_bytes(available_bytes: u64) -> usize {
    let cache = fs::read_to_string("/sys/devices/system/cpu/cpu0/cache/index3/size");
    // Such as `32768K`. A host that does not tell has none, or one that is not its own.
    let kib = |text: String| text.trim().strip_suffix('K')?.parse::<usize>().ok();
    let cache_bytes = cache.ok().and_then(kib).unwrap_or(0) * 1024;
    // A guest may be told of all caches of its host: more than a gigabyte would take seconds.
    let wanted_bytes = (cache_bytes * 4).clamp(READ_BYTES_MIN, 1 << 30);
    wanted_bytes.min(usize::try_from(available_bytes / 4).unwrap_or(wanted_bytes))
}

/// CPU time of this thread: on a busy host, a thread is off its CPU for most of the time.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// What the first write to a base page takes, with the kernel's clearing of it.
fn first_touch_us() -> Result<f64, HostError> {
    let failed = || HostError::io("map memory for", Path::new("first touches"));
    let mut memory = MmapMut::map_anon(TOUCHED_BYTES).map_err(failed())?;
    // EINVAL: a kernel without huge pages, where there is nothing to decline.
    let _ = memory.advise(Advice::NoHugePage);
    let begun = cpu_time();
    for page in memory.chunks_exact_mut(PAGE_BYTES) {
        page[0] = 1;
    }
    let took = cpu_time() - begun;
    black_box(&memory[..]);
    Ok(took.as_secs_f64() * 1e6 / (TOUCHED_BYTES / PAGE_BYTES) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_is_described_with_figures_that_can_be() {
        let host = describe().unwrap();
        assert!(!host.kernel.is_empty() && !host.cpu.is_empty(), "{host:?}");
        assert!(host.cpus > 0 && host.memory_bytes > 0, "{host:?}");
        // No memory is read faster than 10 TB/s; a loop that was optimised away would be.
        assert!(
            (1.0..1e13).contains(&host.memory_read_bytes_per_s),
            "{host:?}"
        );
        assert!(host.first_touch_us > 0.0, "{host:?}");
    }

    #[test]
    fn every_word_is_summed() {
        let words: Vec<u64> = (0..96).collect();
        assert_eq!(sum(&words), 95 * 96 / 2);
    }
}
