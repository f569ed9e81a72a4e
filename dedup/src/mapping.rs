//! A reserved range of address space that holds one region's pages.

use std::ptr;

use thiserror::Error;

use crate::backing::linux::pagemap::Pagemap;
use crate::page::{PAGE_SIZE_BYTES, PageBuf, bytes_to_pages, pages_to_bytes};

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
}

// SAFETY:
// - `start` names a range that belongs to this value alone until drop, on whichever thread.
// - All access through it is by volatile loads or by system calls, which may race.
unsafe impl Send for Mapping {}
// SAFETY: as for `Send`; no method hands out a reference into the range.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Reserves `size_bytes`. Huge pages are declined for the range: the engine shares base pages,
    /// and the kernel would have to split a huge page at each merge.
    ///
    /// # Errors
    /// [`MappingError`] for a size that is not whole pages, and when the kernel refuses.
    pub fn new(size_bytes: usize) -> Result<Mapping, MappingError> {
        let pages = bytes_to_pages(size_bytes)
            .filter(|&pages| pages > 0 && pages_to_bytes(pages) == size_bytes)
            .ok_or(MappingError::Size(size_bytes))?;
        let refused = |source| MappingError::Reserve { size_bytes, source };
        // SAFETY: no address is given, so no existing mapping is touched.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                size_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(refused(std::io::Error::last_os_error()));
        }
        let mapping = Mapping {
            start: start.cast(),
            pages,
        };
        // SAFETY: the range was mapped just above and has `size_bytes` bytes.
        let declined = unsafe { libc::madvise(start, size_bytes, libc::MADV_NOHUGEPAGE) };
        // EINVAL: a kernel without transparent huge pages, where there is nothing to decline.
        let error = std::io::Error::last_os_error();
        if declined != 0 && error.raw_os_error() != Some(libc::EINVAL) {
            return Err(refused(error));
        }
        Ok(mapping)
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

    /// Memory behind the range that nothing else shares. Walks its page tables: some 50 ns a page.
    ///
    /// # Errors
    /// If the kernel lacks `PAGEMAP_SCAN` (Linux 6.7).
    pub fn private_bytes(&self) -> std::io::Result<u64> {
        Pagemap::open()?.private_bytes(self)
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
        // SAFETY:
        // - The range was mapped by `new` and only ever remapped in place.
        // - Nobody else may use it any more: users keep the `Mapping` alive.
        let unmapped = unsafe { libc::munmap(self.start.cast(), self.size_bytes()) };
        if unmapped != 0 {
            log::error!("cannot unmap a region: {}", std::io::Error::last_os_error());
        }
    }
}

/// What is loaded at once: the widest load that every x86-64 has.
type Chunk = std::arch::x86_64::__m128i;

/// Copies a page that others may be writing to, chunk by chunk, so that a torn *page* is possible
/// and an invented *word* is not. `memcpy` was rejected: to the compiler it is a plain read, which
/// it may repeat or leave out.
///
/// # Safety
/// `from` is aligned to a page and valid for reads of a whole page.
pub(crate) unsafe fn copy_page_out(from: *const u8, into: &mut PageBuf) {
    let from = from.cast::<Chunk>();
    let into = into.as_mut_ptr().cast::<Chunk>();
    for index in 0..PAGE_SIZE_BYTES / size_of::<Chunk>() {
        // SAFETY: `index` is inside the page that the caller vouches for, which is aligned.
        let chunk = unsafe { from.wrapping_add(index).read_volatile() };
        // SAFETY: `index` is inside `into`, which has the size of a page; no alignment is assumed.
        unsafe { into.wrapping_add(index).write_unaligned(chunk) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::PAGE_WORDS;

    #[test]
    fn a_size_that_is_not_whole_pages_is_refused_with_the_value() {
        for size_bytes in [0, 1, PAGE_SIZE_BYTES - 1, PAGE_SIZE_BYTES + 1] {
            let error = Mapping::new(size_bytes).unwrap_err().to_string();
            assert!(error.contains(&size_bytes.to_string()), "{error}");
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
