//! The merge itself: protect, compare again, swap, wake.
//!
//! What a visit planned is stale by now: guests ran on. So each run is protected first, compared
//! byte by byte, and only then swapped; what changed is let go. Pausing the vCPUs for a merge was
//! rejected: it stops every writer of the VM for the sake of a few pages.

use std::io;

use crate::backing::Backing;
use crate::fingerprint::Fingerprint;
use crate::item::PageState;
use crate::page::{HUGE_PAGE_PAGES, PageRange, range_pages, runs};
use crate::protected::Protected;
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
        for run in runs(&plan.zeros, RUN_PAGES_MAX, |a, b| a + 1 == *b) {
            let done = self.merge_zeros(inside, run[0]..run[0] + run_len(run));
            report("drop zero pages", id, done);
        }
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

    fn merge_zeros(&mut self, inside: &Entered<'_, B>, range: PageRange) -> io::Result<()> {
        if inside.is_exiting() {
            return Ok(());
        }
        let id = inside.region.id();
        let remapped = self.items(id).any_in_pool_vma(&range);
        let mut protected = Protected::new(inside.backing(), range.clone(), remapped)?;
        let still_zero: Vec<u32> = range
            .filter(|&page| inside.backing().is_zero(page))
            .collect();
        let in_pool: Vec<bool> = still_zero
            .iter()
            .map(|&page| self.items(id).in_pool_vma(page))
            .collect();
        let zeros: Vec<(u32, bool)> = still_zero.into_iter().zip(in_pool).collect();
        for run in runs(&zeros, usize::MAX, |a, b| a.0 + 1 == b.0 && a.1 == b.1) {
            let (first, in_pool_vma) = run[0];
            let part = first..first + run_len(run);
            if in_pool_vma {
                let added = self.items(id).vmas_added_by_remap(&part);
                if !self.takes_vmas(added, range_pages(&part)) {
                    self.leave_out(id, &part);
                    continue;
                }
            }
            protected.drop_zeros(&part, in_pool_vma)?;
            if in_pool_vma {
                self.remap(id, &part, None);
            }
            self.changes += u64::from(range_pages(&part));
            for page in part {
                self.items(id).set_state(page, PageState::Zero);
            }
        }
        Ok(())
    }

    /// Leaves zero pages out for good, until they change: trying again in each pass would cost CPU.
    fn leave_out(&mut self, id: RegionId, part: &PageRange) {
        let checksum = Fingerprint::of_zeros().checksum();
        for page in part.clone() {
            self.items(id)
                .set_state(page, PageState::Unshared { checksum });
        }
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
