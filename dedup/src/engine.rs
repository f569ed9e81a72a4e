//! The engine as its users see it: one merge domain's memory, and the handles of its regions.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::backing::Backing;
use crate::backing::linux::{LinuxMemory, LinuxPool, Userfaultfd};
use crate::backing::mapping::Mapping;
use crate::backing::process_memory::ProcessMemory;
use crate::base::budget::{MemoryGauge, UNMERGE_PATIENCE};
use crate::base::pace::Pace;
use crate::base::stats::{RegionStats, Stats};
use crate::base::sync;
use crate::base::vmas::{VmaAccount, Vmas, process_limit};
use crate::merge::domain::Scanner;
use crate::merge::pin::Pin;
use crate::pages::dirty::DirtySource;
use crate::pages::pins::AccessError;
use crate::pages::region::{RegionId, RegionRef};
use crate::protocol::control::{Control, Run};
use crate::protocol::core::{ExitPath, Shared};
use crate::protocol::merge_now::{MergeNowError, MergedNow};
use crate::protocol::worker::Worker;

/// How an engine starts out.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Whether it merges.
    pub run: Run,
    /// How fast.
    pub pace: Pace,
    /// VMAs that all regions together may take; `None` for seven eighths of `vm.max_map_count`, which
    /// all engines of the process share in any case.
    pub vma_budget: Option<u32>,
    /// Of a huge page's 512 pages, how many must be worth merging before it is split for them;
    /// `None` for half of it. 1 splits for any page, as kernel KSM does; 513 never.
    pub huge_page_shared_pages_min: Option<u32>,
    /// Memory that the domain may take; `None` for no budget of its own.
    pub memory_budget_bytes: Option<u64>,
}

/// Why the engine could not do what it was asked.
#[derive(Debug, Error)]
pub enum EngineError {
    /// The kernel lacks userfaultfd write protection, or denies it.
    #[error(
        "userfaultfd with write protection is not available (Linux 6.4 and access to /dev/userfaultfd are needed): {0}"
    )]
    Userfaultfd(io::Error),
    /// No pool.
    #[error("cannot create the pool of stable pages: {0}")]
    Pool(io::Error),
    /// No worker.
    #[error("cannot start the dedup worker thread: {0}")]
    Worker(io::Error),
    /// A region was not taken on.
    #[error("cannot register memory for merging: {0}")]
    Register(io::Error),
    /// Private copies could not be had; `run` is `stop` now, what is merged is accounted for.
    #[error("cannot unmerge, run is now stop: {0}")]
    Unmerge(io::Error),
    /// There is not the memory for private copies; `run` is `stop` now, as above.
    #[error("cannot unmerge, run is now stop: {0}")]
    UnmergeNoMemory(io::Error),
    /// Another order came while pages were unmerged, and counts now.
    #[error("the unmerge was superseded by another order")]
    UnmergeSuperseded,
}

impl EngineError {
    fn of_unmerge(error: io::Error) -> EngineError {
        match error.kind() {
            io::ErrorKind::OutOfMemory => EngineError::UnmergeNoMemory(error),
            io::ErrorKind::Interrupted => EngineError::UnmergeSuperseded,
            _ => EngineError::Unmerge(error),
        }
    }
}

/// One merge domain's engine. Dropping it ends the worker; regions that are still registered
/// keep their memory as it is until their handles go.
#[derive(Debug)]
pub struct Engine {
    // Before `shared`, so that the thread has ended when the last of the memory goes.
    _worker: Worker<Scanner<LinuxMemory>>,
    shared: Arc<Shared<Scanner<LinuxMemory>>>,
    userfaultfd: Arc<Userfaultfd>,
    memory: Arc<ProcessMemory>,
}

impl Engine {
    /// Starts an engine and its worker.
    ///
    /// # Errors
    /// [`EngineError`] when the kernel lacks what it needs.
    pub fn new(settings: &Settings) -> Result<Engine, EngineError> {
        let userfaultfd = Arc::new(Userfaultfd::open().map_err(EngineError::Userfaultfd)?);
        let pool = LinuxPool::new().map_err(EngineError::Pool)?;
        let vma_budget = settings.vma_budget.unwrap_or_else(process_limit);
        let control = Control::new(settings.run, settings.pace);
        let memory = Arc::new(ProcessMemory::open(&pool).map_err(EngineError::Pool)?);
        let mut scanner = Scanner::new(pool, vma_budget);
        scanner.vmas = Vmas::new(vma_budget, VmaAccount::of_process());
        if let Some(pages) = settings.huge_page_shared_pages_min {
            scanner.huge_page_shared_pages_min = pages;
        }
        let shared = Arc::new(Shared::new(scanner, control));
        shared.budget.set_gauge(memory.clone());
        shared.budget.set_bytes(settings.memory_budget_bytes);
        let worker = Worker::spawn(&shared).map_err(EngineError::Worker)?;
        Ok(Engine {
            _worker: worker,
            shared,
            userfaultfd,
            memory,
        })
    }

