//! Founding stable pages: content that two pages share becomes a page of the pool.
//!
//! The copy comes first, and protection after it: to get memory for a run of pages and to fill it
//! takes longer than a writer may wait. A page that is written to while it is copied may be torn;
//! the copy is then of another name than the page was found by, and is given up. What remains is a
//! stable page like any other, which the pair is compared with under protection.

use std::io;

use crate::backing::{Backing, Pool};
use crate::fingerprint::Fingerprint;
use crate::item::PageState;
use crate::merge::{RUN_PAGES_MAX, run_len};
use crate::page::{HUGE_PAGE_PAGES, PoolPage, runs};
use crate::region::{Entered, RegionId};
use crate::scanner::Scanner;
use crate::share::Candidate;
use crate::visit::Pair;

/// Consecutive partners that are merged together with those who found them. Fewer are left to the
/// visit of their own region, which takes scattered pages together: protecting and releasing one
/// page alone costs more than reading it again.
const PARTNER_RUN_PAGES_MIN: usize = 8;

/// A pair, and the stable page that holds what it was found by.
type Founded = (Pair, PoolPage);

impl<B: Backing> Scanner<B> {
    /// Puts a run of consecutive pages into the pool as one run, and shares it with the partners.
    ///
    /// In the order of the founder's pages, whatever that of the partners is: the founder then
    /// takes one VMA, and so does every region that looks like it.
    pub(crate) fn found_run(&mut self, inside: &Entered<'_, B>, run: &[Pair]) -> io::Result<()> {
        if inside.is_exiting() {
            return Ok(());
        }
        // What the budget has no room for is tried later.
        let (_reserved, granted) = self.budget.reserve_for_merge(run_len(run));
        let (run, put_off) = run.split_at(granted as usize);
        self.keep_pairs(inside.region.id(), put_off.iter());
        let mut rest = run;
        while !rest.is_empty() {
            let Some((first, pages)) = self.stable.take_run(run_len(rest)) else {
                return Ok(());
            };
            let (now, later) = rest.split_at(pages as usize);
            self.found_part(inside, now, first)?;
            rest = later;
        }
        Ok(())
    }

    fn keep_pairs<'p>(&mut self, id: RegionId, pairs: impl Iterator<Item = &'p Pair>) {
        pairs.for_each(|pair| self.keep_candidate(id, pair.page, pair.fingerprint));
    }

    /// Copies consecutive pages into the pool, and maps them and their partners there.
    fn found_part(
        &mut self,
        inside: &Entered<'_, B>,
        part: &[Pair],
        first: PoolPage,
    ) -> io::Result<()> {
        let id = inside.region.id();
        let range = part[0].page..part[0].page + run_len(part);
        let filled = inside.backing().fill(range, &self.pool, first);
        if filled.is_err() {
            (0..run_len(part)).for_each(|offset| self.stable.abandon(first.plus(offset)));
            return filled;
        }
        let mut founded: Vec<Founded> = Vec::with_capacity(part.len());
        for (pair, pool_page) in part.iter().zip((first.0..).map(PoolPage)) {
            // What the copy holds is what counts: its guest runs on, and an exit may have freed it.
            self.pool.read(pool_page, &mut self.scratch);
            if Fingerprint::of(&self.scratch) == pair.fingerprint {
                self.stable.insert(pool_page, pair.fingerprint);
                // Ourselves, until those are mapped who it is for.
                self.stable.add_sharer(pool_page);
                founded.push((*pair, pool_page));
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
        for (_, pool_page) in founded {
            self.stable.drop_sharer(pool_page);
        }
        Ok(())
    }

    fn share_with_partners(&mut self, inside: &Entered<'_, B>, founded: &[Founded]) {
        // Not from one huge page to the next: each is split, or not, for its own pages.
        let continues = |a: &Founded, b: &Founded| {
            a.0.partner == b.0.partner
                && a.0.partner_page + 1 == b.0.partner_page
                && !b.0.partner_page.is_multiple_of(HUGE_PAGE_PAGES)
                && a.1.plus(1) == b.1
        };
        for run in runs(founded, RUN_PAGES_MAX, continues) {
            if run.len() >= PARTNER_RUN_PAGES_MIN {
                self.share_with_run(inside, run);
            }
        }
    }

    /// Maps consecutive partners to pool pages that were just filled.
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
        let first = run[0].0.partner_page;
        if !self.split_for_partners(partner, &(first..first + run_len(run))) {
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
}
