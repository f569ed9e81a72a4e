//! The merge itself: protect, compare again, swap, wake.
//!
//! What a visit planned is stale by now: guests ran on. So each run is protected first, compared
//! byte by byte, and only then swapped; what changed is let go. Pausing the vCPUs for a merge was
//! rejected: it stops every writer of the VM for the sake of a few pages.

use std::io;

use crate::backing::Backing;
use crate::item::PageState;
use crate::page::{HUGE_PAGE_PAGES, PageRange, PoolPage, range_pages, runs};
use crate::protected::Protected;
use crate::region::{Entered, RegionId};
use crate::scanner::Scanner;
use crate::visit::{Pair, Plan};

/// Longest run that is protected at once: a huge page. A writer may wait for the whole of it, which
/// takes about 300 us to compare and map. What takes longer is done before.
pub(crate) const RUN_PAGES_MAX: usize = HUGE_PAGE_PAGES as usize;

impl<B: Backing> Scanner<B> {
    /// Tries what was planned, cheapest first: guesses, zeros, new stable pages, existing ones.
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
        plan.pairs.sort_unstable_by_key(|pair| pair.page);
        for run in runs(&plan.pairs, RUN_PAGES_MAX, |a, b| a.page + 1 == b.page) {
            let done = self.found_run(inside, run);
            report("found stable pages", id, done);
            self.revisit_partners(run);
        }
        for (page, fingerprint) in plan.deferred.drain(..) {
            // The founding pair's partner may be this very page.
            if self.items(id).is_merged(page) {
                continue;
            }
            match self.stable.find(fingerprint) {
                Some(pool_page) => plan.stable.push((page, pool_page)),
                // In a watched region it is still pending, and finds the one that was kept.
                None if self.pending(id).is_some() => {}
                None => self.keep_candidate(id, page, fingerprint),
            }
        }
        plan.stable.sort_unstable();
        self.share_all(inside, &plan.stable);
    }

    /// Partners were taken out of the index; those not merged have to be found again, which a
    /// watched page is only if it counts as not yet tried.
    fn revisit_partners(&mut self, run: &[Pair]) {
        for pair in run {
            // A partner's region may have left since.
            if self.pending(pair.partner).is_none() {
                continue;
            }
            let items = self.items(pair.partner);
            let PageState::Unshared { checksum } = items.state(pair.partner_page) else {
                continue;
            };
            items.set_state(pair.partner_page, PageState::Volatile { checksum });
            let pending = self.pending(pair.partner).into_iter();
            pending.for_each(|pending| pending.insert(pair.partner_page));
        }
    }

    /// Maps a compared part of a protected range to stable pages, within the VMA budget.
    pub(crate) fn share(
        &mut self,
        protected: &mut Protected<'_, B>,
        id: RegionId,
        part: &PageRange,
        first: PoolPage,
    ) -> io::Result<()> {
        let added = self.items(id).vmas_added_by_remap(part);
        if !self.takes_vmas(added, range_pages(part)) {
            // Left out for good, until it changes: trying again in each pass would cost CPU.
            for page in part.clone() {
                let checksum = self
                    .stable
                    .fingerprint(first.plus(page - part.start))
                    .checksum();
                self.items(id)
                    .set_state(page, PageState::Unshared { checksum });
            }
            return Ok(());
        }
        protected.share(&self.pool, part, first)?;
        self.remap(id, part, Some(first));
        self.note_shared(id, part, first);
        Ok(())
    }

    /// Accounts for pages that are mapped to stable pages now.
    pub(crate) fn note_shared(&mut self, id: RegionId, part: &PageRange, first: PoolPage) {
        for page in part.clone() {
            let pool_page = first.plus(page - part.start);
            self.items(id).set_state(page, PageState::Stable(pool_page));
            self.stable.add_sharer(pool_page);
        }
        self.places.note(id);
        self.changes += u64::from(range_pages(part));
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