    /// Takes memory on for merging. It may be in use already.
    ///
    /// # Errors
    /// [`EngineError::Register`] when the kernel refuses to watch the range; the mapping is gone then.
    pub fn register(&self, mapping: Mapping) -> Result<RegionHandle, EngineError> {
        self.register_with(mapping, None)
    }

    /// As [`Engine::register`], with somebody who can tell what was written to: pages are then
    /// read once they are calm, instead of in each pass.
    ///
    /// # Errors
    /// As [`Engine::register`].
    pub fn register_watched(
        &self,
        mapping: Mapping,
        source: Box<dyn DirtySource>,
    ) -> Result<RegionHandle, EngineError> {
        self.register_with(mapping, Some(source))
    }

    fn register_with(
        &self,
        mapping: Mapping,
        source: Option<Box<dyn DirtySource>>,
    ) -> Result<RegionHandle, EngineError> {
        let memory = LinuxMemory::new(mapping, Arc::clone(&self.userfaultfd))
            .map_err(EngineError::Register)?;
        let region = self.shared.register(memory, source);
        Ok(RegionHandle {
            shared: Arc::clone(&self.shared),
            region,
        })
    }

    /// Starts or stops merging, or stops and unmerges everything. Setting `Stop` or `Merge` again
    /// does nothing. `Stop` returns when the window in hand is done, after which nothing is merged.
    /// `Unmerge` returns when no page is merged any more, also when another caller's was still at
    /// it.
    ///
    /// # Errors
    /// [`EngineError::Unmerge`] and [`EngineError::UnmergeNoMemory`] when private copies can't be had;
    /// `run` is `Stop` then, unless somebody has set it anew. [`EngineError::UnmergeSuperseded`] when
    /// somebody did so meanwhile.
    pub fn set_run(&self, run: Run) -> Result<(), EngineError> {
        self.shared.set_run(run).map_err(EngineError::of_unmerge)
    }

    /// Whether the engine merges.
    pub fn run(&self) -> Run {
        sync::lock(&self.shared.control).run
    }

    /// How fast the worker scans.
    pub fn pace(&self) -> Pace {
        sync::lock(&self.shared.control).pace
    }

    /// Changes how fast the worker scans, from the next batch on. What [`Pace::validate`] refuses
    /// is taken as the nearest that it would not.
    pub fn set_pace(&self, pace: Pace) {
        sync::lock(&self.shared.control).set_pace(pace);
        self.shared.kick();
    }

    /// Counters of the domain as of the last batch.
    pub fn stats(&self) -> Stats {
        Stats {
            mmap_write_locks: self.userfaultfd.mmap_write_locks(),
            ..self.shared.stats()
        }
    }

    /// Changes the memory that the domain may take; `None` for no budget. Nothing is taken away by
    /// a lower one: merging and unmerging keep to it from now on, and whoever made the engine sees
    /// to the guests.
    pub fn set_memory_budget(&self, budget_bytes: Option<u64>) {
        self.shared.budget.set_bytes(budget_bytes);
    }

    /// The memory that the domain may take; `None` for no budget. Waits for nobody.
    pub fn memory_budget_bytes(&self) -> Option<u64> {
        self.shared.budget.bytes()
    }

    /// Asks `gauge` how much memory is left, from now on. Until then the budget is held against
    /// all that the process has.
    pub fn set_memory_gauge(&self, gauge: Arc<dyn MemoryGauge>) {
        self.shared.budget.set_gauge(gauge);
    }

    /// What the process and the pool hold.
    pub fn process_memory(&self) -> Arc<ProcessMemory> {
        Arc::clone(&self.memory)
    }

    /// Changes how long an unmerge waits for memory before it fails; `None` for half a second.
    pub fn set_unmerge_patience(&self, patience: Option<Duration>) {
        let patience = patience.unwrap_or(UNMERGE_PATIENCE);
        self.shared.budget.set_patience(patience);
    }

    /// Memory that an unmerge waits for; 0 when none does. Waits for nobody.
    pub fn memory_waited_for_bytes(&self) -> u64 {
        self.shared.budget.waiting_bytes()
    }

    /// Tells that memory was given back, to an unmerge that may be waiting for it.
    pub fn memory_given_back(&self) {
        self.shared.budget.wake();
    }

    /// Has the worker make no pauses while there is something to merge, or make them again. False,
    /// and nothing is changed, if the worker's orders are just in use. Waits for nobody: memory is
    /// short, and whoever holds the orders may be off the CPU for as long as guests are busy.
    pub fn try_set_hurry(&self, hurry: bool) -> bool {
        self.shared.try_set_hurry(hurry)
    }

    /// Waits until all memory was scanned `more` times from its beginning. The worker does not
    /// pause while somebody waits. False if the deadline came first, or the engine does not merge.
    pub fn wait_full_scans(&self, more: u64, deadline: Instant) -> bool {
        self.shared.wait_full_scans(more, deadline)
    }
}

