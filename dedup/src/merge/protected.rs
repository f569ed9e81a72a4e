//! Write protection of a range that can't outlive the merge it was taken for.

use std::io;

use crate::backing::Backing;
use crate::backing::linux::Urgent;
use crate::base::page::{PageRange, PoolPage};
use crate::pages::pins::Replacing;
use crate::pages::region::Entered;

/// A range whose writers wait. Dropping it lets them go on, whatever happened in between: an
/// error or a panic in the middle of a merge must not leave a vCPU asleep in a fault.
///
/// Writers of parts that were merged wait for the rest too. Waking each part by itself was
/// rejected: it takes two system calls for each, which for pages that lie alone cost as much as
/// mapping them.
#[derive(Debug)]
pub(crate) struct Protected<'a, B: Backing> {
    backing: &'a B,
    range: PageRange,
    /// Whether a part was mapped anew, and must be registered again.
    remapped: bool,
    /// Pins of its pages wait for the drop of this, which comes after the release.
    replacing: Replacing<'a>,
    /// Dropped last: writers wait until the range is released.
    _urgent: Urgent,
}

impl<'a, B: Backing> Protected<'a, B> {
    pub(crate) fn new(inside: &'a Entered<'_, B>, range: PageRange) -> io::Result<Self> {
        let backing = inside.backing();
        // Made before the call: should protecting fail half-way, the drop releases that half.
        let protected = Protected {
            backing,
            range: range.clone(),
            remapped: false,
            // Before protection: a pin waits for a release, not in a page fault.
            replacing: inside.region.pins.begin_replacing(&range),
            _urgent: Urgent::begin(),
        };
        backing.protect(range)?;
        Ok(protected)
    }

    /// Whether a page is pinned: it must stay as it is, and may change under protection.
    pub(crate) fn is_pinned(&self, page: u32) -> bool {
        self.replacing.is_pinned(page)
    }

    /// Whether any page of the range is.
    pub(crate) fn any_pinned(&self) -> bool {
        self.replacing.any_pinned()
    }

    /// Drops the private copies of parts of the range. Returns of how many of them, from the first
    /// on, and at least one.
    pub(crate) fn discard(&mut self, parts: &[PageRange]) -> io::Result<usize> {
        self.backing.discard(parts)
    }

    /// Maps pool pages over a part of the range.
    pub(crate) fn map(
        &mut self,
        pool: &B::Pool,
        part: &PageRange,
        first: PoolPage,
    ) -> io::Result<()> {
        self.remapped = true;
        self.backing.map(pool, part.clone(), first)
    }

    /// Puts what was built in place of the whole range.
    pub(crate) fn replace(&mut self, staging: B::Staging) -> io::Result<()> {
        self.remapped = true;
        self.backing.replace(staging)
    }
}

impl<B: Backing> Drop for Protected<'_, B> {
    fn drop(&mut self) {
        self.backing.release(self.range.clone(), self.remapped);
    }
}
