//! Where a range is built before it is moved to its place.

use std::io;
use std::ptr;
use std::sync::Arc;

use super::{LinuxPool, Userfaultfd, check, check_mapped};
use crate::mapping::unmap;
use crate::page::{PAGE_SIZE_BYTES, PageRange, PoolPage, pages_to_bytes, range_pages};

/// A private mapping of consecutive pages of the pool, or of nothing, at an address that nobody else
/// knows, unmapped on drop. Its pages go by the numbers of those that they are to replace.
#[derive(Debug)]
pub(crate) struct Staging {
    start: *mut u8,
    range: PageRange,
    userfaultfd: Arc<Userfaultfd>,
    /// Whether pages of it that were not put there show the pool.
    shows_pool: bool,
}

impl Staging {
    /// Maps what lies `under` the pages of `range`.
    pub(super) fn new(
        range: PageRange,
        under: Option<(&LinuxPool, PoolPage)>,
        userfaultfd: &Arc<Userfaultfd>,
    ) -> io::Result<Staging> {
        userfaultfd.note_mapping_call();
        let len_bytes = pages_to_bytes(range_pages(&range));
        let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        let (flags, fd, offset_bytes) = match under {
            Some((pool, first)) => (flags, pool.fd(), pages_to_bytes(first.0)),
            None => (flags | libc::MAP_ANONYMOUS, -1, 0),
        };
        let offset = libc::off_t::try_from(offset_bytes).map_err(io::Error::other)?;
        // SAFETY: no address is given, so no existing mapping is touched.
        let start = unsafe {
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(ptr::null_mut(), len_bytes, prot, flags, fd, offset)
        };
        check_mapped(start)?;
        let staging = Staging {
            start: start.cast(),
            range,
            userfaultfd: Arc::clone(userfaultfd),
            shows_pool: under.is_some(),
        };
        if under.is_none() {
            // Declined for huge pages as the rest is. EINVAL: a kernel without them.
            // SAFETY: the range was mapped just above.
            let advised = unsafe { libc::madvise(start, len_bytes, libc::MADV_NOHUGEPAGE) };
            let error = io::Error::last_os_error();
            if advised != 0 && error.raw_os_error() != Some(libc::EINVAL) {
                return Err(error);
            }
        }
        staging
            .userfaultfd
            .register_missing(staging.start, len_bytes)?;
        Ok(staging)
    }

    /// The pages that it is to replace.
    pub(super) fn range(&self) -> PageRange {
        self.range.clone()
    }

    /// Where a page lies.
    pub(super) fn page_address(&self, page: u32) -> *mut u8 {
        self.span(&(page..page + 1)).0
    }

    fn span(&self, pages: &PageRange) -> (*mut u8, usize) {
        assert!(
            self.range.start <= pages.start && pages.start <= pages.end,
            "{pages:?} of {:?}",
            self.range
        );
        assert!(pages.end <= self.range.end, "{pages:?} of {:?}", self.range);
        let offset_bytes = pages_to_bytes(pages.start - self.range.start);
        let start = self.start.wrapping_add(offset_bytes);
        (start, pages_to_bytes(range_pages(pages)))
    }

    /// Puts copies of the pages from `from` on over `pages`.
    ///
    /// By the ioctl, which puts private pages in place. A store would read the pool's page first,
    /// and the pool would get memory for one that was never written.
    ///
    /// # Safety
    /// As many pages are mapped from `from` on. Others may write to them.
    pub(super) unsafe fn copy_in(&self, pages: &PageRange, from: *const u8) -> io::Result<()> {
        let (to, len_bytes) = self.span(pages);
        // SAFETY: the target lies in the mapping, which nobody else knows; the caller vouches for
        // the source.
        unsafe { self.userfaultfd.copy(to, from, len_bytes) }
    }

    /// Puts the kernel's zero page over `pages`, where the pool would show else.
    pub(super) fn put_zeros(&self, pages: &PageRange) -> io::Result<()> {
        if !self.shows_pool {
            return Ok(());
        }
        let (start, len_bytes) = self.span(pages);
        // SAFETY: the target lies in the mapping, which nobody else knows.
        unsafe { self.userfaultfd.put_zeros(start, len_bytes) }
    }

    /// Takes a page out.
    pub(super) fn take_out(&self, page: u32) -> io::Result<()> {
        let start = self.page_address(page);
        // SAFETY: the page lies in the mapping, which nobody else knows.
        check(unsafe { libc::madvise(start.cast(), PAGE_SIZE_BYTES, libc::MADV_DONTNEED) })
    }

    /// The mapping was moved: it is another's now.
    pub(super) fn forget(mut self) {
        self.start = ptr::null_mut();
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if self.start.is_null() {
            return;
        }
        self.userfaultfd.note_mapping_call();
        // SAFETY: the range was mapped by `new` and nobody else knows its address.
        unsafe { unmap(self.start, pages_to_bytes(range_pages(&self.range))) };
    }
}
