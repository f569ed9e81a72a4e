//! A region's memory as the kernel keeps it.

use std::io;
use std::sync::Arc;

use super::pagemap::Pagemap;
use super::{LinuxPool, Userfaultfd, check};
use crate::backing::{Backing, Residency};
use crate::fault::may_fail;
use crate::mapping::Mapping;
use crate::page::{PageBuf, PageRange, PoolPage, pages_to_bytes, range_pages};

/// A reserved range, registered for write protection.
#[derive(Debug)]
pub(crate) struct LinuxMemory {
    mapping: Mapping,
    userfaultfd: Arc<Userfaultfd>,
    pagemap: Pagemap,
}

impl LinuxMemory {
    pub(crate) fn new(mapping: Mapping, userfaultfd: Arc<Userfaultfd>) -> io::Result<LinuxMemory> {
        may_fail!("register");
        userfaultfd.register(mapping.as_ptr(), mapping.size_bytes())?;
        Ok(LinuxMemory {
            mapping,
            userfaultfd,
            pagemap: Pagemap::open()?,
        })
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

    /// Puts a new private mapping over `range`, of the pool's `first` page on or of nothing.
    fn remap(&self, range: &PageRange, pool: Option<(&LinuxPool, PoolPage)>) -> io::Result<()> {
        may_fail!("mmap");
        let (start, len_bytes) = self.span(range);
        let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        let (flags, fd, offset_bytes) = match pool {
            Some((pool, first)) => (flags, pool.fd(), pages_to_bytes(first.0)),
            None => (flags | libc::MAP_ANONYMOUS, -1, 0),
        };
        let offset = libc::off_t::try_from(offset_bytes).map_err(io::Error::other)?;
        // SAFETY:
        // - `span` checked that the range lies inside the reserved range, which is ours alone.
        // - The engine replaces pages only by equal ones, compared under write protection, so
        //   that no reader of the range can tell.
        let mapped = unsafe {
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(start.cast(), len_bytes, prot, flags, fd, offset)
        };
        if mapped == libc::MAP_FAILED {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }

    fn advise(&self, range: &PageRange, advice: libc::c_int) -> io::Result<()> {
        let (start, len_bytes) = self.span(range);
        // SAFETY:
        // - `span` checked that the range lies inside the reserved range, which is ours alone.
        // - The advice given here drops pages that hold zeros or belong to no guest any more
        //   or cover an equal page of the pool (`MADV_DONTNEED`), or leaves content as it is (`MADV_POPULATE_WRITE`).
        check(unsafe { libc::madvise(start.cast(), len_bytes, advice) })
    }

    fn wake(&self, range: &PageRange) {
        let (start, len_bytes) = self.span(range);
        if let Err(error) = self.userfaultfd.wake(start, len_bytes) {
            log::error!("cannot wake writers of pages {range:?}: {error}");
        }
    }
}

impl Backing for LinuxMemory {
    type Pool = LinuxPool;

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

    fn read(&self, page: u32, into: &mut PageBuf) {
        self.mapping.read_page(page, into);
    }

    fn protect(&self, range: PageRange, remapped: bool) -> io::Result<()> {
        may_fail!("userfaultfd");
        let (start, len_bytes) = self.span(&range);
        if remapped {
            self.userfaultfd.register(start, len_bytes)?;
        }
        self.userfaultfd.protect(start, len_bytes)
    }

    fn release(&self, range: PageRange) {
        let (start, len_bytes) = self.span(&range);
        if let Err(error) = self.userfaultfd.release(start, len_bytes) {
            // The range was registered before it was protected, so this can't fail for a range
            // that was; waking is what matters to a vCPU that sleeps in it.
            log::error!("cannot release pages {range:?}: {error}");
            self.wake(&range);
        }
    }

    fn share(&self, pool: &LinuxPool, range: PageRange, first: PoolPage) -> io::Result<()> {
        self.remap(&range, Some((pool, first)))?;
        // At once, though nobody protects it soon: a release of protected neighbours on both
        // sides stops at a mapping that is not registered, and leaves their writers asleep.
        let (start, len_bytes) = self.span(&range);
        if let Err(error) = self.userfaultfd.register(start, len_bytes) {
            log::error!("cannot register pages {range:?} again: {error}");
        }
        self.wake(&range);
        Ok(())
    }

    fn uncover(&self, range: PageRange) -> io::Result<()> {
        may_fail!("madvise");
        self.advise(&range, libc::MADV_DONTNEED)?;
        // Not just woken: in a file mapping the kernel keeps the protection of a dropped page as a
        // marker (`mm/memory.c`, `zap_install_uffd_wp_if_needed`), and its next writer would wait
        // for ever.
        self.release(range);
        Ok(())
    }

    fn drop_zeros(&self, range: PageRange, in_pool_vma: bool) -> io::Result<()> {
        if in_pool_vma {
            self.remap(&range, None)?;
            // The range must stay protectable, and declined for huge pages as the rest is.
            let (start, len_bytes) = self.span(&range);
            if let Err(error) = self.userfaultfd.register(start, len_bytes) {
                log::error!("cannot register pages {range:?} again: {error}");
            }
            if let Err(error) = self.advise(&range, libc::MADV_NOHUGEPAGE)
                && error.raw_os_error() != Some(libc::EINVAL)
            {
                log::error!("cannot decline huge pages for pages {range:?}: {error}");
            }
        } else {
            may_fail!("madvise");
            self.advise(&range, libc::MADV_DONTNEED)?;
        }
        self.wake(&range);
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
