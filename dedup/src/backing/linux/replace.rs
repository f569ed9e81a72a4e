//! Putting a mapping over a range where another one lies.
//!
//! `mmap` and `mremap` to a fixed address take away what is there first. They may run out of memory
//! after that, for a VMA or for a page table (`mm/mremap.c`, `mremap_to`; in a memory cgroup that is
//! full and whose OOM killer is off, for one), and leave a hole: its content is nowhere but in what
//! was to be put there, KVM's memory slot names its addresses, and any thread's next mapping may be
//! given them. Such a call is not an error to report but one to make again, until it succeeds:
//! memory comes back when a VM ends, for which nobody needs what the worker holds (an exit frees
//! before it locks). But a device of the domain that comes there itself sleeps in the event loop,
//! which the end of each of its VMs needs; memory must come from elsewhere then. Until the call
//! succeeds the hole is plugged by a mapping that whoever comes there sleeps at, guests and devices
//! alike, to be woken by the release of the range's write protection.
//!
//! Between the failed call and the plug there are a few microseconds. Who touches the hole then gets
//! a fault: a vCPU's ends its VM, a device's the process.

use std::io;
use std::thread;
use std::time::Duration;

use super::Userfaultfd;
use super::check::{check, check_mapped};
use crate::base::complaints::complain;

/// Time between two tries.
const RETRY: Duration = Duration::from_millis(1);

/// Calls `put`, which puts a mapping over the range. An error leaves the range as it was: if a call
/// that failed has left nothing there, it is made again until it succeeds. If somebody else's mapping
/// came to lie in the hole, so that both would take its pages for theirs, the process ends.
///
/// # Safety
/// The range is the caller's, and page-aligned.
pub(super) unsafe fn replace(
    start: *mut u8,
    len_bytes: usize,
    userfaultfd: &Userfaultfd,
    put: impl Fn() -> io::Result<()>,
) -> io::Result<()> {
    let put = || {
        // SAFETY: as for this call.
        #[cfg(feature = "failpoints")]
        unsafe {
            lose(start, len_bytes)?;
        }
        put()
    };
    let Err(error) = put() else {
        return Ok(());
    };
    // SAFETY: as for this call.
    if unsafe { is_mapped(start, len_bytes) } {
        return Err(error);
    }
    loop {
        // SAFETY: as for this call.
        let plugged = unsafe { plug(start, len_bytes, userfaultfd) };
        complain!(
            Error,
            "no memory to map a part of a guest's again: {error}; trying again until it works"
        );
        // A hole that is open is filled first.
        if plugged.is_ok() {
            thread::sleep(RETRY);
        } else {
            thread::yield_now();
        }
        if put().is_ok() {
            return Ok(());
        }
    }
}

/// Whether there is a mapping at every page of the range.
///
/// # Safety
/// The range is the caller's, and page-aligned.
unsafe fn is_mapped(start: *mut u8, len_bytes: usize) -> bool {
    // SAFETY: with this flag alone the call does nothing but look (`mm/msync.c`).
    let looked = check(unsafe { libc::msync(start.cast(), len_bytes, libc::MS_ASYNC) });
    looked.is_ok()
}

/// Closes a hole, or the one that a further try has left, by a mapping without content whose readers
/// and writers sleep.
///
/// # Safety
/// As for [`replace`].
unsafe fn plug(start: *mut u8, len_bytes: usize, userfaultfd: &Userfaultfd) -> io::Result<()> {
    // SAFETY: as for this call.
    if unsafe { is_mapped(start, len_bytes) } {
        return Ok(());
    }
    // SAFETY: where there is a mapping, this one is refused.
    let mapped = unsafe {
        let flags = libc::MAP_PRIVATE
            | libc::MAP_ANONYMOUS
            | libc::MAP_NORESERVE
            | libc::MAP_FIXED_NOREPLACE;
        libc::mmap(start.cast(), len_bytes, libc::PROT_NONE, flags, -1, 0)
    };
    if let Err(error) = check_mapped(mapped) {
        if error.raw_os_error() == Some(libc::EEXIST) {
            log::error!("a guest's addresses were given to somebody else while memory was out");
            // Unwinding would let a guest write there.
            std::process::abort();
        }
        return Err(error);
    }
    userfaultfd.register_missing(start, len_bytes)?;
    // Only now: pages that are not there would read as zeros.
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the range was mapped just above.
    check(unsafe { libc::mprotect(start.cast(), len_bytes, prot) })
}

/// As if a call had failed for want of memory once what was there is gone.
///
/// # Safety
/// As for [`replace`].
#[cfg(feature = "failpoints")]
unsafe fn lose(start: *mut u8, len_bytes: usize) -> io::Result<()> {
    fail::fail_point!("unmapped", |_| {
        // SAFETY: as for this call.
        unsafe { crate::backing::mapping::unmap(start, len_bytes) };
        Err(io::Error::from_raw_os_error(libc::ENOMEM))
    });
    Ok(())
}
