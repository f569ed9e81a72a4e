//! Write protection of a range that can't outlive the merge it was taken for.

use std::io;

use crate::backing::{Backing, Part};
use crate::page::{PageRange, PoolPage};

/// A range whose writers wait. Dropping it lets them go on, whatever happened in between: an
/// error or a panic in the middle of a merge must not leave a vCPU asleep in a fault.
///
/// Writers of parts that were swapped wait for the rest too. Waking each part by itself was
/// rejected: it takes two system calls for each, which for pages that lie alone cost as much as
/// mapping them.
#[derive(Debug)]
pub(crate) struct Protected<'a, B: Backing> {
    backing: &'a B,
    range: PageRange,
    /// Whether a part was mapped anew, and must be registered again.
    remapped: bool,
}

impl<'a, B: Backing> Protected<'a, B> {
    pub(crate) fn new(backing: &'a B, range: PageRange, remapped: bool) -> io::Result<Self> {
        // Made before the call: should protecting fail half-way, the drop releases that half.
        let protected = Protected {
            backing,
            range: range.clone(),
            remapped: false,
        };
        backing.protect(range, remapped)?;
        Ok(protected)
    }

    /// Maps pool pages over parts of the range, none of several in a mapping of the pool. Returns
    /// how many of them, from the first on, and at least one.
    pub(crate) fn share(&mut self, pool: &B::Pool, parts: &[Part]) -> io::Result<usize> {
        self.remapped = true;
        self.backing.share(pool, parts)
    }

    /// Maps pool pages over a part of the range, but for the pages of `own`.
    pub(crate) fn bridge(
        &mut self,
        pool: &B::Pool,
        part: &PageRange,
        first: PoolPage,
        own: &[PageRange],
    ) -> io::Result<()> {
        self.remapped = true;
        self.backing.bridge(pool, part.clone(), first, own)
    }

    /// Drops the private copies of parts of the range, which are equal to the pool pages under
    /// them. Returns how many of the parts, from the first on, and at least one.
    pub(crate) fn uncover(&mut self, parts: &[PageRange]) -> io::Result<usize> {
        self.backing.uncover(parts)
    }

    /// Puts one mapping without the pool in place of the whole range, with the same content. `under`
    /// tells for each page whether it is mapped to the pool.
    pub(crate) fn rebuild(&mut self, under: &[bool]) -> io::Result<()> {
        self.remapped = true;
        self.backing.rebuild(self.range.clone(), under)
    }

    /// Gives back parts of the range, which hold zeros and are not mapped to the pool. Returns how
    /// many of them, from the first on, and at least one.
    pub(crate) fn drop_zeros(&mut self, parts: &[PageRange]) -> io::Result<usize> {
        self.backing.drop_zeros(parts)
    }

    /// Gives back a part of the range, which holds zeros and is mapped to the pool.
    pub(crate) fn unmap_zeros(&mut self, part: &PageRange) -> io::Result<()> {
        self.remapped = true;
        self.backing.unmap_zeros(part.clone())
    }
}

impl<B: Backing> Drop for Protected<'_, B> {
    fn drop(&mut self) {
        self.backing.release(self.range.clone(), self.remapped);
    }
}
