//! The pool: a memfd that holds stable pages.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use super::check;
use crate::backing::Pool;
use crate::fault::may_fail;
use crate::item::POOL_PAGES_MAX;
use crate::page::{PoolPage, pages_to_bytes};

/// What `/proc` calls the pool's mappings.
const NAME: &CStr = c"samepage-pool";

/// A sparse memfd with one slot for each pool page, and the engine's own shared view of it.
///
/// Guests map it privately and can't change it. It is never shortened: `ftruncate` also drops the
/// private copies of guests who wrote to a shared page, while a punched hole leaves those alone
/// (`mm/truncate.c`, `unmap_mapping_range` with `even_cows`).
#[derive(Debug)]
pub(crate) struct LinuxPool {
    file: File,
    view: *mut u8,
}

// SAFETY: `view` belongs to this value until drop, and is accessed by volatile loads only.
unsafe impl Send for LinuxPool {}
// SAFETY: as for `Send`; pages are filled by the file, before anybody looks at them.
unsafe impl Sync for LinuxPool {}

impl LinuxPool {
    pub(crate) fn new() -> io::Result<LinuxPool> {
        may_fail!("memfd");
        // SAFETY: the name is a C string; the flags are by value.
        let fd = unsafe { libc::memfd_create(NAME.as_ptr(), libc::MFD_CLOEXEC) };
        check(fd)?;
        // SAFETY: the kernel has just handed this descriptor to us and nobody else knows it.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        let size_bytes = pages_to_bytes(POOL_PAGES_MAX);
        file.set_len(size_bytes as u64)?;
        // SAFETY: no address is given, so no existing mapping is touched.
        let view = unsafe {
            libc::mmap(
                ptr::null_mut(),
                size_bytes,
                libc::PROT_READ,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                0,
            )
        };
        if view == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(LinuxPool {
            file,
            view: view.cast(),
        })
    }

    /// Another descriptor of the memfd, to ask how much it holds.
    pub(crate) fn file(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Where the worker sees a page: a whole, aligned page, which may be looked at once it was
    /// filled and until it is punched.
    pub(crate) fn page_address(&self, page: PoolPage) -> *const u8 {
        assert!(
            page.0 < POOL_PAGES_MAX,
            "pool page {} is past the pool",
            page.0
        );
        self.view.wrapping_add(pages_to_bytes(page.0))
    }

    /// Copies `len_bytes` from `from` to `first` and the pages after it.
    ///
    /// By the file, not by the view: the kernel then allocates whole runs, fills each page once
    /// instead of clearing it first, and "no memory" is an error instead of a SIGBUS. It takes half
    /// the time of populating the view and storing.
    ///
    /// # Safety
    /// The range is mapped. Others may write to it or drop its pages.
    pub(crate) unsafe fn fill(
        &self,
        first: PoolPage,
        from: *const u8,
        len_bytes: usize,
    ) -> io::Result<()> {
        may_fail!("pool_write");
        let mut done_bytes = 0;
        while done_bytes < len_bytes {
            let offset = libc::off_t::try_from(pages_to_bytes(first.0) + done_bytes)
                .map_err(io::Error::other)?;
            let start = from.wrapping_add(done_bytes).cast();
            // SAFETY:
            // - The caller vouches for the range; the kernel copies from it and may race.
            // - The file's pages are nobody's yet: the worker took them.
            let written = unsafe { libc::pwrite(self.fd(), start, len_bytes - done_bytes, offset) };
            match usize::try_from(written) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::WriteZero)),
                Ok(written) => done_bytes += written,
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
        Ok(())
    }
}

impl Pool for LinuxPool {
    fn punch(&self, first: PoolPage, pages: u32) -> io::Result<()> {
        may_fail!("fallocate");
        let offset = |page: u32| libc::off_t::try_from(pages_to_bytes(page)).unwrap_or(0);
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: the call takes numbers; the pages it drops have no sharers, and the worker, the
        // only reader of the view, does not look at them again before it fills them.
        check(unsafe { libc::fallocate(self.fd(), mode, offset(first.0), offset(pages)) })
    }
}

impl Drop for LinuxPool {
    fn drop(&mut self) {
        // SAFETY: the view was mapped by `new` and nobody else knows its address.
        let unmapped = unsafe { libc::munmap(self.view.cast(), pages_to_bytes(POOL_PAGES_MAX)) };
        if unmapped != 0 {
            log::error!("cannot unmap the pool: {}", io::Error::last_os_error());
        }
    }
}
