//! What the engine asks of memory, as a trait: the kernel behind it in production
//! ([`linux`]), a model in tests (`fake`).

#[expect(unsafe_code, reason = "the system calls that move pages")]
pub(crate) mod linux;

#[cfg(all(test, not(loom)))]
pub(crate) mod fake;

use std::io;

use crate::fingerprint::Fingerprint;
use crate::page::{PageBuf, PageRange, PoolPage};

/// What lies behind a page right now. Pages that no [`PageRange`] names are absent: never touched,
/// dropped, or shared and not touched since.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Residency {
    /// A private page of the guest's own.
    Private,
    /// The kernel's zero page, after a read of an absent page.
    ZeroPage,
    /// A page of the pool, read and not written to since it was shared.
    Pool,
    /// Swapped out, or just being moved by the kernel.
    Swapped,
}

/// A range of pages, and the page of the pool that the first of them is to be mapped to.
pub(crate) type Part = (PageRange, PoolPage);

/// The memory of one region.
///
/// All methods may be called while guests read and write the region. Writers of a protected page
/// wait; readers do so only where [`Backing::share`] says it, so each change of what a page shows
/// must be one step for them.
pub(crate) trait Backing: Send + Sync + 'static {
    /// Where stable pages live.
    type Pool: Pool;

    /// Number of pages of the region.
    fn pages(&self) -> u32;

    /// Appends what lies behind `range`, in ascending order, absent pages left out.
    fn residency(
        &self,
        range: PageRange,
        found: &mut Vec<(PageRange, Residency)>,
    ) -> io::Result<()>;

    /// Whether any page of `range` is part of a huge page.
    fn has_huge_page(&self, range: PageRange) -> io::Result<bool>;

    /// Splits the huge page that `page` is part of, so that its pages can be given back one by one.
    fn split_huge_page(&self, page: u32) -> io::Result<()>;

    /// Copies a page out. The guest may be writing to it.
    fn read(&self, page: u32, into: &mut PageBuf);

    /// Whether a page shows only zeros.
    fn is_zero(&self, page: u32) -> bool;

    /// Whether a page shows the same bytes as a page of the pool.
    fn equals_pool(&self, page: u32, pool: &Self::Pool, pool_page: PoolPage) -> bool;

    /// Whether a page begins like a page of the pool. Where it does not, they are not equal.
    fn may_equal_pool(&self, page: u32, pool: &Self::Pool, pool_page: PoolPage) -> bool;

    /// Copies the pages of `range` into the pool from `first` on, where nobody maps anything yet.
    /// The guest may be writing to them, and an exit may free them, which makes them zeros.
    fn fill(&self, range: PageRange, pool: &Self::Pool, first: PoolPage) -> io::Result<()>;

    /// Stops writers of `range` until [`Backing::release`]. `remapped` tells that part of it was
    /// mapped anew since it was last protected, so that it must be registered again.
    fn protect(&self, range: PageRange, remapped: bool) -> io::Result<()>;

    /// Lets writers of `range` go on with what they find there now. `remapped` as for
    /// [`Backing::protect`].
    fn release(&self, range: PageRange, remapped: bool);

    /// Maps the pool's pages from a first one on over each of `parts` of a protected range, which
    /// ascend. Their writers wait on. Of several parts, none of which may lie in a mapping of the
    /// pool, readers may wait too, until the release.
    ///
    /// Returns how many parts it did, as [`Backing::uncover`]; the others are as they were.
    fn share(&self, pool: &Self::Pool, parts: &[Part]) -> io::Result<usize>;

    /// Maps the pool's pages from `first` on over `range` in one step, but for those of `own`, parts
    /// of it in ascending order: they keep what they show, as private pages over places of the pool
    /// that are not looked at. Writers of the range wait until it is done. If it fails, all is as it
    /// was.
    fn bridge(
        &self,
        pool: &Self::Pool,
        range: PageRange,
        first: PoolPage,
        own: &[PageRange],
    ) -> io::Result<()>;

    /// Drops the private copies over the pool pages that `parts` are mapped to, which hold the
    /// same. Their writers wait on. Costs no VMA, unlike [`Backing::share`].
    ///
    /// As a `write` may take fewer bytes than it is given, this may do fewer parts: it returns how
    /// many from the first on, at least one, and fails only for the first. Never called with none.
    fn uncover(&self, parts: &[PageRange]) -> io::Result<usize>;

    /// Puts one private mapping over `range`, in one step, with a copy of what each page shows.
    /// `under` tells for each page whether it is mapped to the pool: of the others, those without
    /// memory stay so. Its writers wait on.
    fn rebuild(&self, range: PageRange, under: &[bool]) -> io::Result<()>;

    /// Gives back the pages of `parts`, which hold zeros and are not mapped to the pool. Their
    /// writers wait on. Returns how many parts it did, as [`Backing::uncover`].
    fn drop_zeros(&self, parts: &[PageRange]) -> io::Result<usize>;

    /// Gives back the pages of `range`, which hold zeros and are mapped to the pool, where dropping
    /// them would uncover a pool page. Its writers wait on.
    fn unmap_zeros(&self, range: PageRange) -> io::Result<()>;

    /// Gives every page of `range` a private copy of what it shows, as a write by the guest would.
    fn unshare(&self, range: PageRange) -> io::Result<()>;

    /// Gives back every page of the region; the range stays reserved.
    fn free_all(&self);
}

/// Where stable pages live.
pub(crate) trait Pool: std::fmt::Debug + Send + Sync + 'static {
    /// What a page holds that was filled and that nobody shares yet.
    fn fingerprint(&self, page: PoolPage) -> Fingerprint;

    /// Pages that take memory.
    fn allocated_pages(&self) -> io::Result<u64>;

    /// Gives back `pages` pages from `first` on, which nobody maps as shared any more.
    fn punch(&self, first: PoolPage, pages: u32) -> io::Result<()>;
}
