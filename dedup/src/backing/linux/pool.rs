//! The pool: a memfd that holds stable pages.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicU32, Ordering};

use super::check::{check, check_mapped};
use crate::backing::Pool;
use crate::backing::mapping::{reserve_aligned, unmap};
use crate::base::failpoint::may_fail;
use crate::base::page::{
    HUGE_PAGE_BYTES, HUGE_PAGE_PAGES, PAGE_SIZE_BYTES, PageBuf, PoolPage, pages_to_bytes,
};
use crate::index::fingerprint::Fingerprint;
use crate::pages::item::POOL_PAGES_MAX;

/// Runs that are filled with base pages after the kernel had no huge page.
const HUGE_PAUSE_RUNS: u32 = 64;

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
    /// Begins where a huge page can.
    view: *mut u8,
    /// Runs to go until the kernel is asked for a huge page again, after it had none.
    until_huge: AtomicU32,
}

// SAFETY: `view` belongs to this value until drop, and is only read.
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
        let view = reserve_aligned(size_bytes, HUGE_PAGE_BYTES, libc::PROT_NONE)?;
        let pool = LinuxPool {
            file,
            view,
            until_huge: AtomicU32::new(0),
        };
        // SAFETY: the range was reserved just above, and nobody else knows it.
        let mapped = unsafe {
            let flags = libc::MAP_SHARED | libc::MAP_NORESERVE | libc::MAP_FIXED;
            let fd = pool.fd();
            libc::mmap(view.cast(), size_bytes, libc::PROT_READ, flags, fd, 0)
        };
        check_mapped(mapped)?;
        Ok(pool)
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
    /// By the file: the kernel allocates whole runs, fills each page once instead of clearing it first,
    /// and "no memory" is an error. It takes half the time of populating a mapping and storing.
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
        if len_bytes == HUGE_PAGE_BYTES && first.0.is_multiple_of(HUGE_PAGE_PAGES) {
            // SAFETY: as for this call; the range is longer than a page.
            unsafe { self.allocate_huge_page(first, from)? };
        }
        // SAFETY: as for this call.
        unsafe { self.write(first, from, len_bytes) }
    }

    /// Puts a huge page where the run from `first` on is about to be filled, if the kernel has one.
    ///
    /// It takes half the time of allocating 512 pages, and whoever maps the whole of it has one
    /// entry in the page tables and takes one fault. `MADV_COLLAPSE` works with any setting of
    /// `transparent_hugepage/shmem_enabled`; it wants one page to be there (`mm/khugepaged.c`,
    /// `collapse_file`), and leaves zeros for the others.
    ///
    /// # Safety
    /// As for [`LinuxPool::fill`], of one page.
    unsafe fn allocate_huge_page(&self, first: PoolPage, from: *const u8) -> io::Result<()> {
        let until_huge = self.until_huge.load(Ordering::Relaxed);
        if until_huge > 0 {
            self.until_huge.store(until_huge - 1, Ordering::Relaxed);
            return Ok(());
        }
        // SAFETY: as for this call.
        unsafe { self.write(first, from, PAGE_SIZE_BYTES)? };
        let start = self.page_address(first).cast_mut();
        // SAFETY: the range lies in the view; the advice leaves content as it is.
        let advised = unsafe { libc::madvise(start.cast(), HUGE_PAGE_BYTES, libc::MADV_COLLAPSE) };
        if advised != 0 {
            // Memory is in pieces, or the kernel is older than 6.1: base pages do as well. To look
            // for a huge page in vain costs the kernel more than to allocate them.
            self.until_huge.store(HUGE_PAUSE_RUNS, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Writes `len_bytes` from `from` to `first` and the pages after it.
    ///
    /// # Safety
    /// As for [`LinuxPool::fill`].
    unsafe fn write(&self, first: PoolPage, from: *const u8, len_bytes: usize) -> io::Result<()> {
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
    fn fingerprint(&self, page: PoolPage) -> Fingerprint {
        let content = self.page_address(page).cast::<PageBuf>();
        // SAFETY:
        // - A whole, aligned page of the view, which lives as long as this value; any bytes are one.
        // - It is the worker's own until it is shared, and never written to from then on.
        Fingerprint::of(unsafe { &*content })
    }

    fn allocated_pages(&self) -> io::Result<u64> {
        allocated_pages(&self.file)
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

/// Pages of a pool's memfd that take memory.
pub(crate) fn allocated_pages(file: &File) -> io::Result<u64> {
    const BLOCK_BYTES: u64 = 512;
    Ok(file.metadata()?.blocks() * BLOCK_BYTES / PAGE_SIZE_BYTES as u64)
}

impl Drop for LinuxPool {
    fn drop(&mut self) {
        // SAFETY: the view was mapped by `new` and nobody else knows its address.
        unsafe { unmap(self.view, pages_to_bytes(POOL_PAGES_MAX)) };
    }
}
