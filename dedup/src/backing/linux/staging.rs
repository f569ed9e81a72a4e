//! Where a range is built before it is moved to its place.

use std::io;
use std::ptr;

use super::{LinuxPool, Userfaultfd, check_mapped};
use crate::mapping::unmap;
use crate::page::{PoolPage, pages_to_bytes};

/// A private mapping of consecutive pages of the pool at an address that nobody else knows, unmapped
/// on drop.
#[derive(Debug)]
pub(super) struct Staging {
    start: *mut u8,
    len_bytes: usize,
}

impl Staging {
    /// Maps `pages` pages of the pool from `first` on, to be filled by [`Staging::copy_in`].
    pub(super) fn new(
        pool: &LinuxPool,
        first: PoolPage,
        pages: u32,
        userfaultfd: &Userfaultfd,
    ) -> io::Result<Staging> {
        userfaultfd.note_mapping_call();
        let len_bytes = pages_to_bytes(pages);
        let offset = libc::off_t::try_from(pages_to_bytes(first.0)).map_err(io::Error::other)?;
        // SAFETY: no address is given, so no existing mapping is touched.
        let start = unsafe {
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
            libc::mmap(ptr::null_mut(), len_bytes, prot, flags, pool.fd(), offset)
        };
        check_mapped(start)?;
        let staging = Staging {
            start: start.cast(),
            len_bytes,
        };
        userfaultfd.register_missing(staging.start, len_bytes)?;
        Ok(staging)
    }

    /// Puts copies of the pages from `from` on over the mapping's pages from `page` on.
    ///
    /// By the ioctl, which puts private pages in place. A store would read the pool's page first,
    /// and the pool would get memory for one that was never written.
    ///
    /// # Safety
    /// `pages` pages are mapped from `from` on. Others may write to them.
    pub(super) unsafe fn copy_in(
        &self,
        page: u32,
        from: *const u8,
        pages: u32,
        userfaultfd: &Userfaultfd,
    ) -> io::Result<()> {
        let (offset_bytes, len_bytes) = (pages_to_bytes(page), pages_to_bytes(pages));
        assert!(
            offset_bytes + len_bytes <= self.len_bytes,
            "page {page} and {pages} more are not in {} bytes",
            self.len_bytes
        );
        // SAFETY: the target lies in the mapping, which nobody else knows; the caller vouches for
        // the source.
        unsafe { userfaultfd.copy(self.start.wrapping_add(offset_bytes), from, len_bytes) }
    }

    /// Start of the mapping.
    pub(super) fn as_ptr(&self) -> *mut u8 {
        self.start
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `new` and nobody else knows its address.
        unsafe { unmap(self.start, self.len_bytes) };
    }
}
