//! Write protection of a range that can't outlive the merge it was taken for.

use std::io;

use crate::backing::Backing;
use crate::page::{PageRange, PoolPage};

/// A range whose writers wait. Dropping it lets them go on, whatever happened in between: an
/// error or a panic in the middle of a merge must not leave a vCPU asleep in a fault.
#[derive(Debug)]
pub(crate) struct Protected<'a, B: Backing> {
    backing: &'a B,
    range: PageRange,
    /// Parts whose writers were woken already, ascending.
    swapped: Vec<PageRange>,
}

impl<'a, B: Backing> Protected<'a, B> {
    pub(crate) fn new(backing: &'a B, range: PageRange, remapped: bool) -> io::Result<Self> {
        // Made before the call: should protecting fail half-way, the drop releases that half.
        let protected = Protected {
            backing,
            range: range.clone(),
            swapped: Vec::new(),
        };
        backing.protect(range, remapped)?;
        Ok(protected)
    }

    /// Maps pool pages over a part of the range and wakes its writers.
    pub(crate) fn share(
        &mut self,
        pool: &B::Pool,
        part: &PageRange,
        first: PoolPage,
    ) -> io::Result<()> {
        self.backing.share(pool, part.clone(), first)?;
        self.swapped.push(part.clone());
        Ok(())
    }

    /// Drops the private copies of a part of the range, which are equal to the pool pages under
    /// them, and wakes its writers.
    pub(crate) fn uncover(&mut self, part: &PageRange) -> io::Result<()> {
        self.backing.uncover(part.clone())?;
        self.swapped.push(part.clone());
        Ok(())
    }

    /// Gives back a part of the range, which holds zeros, and wakes its writers.
    pub(crate) fn drop_zeros(&mut self, part: &PageRange, in_pool_vma: bool) -> io::Result<()> {
        self.backing.drop_zeros(part.clone(), in_pool_vma)?;
        self.swapped.push(part.clone());
        Ok(())
    }
}

impl<B: Backing> Drop for Protected<'_, B> {
    fn drop(&mut self) {
        let mut next = self.range.start;
        for part in std::mem::take(&mut self.swapped) {
            if next < part.start {
                self.backing.release(next..part.start);
            }
            next = part.end;
        }
        if next < self.range.end {
            self.backing.release(next..self.range.end);
        }
    }
}