/// A registered region, held by the VM whose memory it is.
#[derive(Debug)]
pub struct RegionHandle {
    shared: Arc<Shared<Scanner<LinuxMemory>>>,
    region: RegionRef<LinuxMemory>,
}

impl RegionHandle {
    /// The region's name.
    pub fn id(&self) -> RegionId {
        self.region.id()
    }

    /// The region's memory.
    pub fn mapping(&self) -> &Mapping {
        self.region.backing().mapping()
    }

    /// Counters of the region as of its last visit.
    pub fn stats(&self) -> RegionStats {
        *sync::lock(&self.region.stats)
    }

    /// As [`RegionAccess::merge_now`].
    ///
    /// # Errors
    /// [`MergeNowError`].
    pub fn merge_now(&self) -> Result<MergedNow, MergeNowError> {
        self.access().merge_now()
    }

    /// The region for those who do not hold on to the handle.
    pub fn access(&self) -> RegionAccess {
        RegionAccess {
            shared: Arc::clone(&self.shared),
            region: RegionRef::clone(&self.region),
        }
    }

    /// Gives the region's memory back and takes it off the engine. vCPUs and devices of the VM
    /// have stopped, and nobody else uses the mapping. Waits for one window at most.
    pub fn exit(self) -> ExitPath {
        self.shared.exit(&self.region)
    }
}

/// One region, for its devices and for a merge on demand. The region may leave meanwhile; its
/// addresses stay reserved as long as this or a pin is there.
#[derive(Clone, Debug)]
pub struct RegionAccess {
    shared: Arc<Shared<Scanner<LinuxMemory>>>,
    region: RegionRef<LinuxMemory>,
}

impl RegionAccess {
    /// Scans the region at once, on the caller's thread, and returns when all of it that has an
    /// equal somewhere is merged. Calm intervals and back-off are not waited for: what is written
    /// to during the scan is left to the worker. An exit waits for one window of it at most.
    ///
    /// # Errors
    /// [`MergeNowError`] if the region is leaving or the engine is told not to merge. What was
    /// merged by then stays merged.
    pub fn merge_now(&self) -> Result<MergedNow, MergeNowError> {
        self.shared.merge_now(&self.region)
    }

    /// Gives up pages, as a balloon or free page reporting does: they show zeros afterwards and take no
    /// memory until they are written to. `MADV_DONTNEED` would show what the pool holds there. Who
    /// writes to them meanwhile finds either. Returns how many were given up. It goes by blocks of 512
    /// pages: those of a block that has a pinned one among them are left as they are, as are those that
    /// would take more VMAs than there are.
    ///
    /// Waits for the batch in hand, and for an unmerge, which may wait for memory. So nobody calls it
    /// whom the end of a VM waits for, such as an event loop. The worker, an unmerge and an exit wait
    /// for one block.
    ///
    /// # Errors
    /// [`AccessError`]; blocks before the one that was refused are given up.
    pub fn discard(&self, pages: Range<u32>) -> Result<u32, AccessError> {
        AccessError::check(&pages, self.region.backing().pages())?;
        self.shared.discard(&self.region, &pages)
    }

    /// Keeps pages from being replaced, until the guard is dropped: for I/O that uses their frames,
    /// which neither write protection nor a new page at the same address stops. Each page gets memory
    /// of its own first, as by a write. Waits for one group of pages at most, and only if that
    /// overlaps.
    ///
    /// Pinned pages are not merged, so a pin is for the time of one I/O. A [`DirtySource`] has to name
    /// them after the I/O, also if it failed, and before they are unpinned.
    ///
    /// # Errors
    /// [`AccessError`]; nothing is pinned then.
    pub fn pin(&self, pages: Range<u32>) -> Result<PinnedPages, AccessError> {
        let pin = Pin::new(&self.region, pages)?;
        Ok(PinnedPages { _pin: pin })
    }
}

/// Pages that the engine does not replace; unpinned on drop.
#[derive(Debug)]
pub struct PinnedPages {
    _pin: Pin<LinuxMemory>,
}

impl Drop for RegionHandle {
    fn drop(&mut self) {
        self.shared.exit(&self.region);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::budget::Shortage;

    #[test]
    fn an_unmerge_that_fails_says_whether_it_lacked_memory_or_was_superseded() {
        let starved = Shortage::Starved { missing_bytes: 7 };
        let error = EngineError::of_unmerge(starved.into());
        assert!(matches!(error, EngineError::UnmergeNoMemory(_)), "{error}");
        let error = EngineError::of_unmerge(Shortage::Cancelled.into());
        assert!(matches!(error, EngineError::UnmergeSuperseded), "{error}");
        let refused = io::Error::from_raw_os_error(libc::ENOMEM);
        let error = EngineError::of_unmerge(refused);
        assert!(matches!(error, EngineError::UnmergeNoMemory(_)), "{error}");
        let error = EngineError::of_unmerge(io::Error::from_raw_os_error(libc::EFAULT));
        assert!(matches!(error, EngineError::Unmerge(_)), "{error}");
    }
}
