//! The time-stamp counter, and the time that one write to memory takes.
//!
//! It is wall time: it goes on while the hypervisor has the vCPU wait, for a page or for a CPU.

use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};

use pageload_workload::port::TSC_KHZ;

use crate::port::in_32;

/// What a port reads at which there is no device.
const NO_DEVICE: u32 = u32::MAX;

/// The counter's frequency, as the monitor tells it. (CPUID's leaves have it on some CPUs only, and
/// some hypervisors show the host's leaves whatever the monitor wants.)
pub(crate) struct Clock {
    tsc_khz: u32,
}

impl Clock {
    /// Asks the monitor. `None` if it does not know.
    pub(crate) fn new() -> Option<Clock> {
        let tsc_khz = in_32(TSC_KHZ);
        (tsc_khz != 0 && tsc_khz != NO_DEVICE).then_some(Clock { tsc_khz })
    }

    /// Ticks in so many microseconds.
    pub(crate) fn ticks(&self, us: u64) -> u64 {
        let ticks = u128::from(us) * u128::from(self.tsc_khz) / 1000;
        u64::try_from(ticks).unwrap_or(u64::MAX)
    }

    /// Nanoseconds in so many ticks.
    pub(crate) fn ns(&self, ticks: u64) -> u64 {
        let ns = u128::from(ticks) * 1_000_000 / u128::from(self.tsc_khz);
        u64::try_from(ns).unwrap_or(u64::MAX)
    }

    /// Microseconds in so many ticks, rounded up.
    pub(crate) fn us_ceil(&self, ticks: u64) -> u64 {
        self.ns(ticks).div_ceil(1000)
    }
}

/// The counter now: read when all instructions before are done, and before any that follows begins
/// (Intel SDM volume 2B, RDTSC).
#[inline(always)]
pub(crate) fn now_ticks() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY:
    // 1. Every x86-64 CPU has the counter, and boot.s leaves it to user mode (CR4.TSD is off).
    // 2. EAX and EDX are the only registers that change.
    unsafe {
        asm!(
            "lfence", "rdtsc", "lfence",
            out("eax") low, out("edx") high,
            options(nostack, preserves_flags)
        );
    }
    u64::from(high) << 32 | u64::from(low)
}

/// Writes a word; returns what was there and the ticks it took.
///
/// An exchange and not a store: the page is written to without being read first, and still nothing
/// that it held goes unverified. It waits until the write is done, as a fence does.
#[inline(always)]
pub(crate) fn exchange_timed(word: &AtomicU64, value: u64) -> (u64, u64) {
    let begin = now_ticks();
    let found = word.swap(value, Ordering::SeqCst);
    // Counters of two CPUs may be a few ticks apart.
    (found, now_ticks().saturating_sub(begin))
}
