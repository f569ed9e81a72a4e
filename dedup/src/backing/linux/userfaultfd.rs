//! Synchronous write protection of ranges by `userfaultfd` (`mm/userfaultfd.c`), and pages put in
//! place before anybody sees them.
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
use std::sync::atomic::{AtomicU64, Ordering};

use linux_raw_sys::general::{
    __NR_userfaultfd, UFFDIO_REGISTER_MODE_MISSING, UFFDIO_REGISTER_MODE_WP, uffdio_api,
    uffdio_copy, uffdio_range, uffdio_register, uffdio_writeprotect, uffdio_zeropage,
};
use linux_raw_sys::ioctl::{
    UFFDIO_API, UFFDIO_COPY, UFFDIO_REGISTER, UFFDIO_WAKE, UFFDIO_WRITEPROTECT, UFFDIO_ZEROPAGE,
};

use super::check::check;

// `include/uapi/linux/userfaultfd.h`; names that the bindings leave out.
const UFFD_API: u64 = 0xaa;
const UFFD_FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
const UFFD_FEATURE_MISSING_SHMEM: u64 = 1 << 5;
const UFFD_FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
/// Protects pages without memory too (Linux 6.4), as it always does in mappings of the pool: a first
/// write to one would else go past the protection of the range that it lies in.
const UFFD_FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
/// All that the engine needs, with the kernel's names.
const NEEDED_FEATURES: [(u64, &str); 4] = [
    (UFFD_FEATURE_PAGEFAULT_FLAG_WP, "PAGEFAULT_FLAG_WP"),
    (UFFD_FEATURE_MISSING_SHMEM, "MISSING_SHMEM"),
    (UFFD_FEATURE_WP_HUGETLBFS_SHMEM, "WP_HUGETLBFS_SHMEM"),
    (UFFD_FEATURE_WP_UNPOPULATED, "WP_UNPOPULATED"),
];
const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1 << 0;
const UFFDIO_COPY_MODE_DONTWAKE: u64 = 1 << 0;
const UFFDIO_ZEROPAGE_MODE_DONTWAKE: u64 = 1 << 0;
const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xaa00;

/// An open userfaultfd, agreed on write protection of anonymous and pool pages.
#[derive(Debug)]
pub(crate) struct Userfaultfd {
    fd: OwnedFd,
    /// Calls made on behalf of its regions for which the kernel takes the lock on the address space
    /// for writing: guests' page faults wait for those.
    mmap_write_locks: AtomicU64,
}

impl Userfaultfd {
    /// Opens one by `/dev/userfaultfd`, whose file mode says who may, else by the system call.
    pub(crate) fn open() -> io::Result<Userfaultfd> {
        let needed = NEEDED_FEATURES.iter().fold(0, |all, (bit, _)| all | bit);
        let (opened, _) = Self::open_with(needed)?;
        Ok(opened)
    }

    /// Names of the features that [`Userfaultfd::open`] asks for and this kernel lacks.
    pub(crate) fn missing_features() -> io::Result<Vec<&'static str>> {
        // The kernel tells all it has, also where nothing is asked for.
        let (_, offered) = Self::open_with(0)?;
        let missing = NEEDED_FEATURES.iter().filter(|(bit, _)| offered & bit == 0);
        Ok(missing.map(|(_, name)| *name).collect())
    }

    /// One that has `features`, and all features that the kernel offers.
    fn open_with(features: u64) -> io::Result<(Userfaultfd, u64)> {
        let fd = Self::open_by_device().or_else(|_| Self::open_by_system_call())?;
        let mut api = uffdio_api {
            api: UFFD_API,
            features,
            ioctls: 0,
        };
        let opened = Userfaultfd {
            fd,
            mmap_write_locks: AtomicU64::new(0),
        };
        opened.ioctl(UFFDIO_API, &mut api)?;
        Ok((opened, api.features))
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
        self.register_for(UFFDIO_REGISTER_MODE_WP, start, len_bytes)
    }

    /// Takes a range on for [`Userfaultfd::copy`]. Whoever touches a page of it that is not there
    /// sleeps until the range is woken.
    pub(super) fn register_missing(&self, start: *mut u8, len_bytes: usize) -> io::Result<()> {
        self.register_for(UFFDIO_REGISTER_MODE_MISSING, start, len_bytes)
    }

    /// Counts a call that maps, moves or unmaps a range.
    pub(super) fn note_mapping_call(&self) {
        self.mmap_write_locks.fetch_add(1, Ordering::Relaxed);
    }

    /// Calls that took the lock on the address space for writing.
    pub(crate) fn mmap_write_locks(&self) -> u64 {
        self.mmap_write_locks.load(Ordering::Relaxed)
    }

    fn register_for(&self, mode: u32, start: *mut u8, len_bytes: usize) -> io::Result<()> {
        self.note_mapping_call();
        let mut register = uffdio_register {
            range: range(start, len_bytes),
            mode: u64::from(mode),
            ioctls: 0,
        };
        self.ioctl(UFFDIO_REGISTER, &mut register)
    }

    /// Puts private copies of the pages from `from` on over those from `to` on, none of which is
    /// there yet.
    ///
    /// # Safety
    /// The source is mapped; others may write to it. The target is registered by
    /// [`Userfaultfd::register_missing`], and what it shows is the caller's business.
    pub(super) unsafe fn copy(
        &self,
        to: *mut u8,
        from: *const u8,
        len_bytes: usize,
    ) -> io::Result<()> {
        let mut done_bytes = 0;
        while done_bytes < len_bytes {
            let mut request = uffdio_copy {
                dst: to.wrapping_add(done_bytes).addr() as u64,
                src: from.wrapping_add(done_bytes).addr() as u64,
                len: (len_bytes - done_bytes) as u64,
                mode: UFFDIO_COPY_MODE_DONTWAKE,
                copy: 0,
            };
            let copied = self.ioctl(UFFDIO_COPY, &mut request);
            done_bytes += in_part(copied, request.copy)?;
        }
        Ok(())
    }

    /// Puts the kernel's zero page in place of pages none of which is there yet.
    ///
    /// # Safety
    /// As for [`Userfaultfd::copy`].
    pub(super) unsafe fn put_zeros(&self, to: *mut u8, len_bytes: usize) -> io::Result<()> {
        let mut done_bytes = 0;
        while done_bytes < len_bytes {
            let mut request = uffdio_zeropage {
                range: range(to.wrapping_add(done_bytes), len_bytes - done_bytes),
                mode: UFFDIO_ZEROPAGE_MODE_DONTWAKE,
                zeropage: 0,
            };
            let put = self.ioctl(UFFDIO_ZEROPAGE, &mut request);
            done_bytes += in_part(put, request.zeropage)?;
        }
        Ok(())
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
        // - The requests change protection bits of this process, never the content of memory, but
        //   for `UFFDIO_COPY` and `UFFDIO_ZEROPAGE`, whose callers vouch for it.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::c_ulong::from(request), argument) })
    }
}

/// Bytes that a call got done, if any; also where it says that the rest is to be asked for again.
fn in_part(called: io::Result<()>, done_bytes: i64) -> io::Result<usize> {
    match called {
        Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
        _ => Ok(usize::try_from(done_bytes).unwrap_or(0)),
    }
}

fn range(start: *mut u8, len_bytes: usize) -> uffdio_range {
    uffdio_range {
        start: start.addr() as u64,
        len: len_bytes as u64,
    }
}
