//! Founding stable pages: content that two pages share becomes a page of the pool.
//!
//! The copy comes first, and protection after it: to get memory for a run of pages and to fill it
//! takes longer than a writer may wait. A page that is written to while it is copied may be torn;
//! the copy is then of another name than the page was found by, and is given up. What remains is a
//! stable page like any other, which the pair is compared with under protection.

use std::io;

use crate::backing::{Backing, Pool};
use crate::group::GAP_PAGES_MAX;
use crate::huge::block_of;
use crate::item::PageState;
use crate::merge::{RUN_PAGES_MAX, report, run_len};
use crate::page::{PoolPage, range_pages, runs};
use crate::region::{Entered, RegionId};
use crate::scanner::Scanner;
use crate::share::Candidate;
use crate::visit::Pair;

/// Neighbouring partners that are merged together with those who found them. Fewer are left to the
/// visit of their own region, which takes scattered pages together: protecting and releasing one
/// page alone costs more than reading it again.
const PARTNER_RUN_PAGES_MIN: usize = 8;

/// A pair, and the stable page that holds what it was found by.
type Founded = (Pair, PoolPage);

/// How many of the ascending pages, at least one, go to the pool as one run. Few pages between them
/// that are the guest's own are left out there (*holes*): the distance stays the same, and whoever
/// has the same content at these places maps all of it at once. At most as many as there are pages,
/// because a hole costs metadata.
fn founding_len(pages: &[u32], is_own: impl Fn(u32) -> bool) -> usize {
    let mut holes = 0;
    for (index, pair) in pages.windows(2).enumerate() {
        let mut gap = pair[0] + 1..pair[1];
        holes += gap.len();
        if range_pages(&gap) > GAP_PAGES_MAX
            || holes > index + 1
            || index + 2 + holes > RUN_PAGES_MAX
            || !gap.all(&is_own)
        {
            return index + 1;
        }
    }
    pages.len()
}

impl<B: Backing> Scanner<B> {
    /// Founds stable pages for a window's pairs, which are ascending by page.
    pub(crate) fn found_all(&mut self, inside: &Entered<'_, B>, pairs: &[Pair]) {
        if inside.is_exiting() {
            return;
        }
        let id = inside.region.id();
        let (mut over_holes, mut rest) = (Vec::new(), Vec::new());
        for &pair in pairs {
            let under = self.items(id).pool_page_under(pair.page);
            match under.filter(|&hole| self.stable.claim_hole(hole)) {
                Some(hole) => over_holes.push((pair, hole)),
                None => rest.push(pair),
            }
        }
        // First: a run that is mapped around these pages would take them off their holes.
        report(
            "found stable pages",
            id,
            self.found_in_holes(inside, &over_holes),
        );
        let mut rest = &rest[..];
        while !rest.is_empty() {
            let pages: Vec<u32> = rest.iter().map(|pair| pair.page).collect();
            let items = self.items(id);
            let len = founding_len(&pages, |page| items.state(page).is_own());
            let (run, later) = rest.split_at(len);
            report("found stable pages", id, self.found_run(inside, run));
            rest = later;
        }
        self.revisit_partners(id, pairs);
    }

    /// Puts pages into the holes of the pool that they lie over, which takes no mapping.
    fn found_in_holes(&mut self, inside: &Entered<'_, B>, placed: &[Founded]) -> io::Result<()> {
        // What the budget has no room for is tried later.
        let (_reserved, granted) = self.budget.reserve_for_merge(run_len(placed));
        let (placed, put_off) = placed.split_at(granted as usize);
        for &(_, hole) in put_off {
            self.stable.leave_hole(hole);
        }
        self.keep_pairs(inside.region.id(), put_off.iter().map(|(pair, _)| pair));
        self.found(inside, placed)
    }

