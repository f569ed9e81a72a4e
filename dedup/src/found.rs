//! Founding stable pages: content that two pages share becomes a page of the pool.

use std::io;

use crate::backing::Backing;
use crate::item::PageState;
use crate::merge::{RUN_PAGES_MAX, report, run_len};
use crate::page::{PageRange, PoolPage, runs};
use crate::protected::Protected;
use crate::region::Entered;
use crate::scanner::Scanner;
use crate::visit::Pair;

/// Consecutive partners that are merged together with those who found them. Fewer are left to the
/// visit of their own region, which takes scattered pages together: protecting and releasing one
/// page alone costs more than reading it again.
const PARTNER_RUN_PAGES_MIN: usize = 8;

impl<B: Backing> Scanner<B> {
    /// Puts a run of consecutive pages into the pool as one run, and shares it with the partners.
    ///
    /// In the order of the founder's pages, whatever that of the partners is: the founder then
    /// takes one VMA, and so does every region that looks like it.
    pub(crate) fn found_run(&mut self, inside: &Entered<'_, B>, run: &[Pair]) -> io::Result<()> {
        if inside.is_exiting() {
            return Ok(());
        }
        let id = inside.region.id();
        // Before anybody is made to wait for us. What the budget has no room for is tried later.
        let (_reserved, granted) = self.budget.reserve_for_merge(run_len(run));
        let (run, put_off) = run.split_at(granted as usize);
        for pair in put_off {
            self.keep_candidate(id, pair.page, pair.fingerprint);
        }
        if run.is_empty() {
            return Ok(());
        }
        let range = run[0].page..run[0].page + run_len(run);
        let remapped = self.items(id).any_in_pool_vma(&range);
        let mut own = Protected::new(inside.backing(), range, remapped)?;
        let (calm, changed): (Vec<Pair>, Vec<Pair>) = run.iter().partition(|pair| {
            // By its hash, not by its partner: what goes into the pool is found by this name.
            self.read_page(inside, pair.page).0 == pair.fingerprint
        });
        for pair in changed {
            self.keep_candidate(id, pair.page, pair.fingerprint);
        }
        for part in runs(&calm, RUN_PAGES_MAX, |a, b| a.page + 1 == b.page) {
            let mut rest = part;
            while !rest.is_empty() {
                let Some((first, pages)) = self.stable.take_run(run_len(rest)) else {
                    return Ok(());
                };
                let (now, later) = rest.split_at(pages as usize);
                self.found_part(inside, &mut own, now, first)?;
                rest = later;
            }
        }
        Ok(())
    }

    /// Fills pool pages from consecutive protected pages, and maps those and their partners there.
    fn found_part(
        &mut self,
        inside: &Entered<'_, B>,
        own: &mut Protected<'_, B>,
        part: &[Pair],
        first: PoolPage,
    ) -> io::Result<()> {
        let range = part[0].page..part[0].page + run_len(part);
        let filled = inside.backing().fill(range.clone(), &self.pool, first);
        // Looked at after the copy, not before: protection stops writers, but not an exit, which
        // may have freed the pages before they were copied, and has said so before it began. Zeros
        // under another content's name would do no harm, and never be found.
        if filled.is_err() || inside.is_exiting() {
            (0..run_len(part)).for_each(|offset| self.stable.abandon(first.plus(offset)));
            return filled;
        }
        for (pair, pool_page) in part.iter().zip((first.0..).map(PoolPage)) {
            self.stable.insert(pool_page, pair.fingerprint);
        }
        self.share_with_partners(inside, own.range(), part, first);
        let shared = self.share(own, inside.region.id(), &range, first);
        (0..run_len(part)).for_each(|offset| self.stable.drop_if_unused(first.plus(offset)));
        shared
    }

    fn share_with_partners(
        &mut self,
        inside: &Entered<'_, B>,
        protected: &PageRange,
        part: &[Pair],
        first: PoolPage,
    ) {
        let continues =
            |a: &Pair, b: &Pair| a.partner == b.partner && a.partner_page + 1 == b.partner_page;
        for run in runs(part, RUN_PAGES_MAX, continues) {
            let partners = run[0].partner_page..run[0].partner_page + run_len(run);
            // Letting go of the partners would let go of the founder's own pages too soon.
            let overlaps = run[0].partner == inside.region.id()
                && partners.start < protected.end
                && protected.start < partners.end;
            if run.len() < PARTNER_RUN_PAGES_MIN || overlaps {
                continue;
            }
            let done = self.share_with_run(inside, run, first.plus(run[0].page - part[0].page));
            report("share founded pages", run[0].partner, done);
        }
    }

    /// Maps consecutive partners to pool pages that were just filled.
    fn share_with_run(
        &mut self,
        inside: &Entered<'_, B>,
        run: &[Pair],
        first: PoolPage,
    ) -> io::Result<()> {
        let id = run[0].partner;
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
            return Ok(());
        };
        let range = run[0].partner_page..run[0].partner_page + run_len(run);
        if !self.split_for_partners(partner, &range) {
            return Ok(());
        }
        let remapped = self.items(id).any_in_pool_vma(&range);
        let mut protected = Protected::new(partner.backing(), range, remapped)?;
        let equal: Vec<(u32, PoolPage)> = run
            .iter()
            .zip((first.0..).map(PoolPage))
            .filter(|(pair, _)| {
                let state = self.items(id).state(pair.partner_page);
                matches!(state, PageState::Unshared { .. })
                    && partner
                        .backing()
                        .equals(pair.partner_page, inside.backing(), pair.page)
            })
            .map(|(pair, pool_page)| (pair.partner_page, pool_page))
            .collect();
        // An exit of the founder's region may have freed its pages since they were copied; a partner
        // that holds zeros by now would be equal to them, and get the copy.
        if inside.is_exiting() {
            return Ok(());
        }
        for part in runs(&equal, RUN_PAGES_MAX, |a, b| a.0 + 1 == b.0) {
            let (page, pool_page) = part[0];
            self.share(&mut protected, id, &(page..page + run_len(part)), pool_page)?;
        }
        drop(protected);
        self.publish_region(partner.region);
        Ok(())
    }
}
