//! Where a huge page of the pool is filled by storing to it.

use std::io;

use super::{LinuxPool, check, check_mapped};
use crate::fault::may_fail;
use crate::mapping::{reserve_aligned, unmap};
use crate::page::{
    HUGE_PAGE_BYTES, HUGE_PAGE_PAGES, PAGE_SIZE_BYTES, PageBuf, PoolPage, pages_to_bytes,
};
use crate::racing::copy_page_out;

/// A writable shared mapping of one huge page of the pool at an address that nobody else knows,
/// unmapped on drop.
///
/// The pool's own view stays read-only: nothing in this process can change a stable page by a stray
/// store, but for the moment in which a run that nobody shares yet is filled.
#[derive(Debug)]
pub(super) struct Window {
    start: *mut u8,
}

impl Window {
    /// Maps the pages from `first` on, which is where a huge page begins, and which has memory.
    ///
    /// # Errors
    /// There is no address space, or no memory: stores to the window would end the process.
    pub(super) fn new(pool: &LinuxPool, first: PoolPage) -> io::Result<Window> {
        may_fail!("window");
        let offset = libc::off_t::try_from(pages_to_bytes(first.0)).map_err(io::Error::other)?;
        let window = Window {
            start: reserve_aligned(HUGE_PAGE_BYTES, HUGE_PAGE_BYTES, libc::PROT_NONE)?,
        };
        let start = window.start.cast();
        // SAFETY: the range was reserved just above, and nobody else knows it.
        let mapped = unsafe {
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_SHARED | libc::MAP_FIXED;
            libc::mmap(start, HUGE_PAGE_BYTES, prot, flags, pool.fd(), offset)
        };
        check_mapped(mapped)?;
        // SAFETY: as above; it leaves content as it is.
        check(unsafe { libc::madvise(start, HUGE_PAGE_BYTES, libc::MADV_POPULATE_WRITE) })?;
        Ok(window)
    }

    /// Copies a huge page's worth of pages from `from` on into the window.
    ///
    /// # Safety
    /// - The range is mapped, and begins at a page. Others may write to it or drop its pages.
    /// - Nobody shares the window's pages of the pool.
    pub(super) unsafe fn copy_in(&mut self, from: *const u8) {
        for page in 0..HUGE_PAGE_PAGES as usize {
            let offset_bytes = page * PAGE_SIZE_BYTES;
            let into = self.start.wrapping_add(offset_bytes).cast::<PageBuf>();
            // SAFETY:
            // - A whole, aligned page of the window, which is mapped writable; any bytes are a page.
            // - Nobody else knows the address, and `self` is borrowed alone.
            let into = unsafe { &mut *into };
            // SAFETY: a whole page of the range that the caller vouches for.
            unsafe { copy_page_out(from.wrapping_add(offset_bytes), into) };
        }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: the range was reserved by `new` and nobody else knows its address.
        unsafe { unmap(self.start, HUGE_PAGE_BYTES) };
    }
}
