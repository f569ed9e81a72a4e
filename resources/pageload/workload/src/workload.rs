//! The parameters of a guest's work.

use core::fmt;

/// What one guest does. Format and parse it as a command line with `Display` and
/// [`Workload::parse`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Workload {
    /// Tells VMs apart: pages that are not shared are unique to it.
    pub seed: u64,
    /// Percentage of the pages, hot ones left out, whose content other VMs have too.
    pub shared: u8,
    /// Percentage of zero pages.
    pub zero: u8,
    /// Percentage of pages that no other page equals.
    pub private: u8,
    /// Pages, at the end of memory, that are unique and meant to be rewritten.
    pub hot_pages: u64,
    /// How the shared contents are laid out in comparison with other VMs.
    pub layout: Layout,
    /// Which pages are rewritten while the guest verifies.
    pub write: WriteMode,
    /// When that begins.
    pub begin: Begin,
    /// Pages written in each pass over memory (0 = none).
    pub writes_per_pass: u64,
    /// Passes until the guest shuts down; 0 = it never does.
    pub passes: u64,
    /// Pause in milliseconds that a pass is stretched by, spread over its slices; 0 = full speed.
    pub pace_ms: u64,
    /// Least time in microseconds between two timed writes to pages with shared content; 0 = none is
    /// timed. Writes come by this clock then, and `writes_per_pass` does not count.
    pub probe_us: u64,
}

/// Where the contents that VMs share are, seen from another VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// At the same page index in every VM.
    Same,
    /// In runs of [`RUN_PAGES`](crate::RUN_PAGES) pages; each VM has the runs in an order of its own.
    Runs,
    /// Every VM has the single pages in an order of its own.
    Shuffled,
}

/// Which pages a guest rewrites while it verifies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriteMode {
    /// None: what was filled stays.
    None,
    /// The hot pages, in turn, with a new version each time.
    Hot,
    /// Pages with shared content: rewritten with content of their own, and half a round later given
    /// the shared content again, so that they can be merged and broken over and over.
    Merged,
    /// Pages with shared content, in turn: rewritten with content of their own, a new version each
    /// time, and never given the shared content back.
    Broken,
    /// Pages with shared content, in turn: all get a content of their own, then all get the shared
    /// one back, and then nothing is written any more. So a fleet diverges and converges once.
    Wave,
}

/// When a guest begins to rewrite pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begin {
    /// As soon as memory is filled.
    Filled,
    /// When a byte arrives on the first serial port.
    Input,
}

impl Default for Workload {
    /// A fleet's usual mix, at a pace that costs about one percent of a core for each 64 MiB.
    fn default() -> Workload {
        Workload {
            seed: 0,
            shared: 70,
            zero: 10,
            private: 20,
            hot_pages: 64,
            layout: Layout::Runs,
            write: WriteMode::Hot,
            begin: Begin::Filled,
            writes_per_pass: 64,
            passes: 0,
            pace_ms: 1000,
            probe_us: 0,
        }
    }
}

impl Workload {
    /// Rewrites merged pages without a pause, and gives them back their shared content.
    #[must_use]
    pub fn writer(seed: u64) -> Workload {
        Workload {
            seed,
            write: WriteMode::Merged,
            writes_per_pass: 256,
            pace_ms: 0,
            ..Workload::default()
        }
    }

    /// Waits for a byte of input, and then writes to all shared pages as fast as it can.
    #[must_use]
    pub fn breaker(seed: u64) -> Workload {
        Workload {
            seed,
            write: WriteMode::Broken,
            begin: Begin::Input,
            writes_per_pass: u64::MAX,
            ..Workload::default()
        }
    }

    /// Waits for a byte of input, and then times a write to a shared page every `probe_us`
    /// microseconds, while it verifies at its pace.
    #[must_use]
    pub fn prober(seed: u64, probe_us: u64) -> Workload {
        Workload {
            seed,
            write: WriteMode::Merged,
            begin: Begin::Input,
            probe_us,
            ..Workload::default()
        }
    }

    /// Keeps its vCPU busy for ever: verifies pages of its own without a pause, and never writes.
    #[must_use]
    pub fn busy(seed: u64) -> Workload {
        Workload {
            shared: 0,
            zero: 0,
            private: 100,
            hot_pages: 0,
            pace_ms: 0,
            ..Workload::quiet(seed)
        }
    }

    /// Fills and verifies, and never writes again: the counters of [`expect`](crate::expect) are exact.
    #[must_use]
    pub fn quiet(seed: u64) -> Workload {
        Workload {
            seed,
            write: WriteMode::None,
            writes_per_pass: 0,
            ..Workload::default()
        }
    }

    /// Checks the limits.
    ///
    /// # Errors
    /// The percentages do not add up to 100, or writes are to be timed and there are none.
    pub fn validate(&self) -> Result<(), WorkloadError> {
        let sum = u16::from(self.shared) + u16::from(self.zero) + u16::from(self.private);
        if sum != 100 {
            return Err(WorkloadError::PercentSum(sum));
        }
        if self.probe_us > 0 && (self.write != WriteMode::Merged || self.shared == 0) {
            return Err(WorkloadError::NothingToProbe(self.probe_us));
        }
        Ok(())
    }
}

/// Parameters that do not go together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WorkloadError {
    /// `shared`, `zero` and `private` add up to this and not to 100.
    PercentSum(u16),
    /// `probe_us` is this, and no page with shared content is ever written.
    NothingToProbe(u64),
}

impl fmt::Display for WorkloadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WorkloadError::PercentSum(sum) => {
                write!(f, "shared + zero + private: {sum} percent, must be 100")
            }
            WorkloadError::NothingToProbe(us) => {
                write!(f, "probe_us: {us} needs write=merged and shared above 0")
            }
        }
    }
}

impl core::error::Error for WorkloadError {}
