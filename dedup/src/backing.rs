//! What the engine asks of memory, as a trait: the kernel behind it in production
//! ([`linux`]), a model in tests (`fake`).

#[expect(unsafe_code, reason = "the system calls that move pages")]
pub(crate) mod linux;
#[expect(
    unsafe_code,
    reason = "maps and unmaps memory, and reads what others write to"
)]
pub(crate) mod mapping;
pub(crate) mod process_memory;
#[expect(unsafe_code, reason = "loads from memory that others write to")]
pub(crate) mod racing;

#[cfg(all(test, not(loom)))]
pub(crate) mod fake;

use std::io;

use crate::base::page::{PageBuf, PageRange, PoolPage};
use crate::index::fingerprint::Fingerprint;

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

/// The memory of one region.
///
/// All methods may be called while guests read and write the region. Writers of a protected page
/// wait, and readers never do, so each change of what a page shows must be one step for them.
///
/// Three calls change what lies behind a page: [`Backing::discard`], [`Backing::map`] and
/// [`Backing::replace`].
pub(crate) trait Backing: Send + Sync + 'static {
    /// Where stable pages live.
    type Pool: Pool;

    /// A range that is being built where nobody looks, to be put in the place of a region's.
    type Staging: std::fmt::Debug;

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

    /// Stops writers of `range` until [`Backing::release`].
    fn protect(&self, range: PageRange) -> io::Result<()>;

    /// Lets writers of `range` go on with what they find there now. `remapped` tells that a part of
    /// it was mapped anew meanwhile.
    fn release(&self, range: PageRange, remapped: bool);

    /// Drops the private copies of the pages of `parts`, which hold what will show instead: the page
    /// of the pool that they are mapped to, or zeros if they are mapped to none. Or their owner gives
    /// them up, and they are mapped to none. Their writers wait on. Costs no VMA.
    ///
    /// As a `write` may take fewer bytes than it is given, this may do fewer parts: it returns how
    /// many from the first on, at least one, and fails only for the first. Never called with none.
    fn discard(&self, parts: &[PageRange]) -> io::Result<usize>;

    /// Maps the pool's pages from `first` on over `range`, which hold the same. Its writers wait on.
    fn map(&self, pool: &Self::Pool, range: PageRange, first: PoolPage) -> io::Result<()>;

    /// Begins to build what is to replace `range`: a mapping of the pool from `under` on, or of
    /// nothing. Until told otherwise its pages show the pool's, or zeros.
    fn stage(
        &self,
        pool: &Self::Pool,
        range: PageRange,
        under: Option<PoolPage>,
    ) -> io::Result<Self::Staging>;

    /// Puts private copies of `pages` into the staging, where nothing was put yet. The guest may be
    /// writing to them.
    fn stage_copies(&self, staging: &Self::Staging, pages: PageRange) -> io::Result<()>;

    /// Has `pages` show zeros in the staging, where nothing was put yet, whatever the pool holds there
    /// now or later.
    fn stage_zeros(&self, staging: &Self::Staging, pages: PageRange) -> io::Result<()>;

    /// Takes back what was put into the staging for a page.
    fn unstage(&self, staging: &Self::Staging, page: u32) -> io::Result<()>;

    /// Whether a page shows the same bytes as the copy of it in the staging.
    fn equals_staged(&self, staging: &Self::Staging, page: u32) -> bool;

    /// Puts a staging in the place of its range, in one step. The range is protected and shows the
    /// same, or its owner gives it up for zeros. If it fails, all is as it was.
    fn replace(&self, staging: Self::Staging) -> io::Result<()>;

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
