//! What a run of the benchmark is, and what it found: the JSON file, and all that tables and plots
//! are made from.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Everything that one call of the benchmark found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The command line that repeats it.
    pub command: String,
    /// Commit of the sources, with `-dirty` where they differ from it.
    pub commit: String,
    /// When it began: RFC 3339, UTC.
    pub date: String,
    /// The machine.
    pub host: Host,
    /// The runs, in the order in which they were made.
    pub runs: Vec<Run>,
}

/// The machine of a report.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Host {
    /// Release of the kernel.
    pub kernel: String,
    /// Name of the CPU.
    pub cpu: String,
    /// Number of CPUs.
    pub cpus: usize,
    /// Memory in all.
    pub memory_bytes: u64,
    /// What one CPU reads of memory that is in no cache, in a second.
    pub memory_read_bytes_per_s: f64,
    /// What first touches of base pages by one CPU take each, in microseconds.
    pub first_touch_us: f64,
}

/// What guests do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Workload {
    /// Linux guests of one image that boot to their shell.
    Idle,
    /// Debian guests that run one Python program, each with its own seed.
    Agents,
    /// Half of the guests as in `Idle`, half as in `Agents`, alternating.
    TwoImages,
    /// A launch every second or two; each guest lives for half a minute.
    Burst,
    /// Pageload guests that load the same data, diverge, and converge.
    Phase,
    /// Pageload guests until the limit; then all write to what they share.
    Storm,
    /// One pageload guest that times its writes, beside guests that keep all CPUs busy.
    Latency,
}

/// Who merges.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Engine {
    /// Nobody.
    Off,
    /// Kernel KSM at its defaults: 100 pages, then 20 ms.
    KsmDefaults,
    /// Kernel KSM with 5,000 pages, 20 ms and zero pages.
    KsmFast,
    /// Kernel KSM with its scan-time advisor.
    KsmAdvisor,
    /// Samepage's own engine.
    Samepage,
}

/// The host's `transparent_hugepage/enabled`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Thp {
    /// Only memory that asks for huge pages gets them.
    Madvise,
    /// All memory gets them.
    Always,
}

/// How many guests a run launches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fleet {
    /// So many.
    Vms(usize),
    /// Until one is refused or ended, or no more than this.
    UntilFull(usize),
}

/// What one run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Arm {
    /// What its guests do.
    pub workload: Workload,
    /// Who merges.
    pub engine: Engine,
    /// The host's huge pages.
    pub thp: Thp,
    /// How many guests.
    pub fleet: Fleet,
    /// Limit of the memory cgroup that the server is in.
    pub memory_limit_bytes: u64,
}

/// One arm, carried out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// What it was.
    pub arm: Arm,
    /// Every host setting that it depends on, by path, as it was during the run.
    pub settings: Vec<(String, String)>,
    /// The guests in the order of their launches.
    pub guests: Vec<Guest>,
    /// Looks at memory and CPU, about one a second.
    pub samples: Vec<Sample>,
    /// Moments that the workload names, such as `last guest ready`, `at rest`, `end`.
    pub marks: Vec<Mark>,
    /// Most that the cgroup ever held.
    pub peak_bytes: u64,
    /// Processes that the kernel's OOM killer ended in the cgroup.
    pub oom_kills: u64,
    /// Figures of the write-latency probe, for [`Workload::Latency`].
    pub latency: Option<Latency>,
    /// What an ideal engine would find in the guests' memory at the end.
    pub oracle: Option<Oracle>,
    /// Time on the mmap lock, where the host's tracepoints can tell.
    pub mmap_lock: Option<MmapLock>,
    /// What went wrong in guests or harness; empty in a good run.
    pub errors: Vec<String>,
}

/// One guest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Guest {
    /// Its id.
    pub id: String,
    /// Seconds since the run's begin at which its launch was asked for.
    pub asked_at_s: f64,
    /// How long the REST calls that launched it took together; none if it was refused.
    pub launch_s: Option<f64>,
    /// Why it was refused.
    pub refusal: Option<String>,
    /// Seconds since the run's begin at which it was ready for work.
    pub ready_at_s: Option<f64>,
    /// Seconds since the run's begin at which it ended, and why, unless it lived to the run's end.
    pub ended: Option<(f64, String)>,
    /// Rounds of work that it had done when the run ended: Python rounds, or passes over memory.
    pub rounds: u64,
}

/// A moment with a name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Mark {
    /// Seconds since the run's begin.
    pub at_s: f64,
    /// Its name.
    pub name: String,
}

