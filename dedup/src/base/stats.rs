//! Counters, with the names and the meaning that KSM gives them (`Documentation/admin-guide/mm/ksm.rst`).

use serde::{Deserialize, Serialize};

use crate::base::page::PAGE_SIZE_BYTES;

/// What a VMA costs the kernel: one `vm_area_struct` of slab and its share of the maple tree,
/// measured on 6.18.
pub(crate) const VMA_BYTES: u64 = 220;

/// Counters of a whole domain. Guest writes to shared pages are noticed at the next visit, so the
/// figures are exact once a pass has gone by without writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Stable pages in use: distinct contents that are shared.
    pub pages_shared: u64,
    /// Guest pages mapped to a stable page beyond the first of each: how many pages are saved.
    pub pages_sharing: u64,
    /// Calm pages whose content was found nowhere else.
    pub pages_unshared: u64,
    /// Pages that changed between visits, or were visited only once.
    pub pages_volatile: u64,
    /// Pages that held only zeros, were given back and have not been written to since
    /// (`ksm_zero_pages`).
    pub pages_zero: u64,
    /// Page visits since the engine was made.
    pub pages_scanned: u64,
    /// Page visits put off because the page keeps changing, since the engine was made.
    pub pages_skipped: u64,
    /// Pages that their owners gave up, since the engine was made.
    #[serde(default)]
    pub pages_discarded: u64,
    /// Times that every registered region was scanned; 0 again after an unmerge.
    pub full_scans: u64,
    /// Calm pages that are equal to others and were not merged for want of VMAs. Each is tried again
    /// once it has changed, or there are plenty of VMAs.
    pub pages_over_vma_budget: u64,
    /// System calls of the engine that took the lock on the process's address space for writing:
    /// mapping calls and registrations. Guests' page faults wait for those.
    #[serde(default)]
    pub mmap_write_locks: u64,
    /// CPU time that the worker has taken, in microseconds.
    pub worker_cpu_us: u64,
    /// Registered regions, those still to be finished by the worker included.
    pub slots: u64,
    /// VMAs that registered regions take at most.
    pub vmas: u64,
    /// How many VMAs they may take.
    pub vma_budget: u64,
    /// Memory that the stable pages take.
    pub pool_bytes: u64,
    /// Memory that the engine's own bookkeeping takes.
    pub metadata_bytes: u64,
    /// Bytes given back, net of pool, VMAs and metadata (KSM's `general_profit`); may be negative.
    pub saved_bytes: i64,
}

/// Counters of one region.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionStats {
    /// Pages that the engine follows: volatile, unshared, merging or zero.
    pub items: u64,
    /// Pages mapped to a stable page (`ksm_merging_pages`).
    pub pages_merging: u64,
    /// Pages given back because they held only zeros (`ksm_zero_pages`).
    pub pages_zero: u64,
    /// Calm pages whose content was found nowhere else.
    pub pages_unshared: u64,
    /// Pages that changed between visits, or were visited only once.
    pub pages_volatile: u64,
    /// VMAs that the region takes at most.
    pub vmas: u64,
    /// Bytes this region no longer holds for itself, net of its VMAs and metadata
    /// (`ksm_process_profit`); the pool is counted in [`Stats::saved_bytes`] alone.
    pub profit_bytes: i64,
}

/// Bytes of `pages` pages less what `vmas` extra VMAs and `metadata_bytes` cost.
pub(crate) fn net_bytes(pages: i64, vmas: u64, metadata_bytes: u64) -> i64 {
    let page_bytes = i64::try_from(PAGE_SIZE_BYTES).unwrap_or(i64::MAX);
    let cost = i64::try_from(vmas * VMA_BYTES + metadata_bytes).unwrap_or(i64::MAX);
    pages.saturating_mul(page_bytes).saturating_sub(cost)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bookkeeping_without_sharing_is_a_loss() {
        assert_eq!(net_bytes(0, 2, 1000), -1440);
        assert_eq!(net_bytes(1, 0, 96), 4000);
    }
}