    /// Puts a run of pages into the pool as one run, and shares it with the partners.
    ///
    /// In the order of the founder's pages, whatever that of the partners is: the founder then
    /// takes one VMA, and so does every region that looks like it.
    fn found_run(&mut self, inside: &Entered<'_, B>, run: &[Pair]) -> io::Result<()> {
        if inside.is_exiting() {
            return Ok(());
        }
        // What the budget has no room for is tried later.
        let (_reserved, granted) = self.budget.reserve_for_merge(run_len(run));
        let (run, put_off) = run.split_at(granted as usize);
        self.keep_pairs(inside.region.id(), put_off.iter());
        let mut rest = run;
        while !rest.is_empty() {
            let placed = self.take_places(rest);
            if placed.is_empty() {
                return Ok(());
            }
            self.found(inside, &placed)?;
            rest = &rest[placed.len()..];
        }
        Ok(())
    }

    /// Takes a place in the pool for each of the first pairs, as far from each other as their pages;
    /// none if the pool is full.
    fn take_places(&mut self, pairs: &[Pair]) -> Vec<Founded> {
        let start = pairs[0].page;
        let wanted = pairs[pairs.len() - 1].page + 1 - start;
        let Some((first, taken)) = self.stable.take_run(wanted) else {
            return Vec::new();
        };
        let mut placed: Vec<Founded> = Vec::with_capacity(pairs.len());
        let mut next = first;
        for pair in pairs.iter().take_while(|pair| pair.page - start < taken) {
            let page = first.plus(pair.page - start);
            (next.0..page.0).for_each(|hole| self.stable.leave_hole(PoolPage(hole)));
            placed.push((*pair, page));
            next = page.plus(1);
        }
        (next.0..first.0 + taken).for_each(|unused| self.stable.abandon(PoolPage(unused)));
        placed
    }

