//! Synchronous write protection of ranges by `userfaultfd` (`mm/userfaultfd.c`).
//!
//! A writer of a protected page sleeps in the fault until the range is released or woken; nobody
//! reads fault messages, because the engine itself always ends what it began.
//!
//! Where the obligation lies: [`Userfaultfd::protect`] creates the hazard (a range that nobody
//! releases hangs its writers for ever), so it is the engine's guard that owes the release; the
//! calls here are sound on any range of this process and stay safe functions.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use linux_raw_sys::general::{
    __NR_userfaultfd, UFFDIO_REGISTER_MODE_WP, uffdio_api, uffdio_range, uffdio_register,
    uffdio_writeprotect,
};
use linux_raw_sys::ioctl::{UFFDIO_API, UFFDIO_REGISTER, UFFDIO_WAKE, UFFDIO_WRITEPROTECT};

use super::check;

// `include/uapi/linux/userfaultfd.h`; names that the bindings leave out.
const UFFD_API: u64 = 0xaa;
const UFFD_FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
const UFFD_FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
/// Protects pages without memory too (Linux 6.4), as it always does in mappings of the pool: a first
/// write to one would else go past the protection of the range that it lies in.
const UFFD_FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1 << 0;
const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xaa00;

/// An open userfaultfd, agreed on write protection of anonymous and pool pages.
#[derive(Debug)]
pub(crate) struct Userfaultfd(OwnedFd);

impl Userfaultfd {
    /// Opens one by `/dev/userfaultfd`, whose file mode says who may, else by the system call.
    pub(crate) fn open() -> io::Result<Userfaultfd> {
        let fd = Self::open_by_device().or_else(|_| Self::open_by_system_call())?;
        let mut api = uffdio_api {
            api: UFFD_API,
            features: UFFD_FEATURE_PAGEFAULT_FLAG_WP
                | UFFD_FEATURE_WP_HUGETLBFS_SHMEM
                | UFFD_FEATURE_WP_UNPOPULATED,
            ioctls: 0,
        };
        let opened = Userfaultfd(fd);
        opened.ioctl(UFFDIO_API, &mut api)?;
        Ok(opened)
    }

    fn open_by_device() -> io::Result<OwnedFd> {
        let device = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/userfaultfd")?;
        // SAFETY: the request takes flags by value and touches no memory of ours.
        let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, libc::O_CLOEXEC) };
        check(fd)?;
        // SAFETY: the kernel has just handed this descriptor to us and nobody else knows it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    fn open_by_system_call() -> io::Result<OwnedFd> {
        let number = libc::c_long::from(__NR_userfaultfd);
        // SAFETY: the call takes flags by value and touches no memory of ours.
        let fd = unsafe { libc::syscall(number, libc::O_CLOEXEC) };
        let fd = libc::c_int::try_from(fd).unwrap_or(-1);
        check(fd)?;
        // SAFETY: the kernel has just handed this descriptor to us and nobody else knows it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// Makes a range protectable. Doing it again is harmless.
    pub(crate) fn register(&self, start: *mut u8, len_bytes: usize) -> io::Result<()> {
        let mut register = uffdio_register {
            range: range(start, len_bytes),
            mode: u64::from(UFFDIO_REGISTER_MODE_WP),
            ioctls: 0,
        };
        self.ioctl(UFFDIO_REGISTER, &mut register)
    }

    /// Stops writers of the range.
    pub(crate) fn protect(&self, start: *mut u8, len_bytes: usize) -> io::Result<()> {
        self.write_protect(start, len_bytes, UFFDIO_WRITEPROTECT_MODE_WP)
    }

    /// Lets writers of the range go on, those who wait included.
    pub(crate) fn release(&self, start: *mut u8, len_bytes: usize) -> io::Result<()> {
        self.write_protect(start, len_bytes, 0)
    }

    /// Wakes writers who wait in the range; they look anew at what is mapped there.
    pub(crate) fn wake(&self, start: *mut u8, len_bytes: usize) -> io::Result<()> {
        self.ioctl(UFFDIO_WAKE, &mut range(start, len_bytes))
    }

    fn write_protect(&self, start: *mut u8, len_bytes: usize, mode: u64) -> io::Result<()> {
        let mut request = uffdio_writeprotect {
            range: range(start, len_bytes),
            mode,
        };
        loop {
            match self.ioctl(UFFDIO_WRITEPROTECT, &mut request) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                done => return done,
            }
        }
    }

    fn ioctl<T>(&self, request: u32, argument: &mut T) -> io::Result<()> {
        let argument: *mut T = argument;
        // SAFETY:
        // - Each request of this module takes a pointer to the struct it is called with.
        // - `argument` is valid for reads and writes for the length of the call.
        // - The requests change protection bits of this process, never the content of memory.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), libc::c_ulong::from(request), argument) })
    }
}

fn range(start: *mut u8, len_bytes: usize) -> uffdio_range {
    uffdio_range {
        start: start.addr() as u64,
        len: len_bytes as u64,
    }
}
