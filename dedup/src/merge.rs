//! The merge itself: protect, compare again, swap, wake.
//!
//! What a visit planned is stale by now: guests ran on. So each run is protected first, compared
//! byte by byte, and only then swapped; what changed is let go. Pausing the vCPUs for a merge was
//! rejected: it stops every writer of the VM for the sake of a few pages.

use std::io;

use crate::backing::{Backing, Pool};
use crate::fingerprint::{Fingerprint, is_zero};
use crate::item::PageState;
use crate::items::Items;
use crate::page::{PageRange, PoolPage, range_pages, runs};
use crate::protected::Protected;
use crate::region::{Entered, RegionId};
use crate::scanner::Scanner;
use crate::visit::{Pair, Plan};

/// Longest run that is protected at once. A writer may wait for the whole of it: 256 pages take
/// about 150 us to compare and map.
const RUN_PAGES_MAX: usize = 256;

/// A run of pairs under protection on both sides.
struct Founding<'a, B: Backing> {
    own: Protected<'a, B>,
    partner: Protected<'a, B>,
    id: RegionId,
    partner_id: RegionId,
}

impl<B: Backing> Scanner<B> {
    /// Tries what was planned: zeros, then new stable pages, then existing ones.
    pub(crate) fn merge(&mut self, inside: &Entered<'_, B>, plan: &mut Plan) {
        let id = inside.region.id();
        for run in runs(&plan.zeros, RUN_PAGES_MAX, |a, b| a + 1 == *b) {
            let done = self.merge_zeros(inside, run[0]..run[0] + run_len(run));
            report("drop zero pages", id, done);
        }
        for run in runs(&plan.pairs, RUN_PAGES_MAX, pair_continues) {
            let done = self.merge_pairs(inside, run);
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
        let continues =
            |a: &(u32, PoolPage), b: &(u32, PoolPage)| a.0 + 1 == b.0 && a.1.plus(1) == b.1;
        for run in runs(&plan.stable, RUN_PAGES_MAX, continues) {
            let done = self.merge_stable(inside, run[0].0..run[0].0 + run_len(run), run[0].1);
            report("share stable pages", id, done);
        }
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

    fn merge_zeros(&mut self, inside: &Entered<'_, B>, range: PageRange) -> io::Result<()> {
        if inside.is_exiting() {
            return Ok(());
        }
        let id = inside.region.id();
        let remapped = self.items(id).any_in_pool_vma(&range);
        let mut protected = Protected::new(inside.backing(), range.clone(), remapped)?;
        let still_zero: Vec<u32> = range
            .filter(|&page| {
                let [content, _] = &mut *self.scratch;
                inside.backing().read(page, content);
                is_zero(content)
            })
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

    fn merge_stable(
        &mut self,
        inside: &Entered<'_, B>,
        range: PageRange,
        first: PoolPage,
    ) -> io::Result<()> {
        if inside.is_exiting() {
            return Ok(());
        }
        let remapped = self.items(inside.region.id()).any_in_pool_vma(&range);
        let mut protected = Protected::new(inside.backing(), range.clone(), remapped)?;
        let equal: Vec<u32> = range
            .clone()
            .filter(|&page| {
                let pool_page = first.plus(page - range.start);
                let [own, stable] = &mut *self.scratch;
                inside.backing().read(page, own);
                self.pool.read(pool_page, stable);
                // Its last sharer may have left it since the window's visit.
                self.stable.sharers_of(pool_page) > 0 && own == stable
            })
            .collect();
        let id = inside.region.id();
        let covers = |items: &Items, page: u32| {
            items.pool_page_under(page) == Some(first.plus(page - range.start))
        };
        let items = self.items(id);
        let equal: Vec<(u32, bool)> = equal
            .into_iter()
            .map(|page| (page, covers(items, page)))
            .collect();
        for run in runs(&equal, usize::MAX, |a, b| a.0 + 1 == b.0 && a.1 == b.1) {
            let (page, is_covering) = run[0];
            let part = page..page + run_len(run);
            let pool_page = first.plus(page - range.start);
            if is_covering {
                protected.uncover(&part)?;
                self.note_shared(id, &part, pool_page);
            } else {
                self.share(&mut protected, id, &part, pool_page)?;
            }
        }
        Ok(())
    }

    fn merge_pairs(&mut self, inside: &Entered<'_, B>, run: &[Pair]) -> io::Result<()> {
        let id = inside.region.id();
        let partner_id = run[0].partner;
        // Another region's lock is taken in its turn; the region in hand is entered already, and
        // a second read lock on it would deadlock with an exit that waits in between.
        let partner_region = if partner_id == id {
            None
        } else {
            self.region(partner_id)
        };
        let entered = partner_region.as_ref().and_then(|region| region.enter());
        let partner = if partner_id == id {
            Some(inside)
        } else {
            entered.as_ref()
        };
        let Some(partner) = partner else {
            for pair in run {
                self.keep_candidate(id, pair.page, pair.fingerprint);
            }
            return Ok(());
        };
        if inside.is_exiting() {
            return Ok(());
        }
        // Before anybody is made to wait for us. What the budget has no room for is tried later.
        let (_reserved, granted) = self.budget.reserve_for_merge(run_len(run));
        let (run, put_off) = run.split_at(granted as usize);
        for pair in put_off {
            self.keep_candidate(id, pair.page, pair.fingerprint);
        }
        let own_range = run[0].page..run[0].page + run_len(run);
        let partner_range = run[0].partner_page..run[0].partner_page + run_len(run);
        let remapped = self.items(id).any_in_pool_vma(&own_range);
        let partner_remapped = self.items(partner_id).any_in_pool_vma(&partner_range);
        let mut founding = Founding {
            own: Protected::new(inside.backing(), own_range, remapped)?,
            partner: Protected::new(partner.backing(), partner_range, partner_remapped)?,
            id,
            partner_id,
        };
        let mut rest = run;
        let mut founded = Ok(());
        while !rest.is_empty() {
            let Some((first, pages)) = self.stable.take_run(run_len(rest)) else {
                break;
            };
            let (now, later) = rest.split_at(pages as usize);
            let filled = self.fill(inside, partner, now, first)?;
            for part in runs(&filled, usize::MAX, |a, b| pair_continues(&a.0, &b.0)) {
                if founded.is_ok() {
                    founded = self.found(&mut founding, part);
                } else {
                    part.iter().for_each(|&(_, page)| self.stable.abandon(page));
                }
            }
            rest = if founded.is_ok() { later } else { &[] };
        }
        if let Some(region) = partner_region.as_deref() {
            self.publish_region(region);
        }
        founded
    }

    /// Compares both sides of each pair, and fills a pool page with what was compared: the copy,
    /// not the page again. Protection stops writers, but not an exit, which may free the pages of
    /// either side at any moment; the other side must not be given zeros then.
    fn fill(
        &mut self,
        inside: &Entered<'_, B>,
        partner: &Entered<'_, B>,
        run: &[Pair],
        first: PoolPage,
    ) -> io::Result<Vec<(Pair, PoolPage)>> {
        let mut filled = Vec::new();
        for (pair, pool_page) in run.iter().zip((first.0..).map(PoolPage)) {
            let partner_state = self.items(partner.region.id()).state(pair.partner_page);
            let [own, other] = &mut *self.scratch;
            inside.backing().read(pair.page, own);
            partner.backing().read(pair.partner_page, other);
            // Equal pages may both have changed alike: their stable page must not be found by what
            // they held before.
            let is_same = own == other && Fingerprint::of(own) == pair.fingerprint;
            if !is_same || !matches!(partner_state, PageState::Unshared { .. }) {
                self.stable.abandon(pool_page);
                self.keep_candidate(inside.region.id(), pair.page, pair.fingerprint);
                continue;
            }
            if let Err(error) = self.pool.write(pool_page, own) {
                let taken = filled.iter().map(|&(_, page)| page);
                let left = (pool_page.0..first.0 + run_len(run)).map(PoolPage);
                taken.chain(left).for_each(|page| self.stable.abandon(page));
                return Err(error);
            }
            filled.push((*pair, pool_page));
        }
        Ok(filled)
    }

    /// Makes filled pool pages stable and maps both sides to them.
    fn found(
        &mut self,
        founding: &mut Founding<'_, B>,
        run: &[(Pair, PoolPage)],
    ) -> io::Result<()> {
        for &(pair, pool_page) in run {
            self.stable.insert(pool_page, pair.fingerprint);
        }
        let (pair, first) = run[0];
        let own = pair.page..pair.page + run_len(run);
        let partner = pair.partner_page..pair.partner_page + run_len(run);
        let shared = self
            .share(&mut founding.partner, founding.partner_id, &partner, first)
            .and_then(|()| self.share(&mut founding.own, founding.id, &own, first));
        for &(_, pool_page) in run {
            self.stable.drop_if_unused(pool_page);
        }
        shared
    }

    /// Maps a compared part of a protected range to stable pages, within the VMA budget.
    fn share(
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
    fn note_shared(&mut self, id: RegionId, part: &PageRange, first: PoolPage) {
        for page in part.clone() {
            let pool_page = first.plus(page - part.start);
            self.items(id).set_state(page, PageState::Stable(pool_page));
            self.stable.add_sharer(pool_page);
        }
        self.changes += u64::from(range_pages(part));
    }
}

fn pair_continues(a: &Pair, b: &Pair) -> bool {
    a.page + 1 == b.page && a.partner == b.partner && a.partner_page + 1 == b.partner_page
}

fn run_len<T>(run: &[T]) -> u32 {
    u32::try_from(run.len()).unwrap_or(u32::MAX)
}

/// A merge that failed costs its saving and nothing else; the pages are tried again next pass.
fn report(what: &str, id: RegionId, done: io::Result<()>) {
    if let Err(error) = done {
        log::warn!("cannot {what} in region {}: {error}", id.0);
    }
}
