//! A reserved range of address space that holds one region's pages.

use std::ptr;

use thiserror::Error;

use crate::backing::linux::check::check_mapped;
use crate::backing::racing::copy_page_out;
use crate::base::page::{
    HUGE_PAGE_BYTES, PAGE_SIZE_BYTES, PageBuf, bytes_to_pages, pages_to_bytes,
};

/// Why a range could not be reserved.
#[derive(Debug, Error)]
pub enum MappingError {
    /// The size is zero, not whole pages, or more than a region may have.
    #[error("size_bytes: {0} is not a positive multiple of {PAGE_SIZE_BYTES} below 16 TiB")]
    Size(usize),
    /// The kernel refused.
    #[error("cannot reserve {size_bytes} bytes of address space: {source}")]
    Reserve {
        /// What was asked for.
        size_bytes: usize,
        /// Why not.
        source: std::io::Error,
    },
}

/// One page-aligned range of private anonymous memory, populated on demand, unmapped on drop.
///
/// The pages inside are remapped by the engine, but the range is never given up before the drop:
/// its addresses can't become anybody else's while a hypervisor's memory slot names them.
#[derive(Debug)]
pub struct Mapping {
    start: *mut u8,
    pages: u32,
    has_huge_pages: bool,
}

// SAFETY:
// - `start` names a range that belongs to this value alone until drop, on whichever thread.
// - All access through it is by volatile loads or by system calls, which may race.
unsafe impl Send for Mapping {}
// SAFETY: as for `Send`; no method hands out a reference into the range.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Reserves `size_bytes`. Huge pages are declined for the range: the engine shares base pages,
    /// and would have to split a huge page for what it merges of it.
    ///
    /// # Errors
    /// [`MappingError`] for a size that is not whole pages, and when the kernel refuses.
    pub fn new(size_bytes: usize) -> Result<Mapping, MappingError> {
        Mapping::reserve(size_bytes, libc::MADV_NOHUGEPAGE)
    }

    /// As [`Mapping::new`], with transparent huge pages of 2 MiB wherever the kernel has them: the
    /// guest runs faster, and the engine splits one only when enough of it can be shared (see
    /// `Settings::huge_page_shared_pages_min`).
    ///
    /// # Errors
    /// As [`Mapping::new`].
    pub fn with_huge_pages(size_bytes: usize) -> Result<Mapping, MappingError> {
        let mut mapping = Mapping::reserve(size_bytes, libc::MADV_HUGEPAGE)?;
        mapping.has_huge_pages = true;
        Ok(mapping)
    }

    /// Reserves a range, with `advice` about huge pages of its own. It begins where one can in any
    /// case, because the pool has huge pages too.
    fn reserve(size_bytes: usize, advice: libc::c_int) -> Result<Mapping, MappingError> {
        let pages = bytes_to_pages(size_bytes)
            .filter(|&pages| pages > 0 && pages_to_bytes(pages) == size_bytes)
            .ok_or(MappingError::Size(size_bytes))?;
        let refused = |source| MappingError::Reserve { size_bytes, source };
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let mapping = Mapping {
            start: reserve_aligned(size_bytes, HUGE_PAGE_BYTES, prot).map_err(refused)?,
            pages,
            has_huge_pages: false,
        };
        // SAFETY: the range was mapped just above and has `size_bytes` bytes.
        let advised = unsafe { libc::madvise(mapping.start.cast(), size_bytes, advice) };
        // EINVAL: a kernel without transparent huge pages, where there is nothing to say.
        let error = std::io::Error::last_os_error();
        if advised != 0 && error.raw_os_error() != Some(libc::EINVAL) {
            return Err(refused(error));
        }
        Ok(mapping)
    }

    /// Whether huge pages may lie in the range.
    pub(crate) fn has_huge_pages(&self) -> bool {
        self.has_huge_pages
    }

    /// Start of the range, for memory slots and guest memory maps. Valid until the drop.
    pub fn as_ptr(&self) -> *mut u8 {
        self.start
    }

    /// Size of the range in bytes.
    pub fn size_bytes(&self) -> usize {
        pages_to_bytes(self.pages)
    }

    /// Size of the range in pages.
    pub fn pages(&self) -> u32 {
        self.pages
    }

    /// Copies a page out.
    ///
    /// # Panics
    /// If `page` is not in the range.
    pub fn read_page(&self, page: u32, into: &mut PageBuf) {
        assert!(
            page < self.pages,
            "page {page} of a region of {} pages",
            self.pages
        );
        // SAFETY: `page` is in the range, so a whole page from there is mapped and readable.
        unsafe { copy_page_out(self.address(page), into) }
    }

    /// Address of a page; one past the end is allowed.
    pub(crate) fn address(&self, page: u32) -> *mut u8 {
        debug_assert!(page <= self.pages);
        self.start.wrapping_add(pages_to_bytes(page))
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `reserve` and only ever remapped in place; users keep the
        // `Mapping` alive.
        unsafe { unmap(self.start, self.size_bytes()) };
    }
}

