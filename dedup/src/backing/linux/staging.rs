//! Where a range is built before it is moved to its place.

use std::io;
use std::ptr;
use std::sync::Arc;

use super::check::{check, check_mapped};
use super::{LinuxPool, Userfaultfd};
use crate::backing::mapping::{reserve_aligned, unmap};
use crate::base::page::{
    HUGE_PAGE_BYTES, PAGE_SIZE_BYTES, PageRange, PoolPage, pages_to_bytes, range_pages,
};

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
    /// Maps what lies `under` the pages of `range`, where a huge page can begin. A range that is moved
    /// from anywhere else brings a page table along, and no huge page of the pool is mapped then.
    pub(super) fn new(
        range: PageRange,
        under: Option<(&LinuxPool, PoolPage)>,
        userfaultfd: &Arc<Userfaultfd>,
    ) -> io::Result<Staging> {
        let len_bytes = pages_to_bytes(range_pages(&range));
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let offset_bytes = under.map_or(0, |(_, first)| pages_to_bytes(first.0));
        let offset = libc::off_t::try_from(offset_bytes).map_err(io::Error::other)?;
        userfaultfd.note_mapping_call();
        let start = reserve_aligned(len_bytes, HUGE_PAGE_BYTES, prot)?;
        let staging = Staging {
            start,
            range,
            userfaultfd: Arc::clone(userfaultfd),
            shows_pool: under.is_some(),
        };
        if let Some((pool, _)) = under {
            userfaultfd.note_mapping_call();
            let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_FIXED;
            let fd = pool.fd();
            // SAFETY: the range was reserved just above, and nobody else knows it.
            let mapped = unsafe { libc::mmap(start.cast(), len_bytes, prot, flags, fd, offset) };
            if let Err(error) = check_mapped(mapped) {
                // The call may have taken the reservation away, and another thread have the range now.
                staging.forget();
                return Err(error);
            }
        }
        let start: *mut libc::c_void = start.cast();
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
