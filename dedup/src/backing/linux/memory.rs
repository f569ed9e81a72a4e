//! A region's memory as the kernel keeps it.

mod parts;

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::check::{check, check_mapped};
use super::pagemap::Pagemap;
use super::replace::replace;
use super::staging::Staging;
use super::{LinuxPool, Userfaultfd};
use crate::backing::mapping::Mapping;
use crate::backing::racing::{page_is_zero, pages_are_equal, pages_may_be_equal};
use crate::backing::{Backing, Residency};
use crate::base::complaints::complain;
use crate::base::failpoint::may_fail;
use crate::base::page::{PageBuf, PageRange, PoolPage, pages_to_bytes, range_pages};

/// A reserved range, registered for write protection.
#[derive(Debug)]
pub(crate) struct LinuxMemory {
    mapping: Mapping,
    userfaultfd: Arc<Userfaultfd>,
    pagemap: Pagemap,
    /// The kernel takes advice for many ranges at once, or was not asked yet.
    takes_many: AtomicBool,
}

impl LinuxMemory {
    pub(crate) fn new(mapping: Mapping, userfaultfd: Arc<Userfaultfd>) -> io::Result<LinuxMemory> {
        may_fail!("register");
        userfaultfd.register(mapping.as_ptr(), mapping.size_bytes())?;
        let memory = LinuxMemory {
            mapping,
            userfaultfd,
            pagemap: Pagemap::open()?,
            takes_many: AtomicBool::new(true),
        };
        memory.keep_from_children(&(0..memory.mapping.pages()))?;
        Ok(memory)
    }

    pub(crate) fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    fn span(&self, range: &PageRange) -> (*mut u8, usize) {
        assert!(
            range.start <= range.end && range.end <= self.mapping.pages(),
            "{range:?}"
        );
        (
            self.mapping.address(range.start),
            pages_to_bytes(range_pages(range)),
        )
    }

    /// Moves a mapping with everything in it over `range`: one step for those who read it.
    ///
    /// # Safety
    /// The mapping is the caller's, as long as the range, shows what the range shows or may show, and is
    /// used by nobody afterwards.
    unsafe fn move_here(&self, staging: *mut u8, range: &PageRange) -> io::Result<()> {
        self.userfaultfd.note_mapping_call();
        let (start, len_bytes) = self.span(range);
        let shift = || {
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            // SAFETY:
            // - `span` checked that the range lies inside the reserved range, which is ours alone.
            // - The caller vouches for the other one. A call that fails leaves that as it was.
            let moved = unsafe { libc::mremap(staging.cast(), len_bytes, len_bytes, flags, start) };
            check_mapped(moved)
        };
        // SAFETY: as above.
        unsafe { replace(start, len_bytes, &self.userfaultfd, shift) }
    }

    fn advise(&self, range: &PageRange, advice: libc::c_int) -> io::Result<()> {
        let (start, len_bytes) = self.span(range);
        // SAFETY:
        // - `span` checked that the range lies inside the reserved range, which is ours alone.
        // - The advice given here drops pages that hold zeros, were given up or belong to no guest any
        //   more, or cover an equal page of the pool (`MADV_DONTNEED`), or leaves content as it is
        //   (`MADV_POPULATE_WRITE`, `MADV_COLD`, `MADV_DONTFORK`).
        check(unsafe { libc::madvise(start.cast(), len_bytes, advice) })
    }

    /// Leaves a range out of child processes: after a fork each page that is written to would be copied.
    /// What is mapped anew has to be told again.
    fn keep_from_children(&self, range: &PageRange) -> io::Result<()> {
        self.userfaultfd.note_mapping_call();
        self.advise(range, libc::MADV_DONTFORK)
    }

    fn release_at_once(&self, range: &PageRange, remapped: bool) -> io::Result<()> {
        let (start, len_bytes) = self.span(range);
        // Registered first: a release stops at a mapping that is not, and leaves those who wait
        // behind it asleep.
        if remapped {
            may_fail!("register_again");
            self.userfaultfd.register(start, len_bytes)?;
        }
        may_fail!("release");
        self.userfaultfd.release(start, len_bytes)
    }

    /// What is left to do for writers when a release fails as a whole: a vCPU that sleeps in the
    /// range must wake up, whatever else is wrong.
    fn release_each(&self, range: &PageRange) {
        for page in range.clone() {
            let (start, len_bytes) = self.span(&(page..page + 1));
            // Fails where nothing is registered, and then nothing is protected either.
            let _ = self.userfaultfd.release(start, len_bytes);
        }
        let (start, len_bytes) = self.span(range);
        if let Err(error) = self.userfaultfd.wake(start, len_bytes) {
            complain!(Error, "cannot wake writers of pages {range:?}: {error}");
        }
    }

    fn page_address(&self, page: u32) -> *const u8 {
        let (start, _) = self.span(&(page..page + 1));
        start
    }
}

impl Backing for LinuxMemory {
    type Pool = LinuxPool;
    type Staging = Staging;

    fn pages(&self) -> u32 {
        self.mapping.pages()
    }

    fn residency(
        &self,
        range: PageRange,
        found: &mut Vec<(PageRange, Residency)>,
    ) -> io::Result<()> {
        self.pagemap.scan(&self.mapping, range, found)
    }

    fn has_huge_page(&self, range: PageRange) -> io::Result<bool> {
        if !self.mapping.has_huge_pages() {
            return Ok(false);
        }
        self.pagemap.has_huge_page(&self.mapping, &range)
    }

