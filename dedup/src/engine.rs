//! The engine as its users see it: one merge domain's memory, and the handles of its regions.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use thiserror::Error;

use crate::backing::linux::{LinuxMemory, LinuxPool, Userfaultfd};
use crate::control::{Control, Pace, Run};
use crate::dirty::DirtySource;
use crate::mapping::Mapping;
use crate::region::{RegionId, RegionRef};
use crate::scanner::Scanner;
use crate::shared::{ExitPath, Shared};
use crate::stats::{RegionStats, Stats};
use crate::sync;
use crate::worker::Worker;

/// VMAs that a process may have where the kernel does not say (`DEFAULT_MAX_MAP_COUNT`).
const MAX_MAP_COUNT_DEFAULT: u32 = 65530;

/// How an engine starts out.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Whether it merges.
    pub run: Run,
    /// How fast.
    pub pace: Pace,
    /// VMAs that all regions together may take; `None` for seven eighths of `vm.max_map_count`.
    pub vma_budget: Option<u32>,
    /// Of a huge page's 512 pages, how many must be worth merging before it is split for them;
    /// `None` for half of it. 1 splits for any page, as kernel KSM does; 513 never.
    pub huge_page_shared_pages_min: Option<u32>,
}

/// Why the engine could not do what it was asked.
#[derive(Debug, Error)]
pub enum EngineError {
    /// The kernel lacks userfaultfd write protection, or denies it.
    #[error(
        "userfaultfd with write protection is not available (Linux 5.19 and access to /dev/userfaultfd are needed): {0}"
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
}

/// One merge domain's engine. Dropping it ends the worker; regions that are still registered
/// keep their memory as it is until their handles go.
#[derive(Debug)]
pub struct Engine {
    // Before `shared`, so that the thread has ended when the last of the memory goes.
    _worker: Worker<Scanner<LinuxMemory>>,
    shared: Arc<Shared<Scanner<LinuxMemory>>>,
    userfaultfd: Arc<Userfaultfd>,
}

impl Engine {
    /// Starts an engine and its worker.
    ///
    /// # Errors
    /// [`EngineError`] when the kernel lacks what it needs.
    pub fn new(settings: &Settings) -> Result<Engine, EngineError> {
        let userfaultfd = Arc::new(Userfaultfd::open().map_err(EngineError::Userfaultfd)?);
        let pool = LinuxPool::new().map_err(EngineError::Pool)?;
        let vma_budget = settings.vma_budget.unwrap_or_else(default_vma_budget);
        let control = Control::new(settings.run, settings.pace);
        let mut scanner = Scanner::new(pool, vma_budget);
        if let Some(pages) = settings.huge_page_shared_pages_min {
            scanner.huge_page_shared_pages_min = pages;
        }
        let shared = Arc::new(Shared::new(scanner, control));
        let worker = Worker::spawn(&shared).map_err(EngineError::Worker)?;
        Ok(Engine {
            _worker: worker,
            shared,
            userfaultfd,
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
    /// [`EngineError::Unmerge`] when private copies can't be had; `run` is `Stop` then, unless
    /// somebody has set it anew.
    pub fn set_run(&self, run: Run) -> Result<(), EngineError> {
        self.shared.set_run(run).map_err(EngineError::Unmerge)
    }

    /// Whether the engine merges.
    pub fn run(&self) -> Run {
        sync::lock(&self.shared.control).run
    }

    /// How fast the worker scans.
    pub fn pace(&self) -> Pace {
        sync::lock(&self.shared.control).pace
    }

    /// Changes how fast the worker scans, from the next batch on.
    pub fn set_pace(&self, pace: Pace) {
        sync::lock(&self.shared.control).pace = pace;
        self.shared.kick();
    }

    /// Counters of the domain as of the last batch.
    pub fn stats(&self) -> Stats {
        self.shared.stats()
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

    /// Gives the region's memory back and takes it off the engine. vCPUs and devices of the VM
    /// have stopped, and nobody else uses the mapping. Waits for one window at most.
    pub fn exit(self) -> ExitPath {
        self.shared.exit(&self.region)
    }
}

impl Drop for RegionHandle {
    fn drop(&mut self) {
        self.shared.exit(&self.region);
    }
}

fn default_vma_budget() -> u32 {
    let max_map_count = std::fs::read_to_string("/proc/sys/vm/max_map_count")
        .ok()
        .and_then(|text| text.trim().parse::<u32>().ok())
        .unwrap_or(MAX_MAP_COUNT_DEFAULT);
    max_map_count - max_map_count / 8
}
