//! One window of a region: what became of its pages since the last visit, and what to merge.

use std::io;

use crate::backing::{Backing, Residency};
use crate::fingerprint::Fingerprint;
use crate::item::PageState;
use crate::keyed::FingerprintSet;
use crate::page::{PageRange, PoolPage};
use crate::region::{Entered, RegionId};
use crate::scanner::Scanner;
use crate::share::Candidate;

/// A calm page, and a calm page elsewhere that had the same fingerprint when it was visited.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pair {
    pub(crate) page: u32,
    pub(crate) partner: RegionId,
    pub(crate) partner_page: u32,
    pub(crate) fingerprint: Fingerprint,
}

/// What a window's visit found worth trying. Ascending by page.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    /// Pages not read yet, with the stable page that each is likely to be equal to.
    pub(crate) guessed: Vec<Candidate>,
    /// Pages that held zeros.
    pub(crate) zeros: Vec<u32>,
    /// Pages whose content is stable already.
    pub(crate) stable: Vec<Candidate>,
    /// Pages that would found a stable page together with a partner.
    pub(crate) pairs: Vec<Pair>,
    /// Pages with the content of one of the pairs: to be looked up again once those are merged.
    pub(crate) deferred: Vec<(u32, Fingerprint)>,
    founding: FingerprintSet,
}

impl Plan {
    /// Every page that is to be tried, in no order.
    pub(crate) fn pages(&self) -> impl Iterator<Item = u32> {
        let candidates = self.guessed.iter().chain(&self.stable);
        let merging = candidates
            .map(|&(page, _)| page)
            .chain(self.zeros.iter().copied());
        let founding = self.pairs.iter().map(|pair| pair.page);
        merging
            .chain(founding)
            .chain(self.deferred.iter().map(|&(page, _)| page))
    }
}

impl<B: Backing> Scanner<B> {
    /// Visits the pages of a window and merges what can be merged. Returns the pages visited.
    pub(crate) fn scan_window(
        &mut self,
        inside: &Entered<'_, B>,
        window: PageRange,
    ) -> io::Result<u32> {
        let mut plan = Plan::default();
        let visited = match self.take_watched(inside.region.id(), window.clone()) {
            Some(pages) => self.visit_watched(inside, &pages, &mut plan)?,
            None => self.visit(inside, window.clone(), &mut plan)?,
        };
        self.pages_scanned += u64::from(visited);
        self.merge(inside, &mut plan);
        let page = window.start;
        self.settle_watched(inside, window);
        self.heal(inside, page);
        self.reclaim();
        self.publish_region(inside.region);
        Ok(visited)
    }

    fn visit(
        &mut self,
        inside: &Entered<'_, B>,
        window: PageRange,
        plan: &mut Plan,
    ) -> io::Result<u32> {
        let mut found = Vec::new();
        inside.backing().residency(window.clone(), &mut found)?;
        let mut visited = 0;
        let mut next = window.start;
        for (range, residency) in found {
            self.visit_absent(inside, next..range.start);
            next = range.end;
            match residency {
                Residency::Private => {
                    for page in range {
                        if inside.is_exiting() {
                            return Ok(visited);
                        }
                        if self.is_put_off(inside.region.id(), page) {
                            self.pages_skipped += 1;
                            continue;
                        }
                        self.visit_private(inside, page, plan);
                        visited += 1;
                    }
                }
                Residency::ZeroPage | Residency::Swapped => self.visit_absent(inside, range),
                Residency::Pool => visited += crate::page::range_pages(&range),
            }
        }
        self.visit_absent(inside, next..window.end);
        Ok(visited)
    }

    /// Pages without memory of their own: the engine merged them, or the guest gave them back.
    ///
    /// Swapped ones too: they are left alone, as KSM leaves them. A merged page is not taken for
    /// broken on such a word, because the kernel also says it of a page that it is moving; one
    /// sharer too many costs a page, one too few would free a page under a guest.
    fn visit_absent(&mut self, inside: &Entered<'_, B>, range: PageRange) {
        let items = self.items(inside.region.id());
        for page in range {
            if !items.is_merged(page) {
                items.set_state(page, PageState::Untracked);
            }
        }
    }

    /// Whether a page changed so often that it is not worth a visit in this pass.
    fn is_put_off(&mut self, id: RegionId, page: u32) -> bool {
        let hurried = self.hurried;
        let items = self.items(id);
        let is_volatile = matches!(items.state(page), PageState::Volatile { .. });
        is_volatile && !hurried && !items.backoff(page).is_due(items.now)
    }

    fn visit_private(&mut self, inside: &Entered<'_, B>, page: u32, plan: &mut Plan) {
        let id = inside.region.id();
        let (fingerprint, zero) = self.read_page(inside, page);
        let checksum = fingerprint.checksum();
        let before = self.items(id).state(page);
        let calm = match before {
            PageState::Volatile { checksum: seen } | PageState::Unshared { checksum: seen } => {
                seen == checksum
            }
            PageState::Untracked | PageState::Zero | PageState::Stable(_) => false,
        };
        if !calm {
            self.unshared_by_guest(id, page);
            let items = self.items(id);
            items.set_state(page, PageState::Volatile { checksum });
            if let PageState::Volatile { .. } | PageState::Unshared { .. } = before {
                items.set_backoff(page, items.backoff(page).changed(items.now));
            }
            self.changes += u64::from(!matches!(before, PageState::Volatile { .. }));
            return;
        }
        self.changes += u64::from(!matches!(before, PageState::Unshared { .. }));
        self.plan_calm(id, page, (fingerprint, zero), plan);
    }