/// One look at everything.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Seconds since the run's begin.
    pub at_s: f64,
    /// Memory of the cgroup.
    pub memory: Memory,
    /// The host's `MemAvailable`.
    pub mem_available_bytes: u64,
    /// Proportional set size of the server; looked at less often, as it costs the server time.
    pub pss_bytes: Option<u64>,
    /// CPU time so far.
    pub cpu: Cpu,
    /// Context switches of the server's threads so far.
    pub context_switches: u64,
    /// Mappings of the server.
    pub vmas: u64,
    /// Guests that run.
    pub guests_running: usize,
    /// Guests that are ready for work.
    pub guests_ready: usize,
    /// Rounds of work of all guests so far.
    pub rounds: u64,
    /// Pages that the engine of the arm says it gave back: sharing and zero pages.
    pub given_back_pages: u64,
    /// Pages that it keeps for them.
    pub shared_pages: u64,
}

/// What a memory cgroup holds, by kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// All of it, as the limit counts.
    pub usage_bytes: u64,
    /// Anonymous memory.
    pub anon_bytes: u64,
    /// Memory of memfds and tmpfs: the pool.
    pub shmem_bytes: u64,
    /// Page cache of files.
    pub file_bytes: u64,
    /// Memory of the kernel: page tables, VMAs, shadow pages, records.
    pub kernel_bytes: u64,
}

/// CPU time in seconds, by who took it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Cpu {
    /// Samepage's merge worker.
    pub worker_s: f64,
    /// The kernel's `ksmd`.
    pub ksmd_s: f64,
    /// The guests' vCPUs.
    pub vcpus_s: f64,
    /// All threads of the server, the first and third included.
    pub server_s: f64,
}

/// Latencies of single writes, in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Quantiles {
    /// Writes that were timed.
    pub count: u64,
    /// Half of them took at most this.
    pub p50_us: f64,
    /// 99 %.
    pub p99_us: f64,
    /// 99.9 %.
    pub p999_us: f64,
    /// The slowest.
    pub max_us: f64,
}

/// What the probe found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    /// Writes to pages that other guests have too.
    pub shared: Quantiles,
    /// Writes, at the same moments, to pages that the guest had just written to.
    pub private: Quantiles,
    /// Exits to the monitor and back, at the same moments. One takes about as long as a page fault
    /// of the host, so it shows what busy CPUs alone do to a write that faults.
    pub exit: Quantiles,
    /// vCPUs that were busy beside it.
    pub busy_vcpus: usize,
}

/// Guest memory hashed from outside.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Oracle {
    /// Guests that were read.
    pub guests: u64,
    /// Pages that have a content.
    pub touched_pages: u64,
    /// Of these, pages of zeros.
    pub zero_pages: u64,
    /// Different contents, zeros left out.
    pub unique_contents: u64,
    /// Pages whose content another guest has at the same guest page number, zeros left out.
    pub same_place_pages: u64,
    /// Pages that sharing by place gives back, where one content is kept for each page number: the
    /// one that most guests have there.
    pub saved_by_place_pages: u64,
    /// Pages whose content is elsewhere only: in another guest, or again in this one.
    pub elsewhere_pages: u64,
    /// Runs of neighbours that these make: each needs a mapping of its own where sharing is by mapping.
    pub elsewhere_runs: u64,
}

/// Time on the server's mmap lock.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct MmapLock {
    /// Times that it was asked for to write.
    pub write_locks: u64,
    /// Waits for it, in seconds over all threads.
    pub waited_s: f64,
}

impl Workload {
    /// All of them, in the order in which they are run.
    pub const ALL: [Workload; 7] = [
        Workload::Idle,
        Workload::Agents,
        Workload::TwoImages,
        Workload::Burst,
        Workload::Phase,
        Workload::Storm,
        Workload::Latency,
    ];
}

impl Engine {
    /// Whether kernel KSM merges.
    pub fn is_ksm(self) -> bool {
        matches!(
            self,
            Engine::KsmDefaults | Engine::KsmFast | Engine::KsmAdvisor
        )
    }
}

/// Names as the command line and the JSON file have them.
macro_rules! named {
    ($type:ty: $($variant:ident $name:literal),+) => {
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(match self { $(Self::$variant => $name),+ })
            }
        }
    };
}

named!(Workload: Idle "idle", Agents "agents", TwoImages "two-images", Burst "burst", Phase "phase",
    Storm "storm", Latency "latency");
named!(Engine: Off "off", KsmDefaults "ksm-defaults", KsmFast "ksm-fast", KsmAdvisor "ksm-advisor",
    Samepage "samepage");
named!(Thp: Madvise "madvise", Always "always");