/// Reserves address space that begins at a multiple of `align_bytes`.
pub(crate) fn reserve_aligned(
    size_bytes: usize,
    align_bytes: usize,
    prot: libc::c_int,
) -> std::io::Result<*mut u8> {
    let slack_bytes = align_bytes - PAGE_SIZE_BYTES;
    // SAFETY: no address is given, so no existing mapping is touched.
    let start = unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        libc::mmap(
            ptr::null_mut(),
            size_bytes + slack_bytes,
            prot,
            flags,
            -1,
            0,
        )
    };
    check_mapped(start)?;
    let start: *mut u8 = start.cast();
    let before_bytes = start.align_offset(align_bytes);
    let aligned = start.wrapping_add(before_bytes);
    let after = aligned.wrapping_add(size_bytes);
    for (end, len_bytes) in [(start, before_bytes), (after, slack_bytes - before_bytes)] {
        // SAFETY: both ends are parts of what was reserved just above, which nobody else knows.
        unsafe { unmap(end, len_bytes) };
    }
    Ok(aligned)
}

/// Gives back address space.
///
/// # Safety
/// The caller owns the range and has done with it.
pub(crate) unsafe fn unmap(start: *mut u8, size_bytes: usize) {
    if size_bytes == 0 {
        return;
    }
    // SAFETY: as for this call.
    let unmapped = unsafe { libc::munmap(start.cast(), size_bytes) };
    if unmapped != 0 {
        log::error!("cannot unmap a range: {}", std::io::Error::last_os_error());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::page::PAGE_WORDS;

    #[test]
    fn a_size_that_is_not_whole_pages_is_refused_with_the_value() {
        for size_bytes in [0, 1, PAGE_SIZE_BYTES - 1, PAGE_SIZE_BYTES + 1] {
            let error = Mapping::new(size_bytes).unwrap_err().to_string();
            assert!(error.contains(&size_bytes.to_string()), "{error}");
        }
    }

    #[test]
    fn a_range_begins_where_a_huge_page_can() {
        for size_bytes in [PAGE_SIZE_BYTES, HUGE_PAGE_BYTES, 3 * HUGE_PAGE_BYTES] {
            for make in [Mapping::new, Mapping::with_huge_pages] {
                let mapping = make(size_bytes).unwrap();
                assert_eq!(mapping.as_ptr().align_offset(HUGE_PAGE_BYTES), 0);
                assert_eq!(mapping.size_bytes(), size_bytes);
            }
        }
    }

    #[test]
    fn a_new_range_reads_as_zeros() {
        let mapping = Mapping::new(3 * PAGE_SIZE_BYTES).unwrap();
        let mut page = [1; PAGE_WORDS];
        mapping.read_page(2, &mut page);
        assert_eq!(page, [0; PAGE_WORDS]);
    }
}