    fn split_huge_page(&self, page: u32) -> io::Result<()> {
        // To call a part of a huge page cold makes the kernel split it (`mm/madvise.c`,
        // `madvise_cold_or_pageout_pte_range`). Unmapping a part alone would not give it back: the
        // whole huge page stays until memory is short (`deferred_split_folio`).
        self.advise(&(page..page + 1), libc::MADV_COLD)
    }

    fn read(&self, page: u32, into: &mut PageBuf) {
        self.mapping.read_page(page, into);
    }

    fn is_zero(&self, page: u32) -> bool {
        // SAFETY: a whole, aligned page of a reserved range.
        unsafe { page_is_zero(self.page_address(page)) }
    }

    fn equals_pool(&self, page: u32, pool: &LinuxPool, pool_page: PoolPage) -> bool {
        let (mine, stable) = (self.page_address(page), pool.page_address(pool_page));
        // SAFETY: both are whole, aligned pages, of a reserved range and of the pool's view.
        unsafe { pages_are_equal(mine, stable) }
    }

    fn may_equal_pool(&self, page: u32, pool: &LinuxPool, pool_page: PoolPage) -> bool {
        let (mine, stable) = (self.page_address(page), pool.page_address(pool_page));
        // SAFETY: both are whole, aligned pages, of a reserved range and of the pool's view.
        unsafe { pages_may_be_equal(mine, stable) }
    }

    fn fill(&self, range: PageRange, pool: &LinuxPool, first: PoolPage) -> io::Result<()> {
        let (start, len_bytes) = self.span(&range);
        // SAFETY: `span` checked that the range lies inside the reserved range.
        unsafe { pool.fill(first, start, len_bytes) }
    }

    fn protect(&self, range: PageRange) -> io::Result<()> {
        may_fail!("userfaultfd");
        let (start, len_bytes) = self.span(&range);
        match self.userfaultfd.protect(start, len_bytes) {
            // A part is not registered: registering it failed when it was mapped anew.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                self.userfaultfd.register(start, len_bytes)?;
                self.userfaultfd.protect(start, len_bytes)
            }
            protected => protected,
        }
    }

    fn release(&self, range: PageRange, remapped: bool) {
        if let Err(error) = self.release_at_once(&range, remapped) {
            complain!(
                Error,
                "cannot release pages {range:?}, going page by page: {error}"
            );
            self.release_each(&range);
        }
        // Writers do not wait for this.
        if remapped && let Err(error) = self.keep_from_children(&range) {
            complain!(Warn, "a fork would copy pages {range:?}: {error}");
        }
    }

    fn discard(&self, parts: &[PageRange]) -> io::Result<usize> {
        // In a file mapping the kernel keeps the protection of a dropped page as a marker
        // (`mm/memory.c`, `zap_install_uffd_wp_if_needed`), which the release takes away.
        self.drop_parts(parts)
    }

    fn map(&self, pool: &LinuxPool, range: PageRange, first: PoolPage) -> io::Result<()> {
        may_fail!("mmap");
        self.userfaultfd.note_mapping_call();
        let (start, len_bytes) = self.span(&range);
        let offset = libc::off_t::try_from(pages_to_bytes(first.0)).map_err(io::Error::other)?;
        let map = || {
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_NORESERVE;
            // SAFETY:
            // - `span` checked that the range lies inside the reserved range, which is ours alone.
            // - The engine replaces pages only by equal ones, compared under write protection, so
            //   that no reader of the range can tell.
            let mapped =
                unsafe { libc::mmap(start.cast(), len_bytes, prot, flags, pool.fd(), offset) };
            check_mapped(mapped)
        };
        // SAFETY: as above.
        unsafe { replace(start, len_bytes, &self.userfaultfd, map) }
    }

    fn stage(
        &self,
        pool: &LinuxPool,
        range: PageRange,
        under: Option<PoolPage>,
    ) -> io::Result<Staging> {
        may_fail!("stage");
        let under = under.map(|first| (pool, first));
        Staging::new(range, under, &self.userfaultfd)
    }

    fn stage_copies(&self, staging: &Staging, pages: PageRange) -> io::Result<()> {
        may_fail!("stage_copies");
        let (from, _) = self.span(&pages);
        // SAFETY: `span` checked that the pages lie inside the reserved range.
        unsafe { staging.copy_in(&pages, from) }
    }

    fn stage_zeros(&self, staging: &Staging, pages: PageRange) -> io::Result<()> {
        may_fail!("stage_zeros");
        staging.put_zeros(&pages)
    }

    fn unstage(&self, staging: &Staging, page: u32) -> io::Result<()> {
        staging.take_out(page)
    }

    fn equals_staged(&self, staging: &Staging, page: u32) -> bool {
        let (mine, copy) = (self.page_address(page), staging.page_address(page));
        // SAFETY: both are whole, aligned pages, of a reserved range and of the staging one.
        unsafe { pages_are_equal(mine, copy) }
    }

    fn replace(&self, staging: Staging) -> io::Result<()> {
        // Half-way: all that was copied is given back, and the guest never saw it.
        may_fail!("mremap");
        let range = staging.range();
        // SAFETY: the staging range is as long as `range`. It shows copies of some of its pages, and
        // for the others pages of the pool that the engine compared with them, or zeros, which they
        // show or their owner gave them up for.
        unsafe { self.move_here(staging.page_address(range.start), &range)? };
        staging.forget();
        Ok(())
    }

    fn unshare(&self, range: PageRange) -> io::Result<()> {
        may_fail!("madvise");
        self.advise(&range, libc::MADV_POPULATE_WRITE)
    }

    fn free_all(&self) {
        let all = 0..self.mapping.pages();
        if let Err(error) = self.advise(&all, libc::MADV_DONTNEED) {
            log::error!("cannot free the pages of a region: {error}");
        }
    }
}

#[cfg(test)]
mod tests;
