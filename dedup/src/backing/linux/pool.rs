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
use crate::mapping::copy_page_out;
use crate::page::{PAGE_SIZE_BYTES, PageBuf, PoolPage, pages_to_bytes};

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

// SAFETY: `view` belongs to this value until drop; it is accessed by volatile loads and by stores
// to pages that the worker alone knows of.
unsafe impl Send for LinuxPool {}
// SAFETY: as for `Send`; `write` is called for pages that nobody maps or reads yet.
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
                libc::PROT_READ | libc::PROT_WRITE,
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

    fn address(&self, page: PoolPage) -> *mut u8 {
        assert!(
            page.0 < POOL_PAGES_MAX,
            "pool page {} is past the pool",
            page.0
        );
        self.view.wrapping_add(pages_to_bytes(page.0))
    }
}

impl Pool for LinuxPool {
    fn read(&self, page: PoolPage, into: &mut PageBuf) {
        // SAFETY: the address is that of a whole page inside the view.
        unsafe { copy_page_out(self.address(page), into) }
    }

    fn write(&self, page: PoolPage, content: &PageBuf) -> io::Result<()> {
        may_fail!("pool_write");
        let to = self.address(page);
        // Populating first turns "no memory" into an error; a store would get SIGBUS for it.
        // SAFETY: the address is that of a whole page inside the view.
        let populated =
            unsafe { libc::madvise(to.cast(), PAGE_SIZE_BYTES, libc::MADV_POPULATE_WRITE) };
        check(populated)?;
        // SAFETY:
        // - `to` is a whole, aligned page inside the view, populated just above.
        // - Nobody maps this page yet and nobody else writes to it: the caller took it.
        unsafe { ptr::copy_nonoverlapping(content.as_ptr(), to.cast(), content.len()) };
        Ok(())
    }

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
