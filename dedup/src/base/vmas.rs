//! Mappings (VMAs): how many a domain's regions take, and how many all domains of the process do.
//!
//! The kernel's limit is the process's. Past it nobody's mapping succeeds: no VM starts, no thread
//! does, and an allocation that fails ends the process with everybody's VMs. So all domains share one
//! account, which leaves a reserve to the process. A mapping that is built aside comes out of that too.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};

/// VMAs that a process may have where the kernel does not say (`DEFAULT_MAX_MAP_COUNT`).
const MAX_MAP_COUNT_DEFAULT: u32 = 65530;
/// Of the process's mappings one in so many is the reserve.
const RESERVE_DIVISOR: u32 = 8;
/// Percent of a budget below which pages that were left out are tried again.
const PLENTY_PERCENT: u64 = 60;

/// Mappings that all merging in a process may take, by `vm.max_map_count`.
pub(crate) fn process_limit() -> u32 {
    let max_map_count = std::fs::read_to_string("/proc/sys/vm/max_map_count")
        .ok()
        .and_then(|text| text.trim().parse::<u32>().ok())
        .unwrap_or(MAX_MAP_COUNT_DEFAULT);
    max_map_count - max_map_count / RESERVE_DIVISOR
}

/// The mappings of several domains.
#[derive(Debug)]
pub(crate) struct VmaAccount {
    used: AtomicU64,
    limit: u64,
}

impl VmaAccount {
    pub(crate) fn new(limit: u64) -> Arc<VmaAccount> {
        let used = AtomicU64::new(0);
        Arc::new(VmaAccount { used, limit })
    }

    /// The account of this process.
    pub(crate) fn of_process() -> Arc<VmaAccount> {
        static ACCOUNT: LazyLock<Arc<VmaAccount>> =
            LazyLock::new(|| VmaAccount::new(u64::from(process_limit())));
        Arc::clone(&ACCOUNT)
    }
}

/// Mappings of a region that its domain does not know any more, until they are gone.
#[derive(Debug)]
pub(crate) struct VmaLease {
    account: Arc<VmaAccount>,
    vmas: u64,
}

impl Drop for VmaLease {
    fn drop(&mut self) {
        self.account.used.fetch_sub(self.vmas, Ordering::Relaxed);
    }
}

/// The mappings of one domain's regions.
#[derive(Debug)]
pub(crate) struct Vmas {
    used: u64,
    budget: u64,
    account: Arc<VmaAccount>,
    /// The kernel refused a mapping in this pass.
    refused: bool,
}

impl Vmas {
    pub(crate) fn new(budget: u32, account: Arc<VmaAccount>) -> Vmas {
        Vmas {
            used: 0,
            budget: u64::from(budget),
            account,
            refused: false,
        }
    }

    /// VMAs that regions take at most (the kernel may have merged some).
    pub(crate) fn used(&self) -> u64 {
        self.used
    }

    /// How many they may take.
    pub(crate) fn budget(&self) -> u64 {
        self.budget
    }

    /// Takes note that a region has `after` VMAs instead of `before`.
    pub(crate) fn change(&mut self, before: u32, after: u32) {
        let (before, after) = (u64::from(before), u64::from(after));
        self.used = self.used + after - before;
        // One after the other: the sum may be too high for a moment, never below zero.
        self.account.used.fetch_add(after, Ordering::Relaxed);
        self.account.used.fetch_sub(before, Ordering::Relaxed);
    }

    /// Takes a region's mappings off the domain's. They go with the region, which others may hold.
    pub(crate) fn detach(&mut self, vmas: u32) -> VmaLease {
        let vmas = u64::from(vmas);
        self.used -= vmas;
        let account = Arc::clone(&self.account);
        VmaLease { account, vmas }
    }

    /// Whether `added` more VMAs are allowed for the sake of `pages` pages. The fuller the budget, or
    /// the process's account, the longer a run must be: the cheapest savings are left out first.
    pub(crate) fn allow(&self, added: i64, pages: u32) -> bool {
        let run_pages_min = match self.percent(added) {
            0..75 => 1,
            75..90 => 2,
            90..97 => 8,
            97..=100 => 32,
            _ => u32::MAX,
        };
        added <= 0 || (pages >= run_pages_min && !self.refused)
    }

