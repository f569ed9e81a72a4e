//! A region: memory that is registered for merging, its lock, and its `exiting` flag.

use std::sync::OnceLock;

use crate::base::mutant::{self, Mutant};
use crate::base::stats::RegionStats;
use crate::base::sync::{self, AtomicBool, Mutex, Ordering, RwLock, RwLockReadGuard};
use crate::base::vmas::VmaLease;
use crate::pages::dirty::DirtySource;
use crate::pages::pins::Pins;

/// Names a region for the life of its engine; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RegionId(pub u64);

/// Registered memory. The kernel's `mm_struct` in the terms of the 2009 patch: the flag stands for
/// `mm_users == 0`, the lock for `mmap_sem`, the `Arc` around it for `mm_count`.
#[derive(Debug)]
pub(crate) struct Region<B> {
    id: RegionId,
    backing: B,
    source: Option<Box<dyn DirtySource>>,
    exiting: AtomicBool,
    lock: RwLock<()>,
    /// Pages that are not to be replaced.
    pub(crate) pins: Pins,
    pub(crate) stats: Mutex<RegionStats>,
    /// What its mappings count after it was detached. Dropped after the memory.
    pub(crate) vmas: OnceLock<VmaLease>,
}

/// A region as its handle, its slot and the worker hold it.
pub(crate) type RegionRef<B> = sync::Arc<Region<B>>;

/// Read access to a region that was not exiting when the lock was taken.
#[derive(Debug)]
pub(crate) struct Entered<'a, B> {
    pub(crate) region: &'a Region<B>,
    _inside: RwLockReadGuard<'a, ()>,
}

impl<B> Region<B> {
    pub(crate) fn new(id: RegionId, backing: B, source: Option<Box<dyn DirtySource>>) -> Region<B> {
        Region {
            id,
            backing,
            source,
            exiting: AtomicBool::new(false),
            lock: RwLock::new(()),
            pins: Pins::new(),
            stats: Mutex::new(RegionStats::default()),
            vmas: OnceLock::new(),
        }
    }

    pub(crate) fn id(&self) -> RegionId {
        self.id
    }

    /// The memory itself. Whoever is not on the exit path comes here by [`Region::enter`].
    pub(crate) fn backing(&self) -> &B {
        &self.backing
    }

    /// Who tells what was written to, if anybody can.
    pub(crate) fn source(&self) -> Option<&dyn DirtySource> {
        self.source.as_deref()
    }

    /// Takes the region lock for reading, THEN tests the flag. The other way round the region
    /// could pass its lock pass in between, and its memory would be touched after that.
    pub(crate) fn enter(&self) -> Option<Entered<'_, B>> {
        let inside = sync::read(&self.lock);
        let may_enter = !self.is_exiting() || mutant::is(Mutant::EnteredUntested);
        may_enter.then_some(Entered {
            region: self,
            _inside: inside,
        })
    }

    /// Whether the region is being torn down; once true, for ever true.
    pub(crate) fn is_exiting(&self) -> bool {
        self.exiting.load(Ordering::Acquire)
    }

    /// Publishes that the region is being torn down. True for the one caller who did it.
    pub(crate) fn set_exiting(&self) -> bool {
        !self.exiting.swap(true, Ordering::AcqRel)
    }

    /// The lock pass: returns when everybody who did not see the flag has left.
    pub(crate) fn lock_pass(&self) {
        drop(sync::write(&self.lock));
    }
}

impl<B> Entered<'_, B> {
    pub(crate) fn backing(&self) -> &B {
        &self.region.backing
    }

    /// To be asked before each item of a long loop, so that an exit waits for one item at most.
    pub(crate) fn is_exiting(&self) -> bool {
        self.region.is_exiting()
    }
}