    fn keep_pairs<'p>(&mut self, id: RegionId, pairs: impl Iterator<Item = &'p Pair>) {
        pairs.for_each(|pair| self.keep_candidate(id, pair.page, pair.fingerprint));
    }

    /// Copies pages into the pool, and maps them and their partners there.
    fn found(&mut self, inside: &Entered<'_, B>, placed: &[Founded]) -> io::Result<()> {
        let id = inside.region.id();
        for part in runs(placed, RUN_PAGES_MAX, |a, b| {
            a.0.page + 1 == b.0.page && a.1.plus(1) == b.1
        }) {
            let (pair, first) = part[0];
            let range = pair.page..pair.page + run_len(part);
            let filled = inside.backing().fill(range, &self.pool, first);
            if filled.is_err() {
                let pages = placed.iter().map(|&(_, pool_page)| pool_page);
                pages.for_each(|pool_page| self.stable.abandon(pool_page));
                return filled;
            }
        }
        let mut founded: Vec<Founded> = Vec::with_capacity(placed.len());
        for &(pair, pool_page) in placed {
            // What the copy holds is what counts: its guest runs on, and an exit may have freed it.
            if self.pool.fingerprint(pool_page) == pair.fingerprint {
                self.stable.insert(pool_page, pair.fingerprint);
                // Ourselves, until those are mapped who it is for.
                self.stable.add_sharer(pool_page);
                founded.push((pair, pool_page));
            } else {
                self.stable.abandon(pool_page);
                self.keep_candidate(id, pair.page, pair.fingerprint);
            }
        }
        let own: Vec<Candidate> = founded
            .iter()
            .map(|&(pair, pool_page)| (pair.page, pool_page))
            .collect();
        let changed = self.share_all(inside, &own);
        let is_changed = |pair: &&Pair| changed.binary_search(&pair.page).is_ok();
        self.keep_pairs(id, founded.iter().map(|(pair, _)| pair).filter(is_changed));
        self.share_with_partners(inside, &founded);
        for (pair, pool_page) in founded {
            // For a partner that is left to its own visit, and may have left altogether.
            if let Some(attached) = self.attached(pair.partner) {
                attached.items.set_hint(pair.partner_page, pool_page);
            }
            self.stable.drop_sharer(pool_page);
        }
        Ok(())
    }

    fn share_with_partners(&mut self, inside: &Entered<'_, B>, founded: &[Founded]) {
        // Not from one huge page to the next: each is split, or not, for its own pages.
        let continues = |a: &Founded, b: &Founded| {
            let step = b.0.partner_page.wrapping_sub(a.0.partner_page);
            a.0.partner == b.0.partner
                && (1..=GAP_PAGES_MAX + 1).contains(&step)
                && block_of(a.0.partner_page) == block_of(b.0.partner_page)
                && a.1.plus(step) == b.1
        };
        for run in runs(founded, RUN_PAGES_MAX, continues) {
            if run.len() >= PARTNER_RUN_PAGES_MIN {
                self.share_with_run(inside, run);
            }
        }
    }

    /// Maps neighbouring partners to pool pages that were just filled.
    fn share_with_run(&mut self, inside: &Entered<'_, B>, run: &[Founded]) {
        let id = run[0].0.partner;
        // Another region's lock is taken in its turn; the region in hand is entered already, and
        // a second read lock on it would deadlock with an exit that waits in between.
        let other = (id != inside.region.id())
            .then(|| self.region(id))
            .flatten();
        let entered = other.as_ref().and_then(|region| region.enter());
        let partner = if id == inside.region.id() {
            inside
        } else if let Some(entered) = &entered {
            entered
        } else {
            return;
        };
        let range = run[0].0.partner_page..run[run.len() - 1].0.partner_page + 1;
        if !self.split_for_partners(partner, &range, run.len()) {
            return;
        }
        let items = self.items(id);
        let candidates: Vec<Candidate> = run
            .iter()
            .map(|&(pair, pool_page)| (pair.partner_page, pool_page))
            .filter(|&(page, _)| matches!(items.state(page), PageState::Unshared { .. }))
            .collect();
        self.share_all(partner, &candidates);
        self.publish_region(partner.region);
    }

    /// Partners were taken out of the index; those not merged have to be found again, which a
    /// watched page is only if it counts as not yet tried. Or put back into the index, if the one that
    /// found it was left out for want of VMAs: they would find each other in each pass, for ever.
    fn revisit_partners(&mut self, id: RegionId, pairs: &[Pair]) {
        for pair in pairs {
            // A partner's region may have left since.
            if self.pending(pair.partner).is_none() {
                continue;
            }
            let founder = self.items(id).state(pair.page);
            let is_left_out = matches!(founder, PageState::Unshared { .. })
                && !self.unstable.knows(pair.fingerprint, (id, pair.page));
            if is_left_out {
                let partner = (pair.partner, pair.partner_page);
                self.unstable.insert(pair.fingerprint, partner, true);
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn a_run_has_few_holes_and_only_where_pages_are_the_guests_own(
            steps in proptest::collection::vec(1..12u32, 1..400),
            not_own in proptest::collection::btree_set(0..2000u32, 0..4),
        ) {
            let pages: Vec<u32> = steps
                .iter()
                .scan(0, |page, step| {
                    *page += step;
                    Some(*page)
                })
                .collect();
            let len = founding_len(&pages, |page| !not_own.contains(&page));
            prop_assert!((1..=pages.len()).contains(&len));
            let run: BTreeSet<u32> = pages[..len].iter().copied().collect();
            let span = pages[0]..pages[len - 1] + 1;
            prop_assert!(span.len() <= RUN_PAGES_MAX && span.len() <= 2 * len);
            prop_assert!(span.clone().all(|page| run.contains(&page) || !not_own.contains(&page)));
            prop_assert!(pages[..len].windows(2).all(|pair| pair[1] - pair[0] - 1 <= GAP_PAGES_MAX));
        }
    }

    #[test]
    fn a_run_goes_on_behind_a_gap() {
        assert_eq!(founding_len(&[3, 4, 6, 7, 9], |_| true), 5);
        assert_eq!(founding_len(&[3, 4, 6, 7, 9], |page| page != 8), 4);
        assert_eq!(founding_len(&[3, 6], |_| true), 1, "more holes than pages");
    }
}