    /// Whether what was left out is worth another try.
    pub(crate) fn have_plenty(&self) -> bool {
        self.percent(0) < PLENTY_PERCENT && !self.refused
    }

    /// Takes note of what became of a mapping that adds VMAs. Where the kernel has no memory for it, or
    /// no mapping left, none is tried until the next pass: each would have writers wait for nothing.
    pub(crate) fn note_tried<T>(&mut self, added: i64, tried: &io::Result<T>) {
        let refused = |error: &io::Error| error.kind() == io::ErrorKind::OutOfMemory;
        self.refused |= added > 0 && tried.as_ref().is_err_and(refused);
    }

    /// Whether the kernel refused a mapping in this pass.
    pub(crate) fn are_refused(&self) -> bool {
        self.refused
    }

    /// A new pass begins.
    pub(crate) fn end_pass(&mut self) {
        self.refused = false;
    }

    /// How full the fuller of budget and account is with `added` more, rounded up past the end.
    fn percent(&self, added: i64) -> u64 {
        let of = |used: u64, limit: u64| {
            let wanted = used.saturating_add_signed(added);
            let past_end = u64::from(wanted > limit);
            wanted.saturating_mul(100) / limit.max(1) + past_end
        };
        let in_process = self.account.used.load(Ordering::Relaxed);
        of(self.used, self.budget).max(of(in_process, self.account.limit))
    }
}

impl Drop for Vmas {
    fn drop(&mut self) {
        self.account.used.fetch_sub(self.used, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fuller_the_budget_the_longer_a_run_must_be() {
        let mut vmas = Vmas::new(100, VmaAccount::new(1000));
        let run_pages_min = |vmas: &Vmas| (1..100).find(|&pages| vmas.allow(1, pages));
        for (used, expected) in [(0, 1), (73, 1), (74, 2), (89, 8), (96, 32)] {
            vmas.change(u32::try_from(vmas.used()).unwrap(), used);
            assert_eq!(run_pages_min(&vmas), Some(expected), "{used}");
        }
        vmas.change(96, 100);
        assert_eq!(run_pages_min(&vmas), None);
        assert!(vmas.allow(0, 1), "what adds none is always done");
    }

    #[test]
    fn a_large_budget_ends_where_it_ends() {
        let mut vmas = Vmas::new(60_000, VmaAccount::new(100_000));
        vmas.change(0, 59_999);
        assert!(vmas.allow(1, 32));
        assert!(!vmas.allow(2, 512));
    }

    #[test]
    fn domains_share_what_the_process_has() {
        let account = VmaAccount::new(100);
        let mut one = Vmas::new(90, Arc::clone(&account));
        let mut other = Vmas::new(90, Arc::clone(&account));
        one.change(0, 60);
        other.change(0, 39);
        assert!(other.allow(1, 32));
        assert!(!other.allow(2, 512), "39 of its own 90, 99 of 100");
        assert!(!other.have_plenty());
        drop(one);
        assert!(other.allow(1, 1));
        assert!(other.have_plenty());
        drop(other);
        assert_eq!(account.used.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn after_a_refusal_no_mapping_is_tried_until_the_next_pass() {
        let mut vmas = Vmas::new(100, VmaAccount::new(100));
        let refused = || Err::<(), _>(io::Error::from_raw_os_error(libc::ENOMEM));
        vmas.note_tried(0, &refused());
        vmas.note_tried(1, &Err::<(), _>(io::Error::from_raw_os_error(libc::EINVAL)));
        vmas.note_tried(1, &Ok(()));
        assert!(vmas.allow(1, 1) && vmas.have_plenty());
        vmas.note_tried(1, &refused());
        assert!(!vmas.allow(1, 512) && !vmas.have_plenty());
        assert!(vmas.allow(0, 1), "what adds none is always done");
        vmas.end_pass();
        assert!(vmas.allow(1, 1) && vmas.have_plenty());
    }
}