    /// A page's fingerprint, and whether it holds only zeros.
    pub(crate) fn read_page(&mut self, inside: &Entered<'_, B>, page: u32) -> (Fingerprint, bool) {
        if inside.backing().is_zero(page) {
            return (Fingerprint::of_zeros(), true);
        }
        let content = &mut *self.scratch;
        inside.backing().read(page, content);
        (Fingerprint::of(content), false)
    }

    /// Reads a calm page of a watched region, and finds out what it could be merged with.
    pub(crate) fn read_and_plan(&mut self, inside: &Entered<'_, B>, page: u32, plan: &mut Plan) {
        let id = inside.region.id();
        let read = self.read_page(inside, page);
        let checksum = read.0.checksum();
        let items = self.items(id);
        if let PageState::Volatile { checksum: seen } = items.state(page)
            && seen != 0
            && seen != checksum
        {
            items.set_backoff(page, items.backoff(page).busy(items.now));
        }
        items.set_state(page, PageState::Volatile { checksum });
        self.plan_calm(id, page, read, plan);
    }

    /// The stable page that a page is likely to be equal to: the one that was founded with it, the
    /// one after its neighbour's, the one that it was mapped to itself before it was written to, or the
    /// one at this place in a region that shared lately. Only if the page begins like it.
    pub(crate) fn guess(
        &self,
        inside: &Entered<'_, B>,
        page: u32,
        plan: &Plan,
    ) -> Option<PoolPage> {
        let neighbours = [plan.guessed.last(), plan.stable.last()];
        let next = neighbours
            .into_iter()
            .flatten()
            .find(|&&(before, _)| before + 1 == page)
            .map(|&(_, pool_page)| pool_page.plus(1));
        let id = inside.region.id();
        let founded = (self.attached.get(&id)).and_then(|attached| attached.items.hint(page));
        let places = std::iter::once(id).chain(self.places.recent());
        founded
            .into_iter()
            .chain(next)
            .chain(places.filter_map(|id| self.pool_page_at(id, page)))
            .filter(|&pool_page| self.stable.sharers_of(pool_page) > 0)
            .find(|&pool_page| inside.backing().may_equal_pool(page, &self.pool, pool_page))
    }

    /// Finds out what a calm page could be merged with.
    pub(crate) fn plan_calm(
        &mut self,
        id: RegionId,
        page: u32,
        (fingerprint, zero): (Fingerprint, bool),
        plan: &mut Plan,
    ) {
        if zero {
            plan.zeros.push(page);
        } else if let Some(pool_page) = self.stable.find(fingerprint) {
            plan.stable.push((page, pool_page));
        } else if plan.founding.contains(&fingerprint) {
            plan.deferred.push((page, fingerprint));
        } else {
            self.find_partner(id, page, fingerprint, plan);
        }
    }

    fn find_partner(&mut self, id: RegionId, page: u32, fingerprint: Fingerprint, plan: &mut Plan) {
        match self.partner(id, page, fingerprint) {
            Some((partner, partner_page)) => {
                plan.founding.insert(fingerprint);
                plan.pairs.push(Pair {
                    page,
                    partner,
                    partner_page,
                    fingerprint,
                });
            }
            None => self.keep_candidate(id, page, fingerprint),
        }
    }

    /// Another page that is calm, alone, and was of this fingerprint when it was visited.
    ///
    /// First the one at this place in a region whose pages were kept lately, by its item: that of
    /// its neighbour was just looked at, while an entry of the index is somewhere in memory, and
    /// taking it out takes as long as hashing the page. The entry stays behind, as stale as that of a
    /// page that was written to.
    fn partner(
        &mut self,
        id: RegionId,
        page: u32,
        fingerprint: Fingerprint,
    ) -> Option<(RegionId, u32)> {
        let attached = &self.attached;
        let is_partner = |&(other, other_page): &(RegionId, u32)| {
            let attached = attached.get(&other);
            (other, other_page) != (id, page)
                && attached.is_some_and(|it| it.is_alone(other_page, fingerprint.checksum()))
        };
        let mut places = self.kept_by.recent().map(|other| (other, page));
        let at_place = places.find(is_partner);
        match at_place {
            Some(_) => self.unstable.leave_behind(),
            None => return self.unstable.take_partner(fingerprint, is_partner),
        }
        at_place
    }

    /// Leaves a calm page in the unstable index, for a later one to find.
    pub(crate) fn keep_candidate(&mut self, id: RegionId, page: u32, fingerprint: Fingerprint) {
        let watched = self.pending(id).is_some();
        self.unstable.insert(fingerprint, (id, page), watched);
        // What else is known of a page holds for one pass only, which its item does not tell.
        if watched {
            self.kept_by.note(id);
        }
        let checksum = fingerprint.checksum();
        self.items(id)
            .set_state(page, PageState::Unshared { checksum });
    }

    /// Accounts for a guest's write to a page that was shared.
    pub(crate) fn unshared_by_guest(&mut self, id: RegionId, page: u32) {
        if let PageState::Stable(pool_page) = self.items(id).state(page) {
            self.stable.drop_sharer(pool_page);
        }
    }
}
