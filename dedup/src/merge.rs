//! The merge itself: protect, compare again, swap, wake.
//!
//! What a visit planned is stale by now: guests ran on. So each run is protected first, compared
//! byte by byte, and only then swapped; what changed is let go. Pausing the vCPUs for a merge was
//! rejected: it stops every writer of the VM for the sake of a few pages.

use std::io;

use crate::backing::Backing;
use crate::page::HUGE_PAGE_PAGES;
use crate::region::{Entered, RegionId};
use crate::scanner::Scanner;
use crate::visit::Plan;

/// Longest run that is protected at once: a huge page. A writer may wait for the whole of it, which
/// takes about 300 us to compare and map. What takes longer is done before.
pub(crate) const RUN_PAGES_MAX: usize = HUGE_PAGE_PAGES as usize;

impl<B: Backing> Scanner<B> {
    /// Tries what was planned: guesses, zeros, existing stable pages, new ones, and what those were
    /// waited for. Existing ones first, because a run of them is mapped around the pages that found
    /// new ones, which then find holes under them and need no mapping.
    pub(crate) fn merge(&mut self, inside: &Entered<'_, B>, plan: &mut Plan) {
        self.split_for(inside, plan);
        let id = inside.region.id();
        let guessed = std::mem::take(&mut plan.guessed);
        for page in self.share_all(inside, &guessed) {
            if inside.is_exiting() {
                return;
            }
            self.read_and_plan(inside, page, plan);
        }
        plan.zeros.sort_unstable();
        self.merge_zeros(inside, &plan.zeros);
        plan.stable.sort_unstable();
        self.share_all(inside, &plan.stable);
        plan.pairs.sort_unstable_by_key(|pair| pair.page);
        self.found_all(inside, &plan.pairs);
        let mut stable = Vec::new();
        for (page, fingerprint) in plan.deferred.drain(..) {
            // The founding pair's partner may be this very page.
            if self.items(id).is_merged(page) {
                continue;
            }
            match self.stable.find(fingerprint) {
                Some(pool_page) => stable.push((page, pool_page)),
                // In a watched region it is still pending, and finds the one that was kept.
                None if self.pending(id).is_some() => {}
                None => self.keep_candidate(id, page, fingerprint),
            }
        }
        stable.sort_unstable();
        self.share_all(inside, &stable);
    }
}

pub(crate) fn run_len<T>(run: &[T]) -> u32 {
    u32::try_from(run.len()).unwrap_or(u32::MAX)
}

/// A merge that failed costs its saving and nothing else; the pages are tried again next pass.
pub(crate) fn report(what: &str, id: RegionId, done: io::Result<()>) {
    if let Err(error) = done {
        log::warn!("cannot {what} in region {}: {error}", id.0);
    }
}
