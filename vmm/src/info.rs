//! What a VM tells about itself.

use serde::{Deserialize, Serialize};

use crate::config::MergeMode;
use crate::guard::gauge::Limit;
use crate::id::{MergeDomain, VmId};
use crate::state::VmState;

/// One VM at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmInfo {
    /// Its name.
    pub id: VmId,
    /// Where it is in its life.
    pub state: VmState,
    /// The domain its configuration names.
    pub merge_domain: Option<MergeDomain>,
    /// Who merges its memory.
    pub merge: MergeMode,
    /// Guest memory in bytes.
    pub mem_size_bytes: u64,
    /// Number of vCPUs.
    pub vcpu_count: u8,
    /// Which VM goes first when memory runs out: the lowest.
    pub oom_priority: i32,
    /// What the guest reported by the report port; `None` until it reported anything.
    pub report: Option<GuestReport>,
}

/// Counters of the pageload guest, as last committed by it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestReport {
    /// 1 filling, 2 filled and verifying, 3 finished well, 4 failed.
    pub phase: u64,
    /// Passes over all pages so far.
    pub verify_passes: u64,
    /// Pages found with wrong contents.
    pub verify_errors: u64,
    /// Pages written so far.
    pub pages_written: u64,
    /// Index of the first wrong page, if any.
    pub first_bad_page: Option<u64>,
    /// The last exception vector the guest took, if any.
    pub exception_vector: Option<u64>,
    /// Pages verified so far, over all passes.
    pub verified_pages: u64,
    /// How long single writes took; `None` if the guest times none.
    pub probe: Option<WriteProbe>,
}

/// What a pageload guest measured of its writes in one window. Each is one word, timed by the
/// guest's time-stamp counter, also while its vCPU waits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WriteProbe {
    /// Number of the window: bytes of input that the guest has taken. Each begins a new one.
    pub window: u64,
    /// Writes to pages whose content other guests share: merged ones, where the engine got there.
    pub shared: WriteLatency,
    /// Beside each of them, one to a page that the guest wrote to the moment before.
    pub control: WriteLatency,
    /// Beside each of them, one exit to the monitor and back. It takes about as long as a page fault
    /// of the host, so the vCPU loses its CPU in it about as often.
    pub exit: WriteLatency,
}

/// How long the writes, or exits, of one kind took. A quantile is at most 3.2 % above the exact one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WriteLatency {
    /// How many were timed.
    pub count: u64,
    /// Half of them took at most this many nanoseconds.
    pub p50_ns: u64,
    /// 99 % of them did.
    pub p99_ns: u64,
    /// 99.9 % of them did.
    pub p99_9_ns: u64,
    /// The longest.
    pub max_ns: u64,
}

/// What `/proc/PID/ksm_stat` tells of this process, by its names. `None` for what the kernel does not
/// tell.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KsmProcess {
    /// Pages that kernel KSM keeps a record of, merged or not.
    #[serde(rename = "ksm_rmap_items")]
    pub rmap_items: Option<u64>,
    /// Pages of zeros that it replaced by the kernel's zero page.
    #[serde(rename = "ksm_zero_pages")]
    pub zero_pages: Option<u64>,
    /// Pages that it mapped to a page of its own.
    #[serde(rename = "ksm_merging_pages")]
    pub merging_pages: Option<u64>,
    /// Those two in bytes, less its records. Not memory saved: the first user of a shared page
    /// counts as well.
    #[serde(rename = "ksm_process_profit")]
    pub profit_bytes: Option<i64>,
    /// Whether all memory of the process is merged (`PR_SET_MEMORY_MERGE`), which Samepage never
    /// asks for.
    #[serde(rename = "ksm_merge_any")]
    pub merge_any: Option<bool>,
    /// Whether any memory of the process is.
    #[serde(rename = "ksm_mergeable")]
    pub mergeable: Option<bool>,
}

/// The memory of a merge domain at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct MemoryInfo {
    /// What the domain may take, as it was set; `None` for no budget of its own.
    pub budget_bytes: Option<u64>,
    /// The nearest limit, be it the budget or a cgroup's; `None` where nothing limits.
    pub limit_bytes: Option<u64>,
    /// Which of the two that is.
    pub limited_by: Option<Limit>,
    /// In use, counted as that limit counts; without one, what the process and the pool hold.
    pub use_bytes: u64,
    /// What is left until the limit; `None` where nothing limits.
    pub headroom_bytes: Option<u64>,
    /// Use if every shared page were written to now, as far as the worker knows. With VMs that
    /// kernel KSM merges it is that at most: the kernel counts for all domains of the process.
    pub worst_case_bytes: u64,
    /// Share of the last 10 s in percent that some task of the cgroup, or else of the host, waited
    /// for memory (PSI).
    pub pressure_percent: f64,
    /// What the started VMs may come to hold.
    pub nominal_bytes: u64,
    /// How many times the limit may be promised to VMs; `None` for as often as one likes.
    pub overcommit_ratio: Option<f64>,
    /// Whether VMs are ended so that an unmerge fits.
    pub unmerge_victims: bool,
    /// What the last unmerge lacked; `None` unless that was refused, or given up, for want of memory.
    pub unmerge_missing_bytes: Option<u64>,
    /// VMs that the guard ended.
    pub oom_victims: u64,
}
