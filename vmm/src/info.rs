//! What a VM tells about itself.

use serde::{Deserialize, Serialize};

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
    /// Whether its memory is merged.
    pub merge: bool,
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
}
