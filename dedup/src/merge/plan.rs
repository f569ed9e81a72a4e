//! What a window's visit found worth trying, and how a page gets into it.

use crate::backing::Backing;
use crate::base::page::PoolPage;
use crate::index::fingerprint::Fingerprint;
use crate::index::prehashed::FingerprintSet;
use crate::merge::domain::Scanner;
use crate::pages::item::PageState;
use crate::pages::region::{Entered, RegionId};

/// A calm page that was read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Calm {
    pub(crate) page: u32,
    pub(crate) fingerprint: Fingerprint,
    /// Whether it may get a mapping of its own. Not before it was calm for a while: another region may
    /// yet come to hold the same at the same place, which takes none.
    pub(crate) may_map: bool,
    /// Whether it is one of a long run of the pool's.
    pub(crate) is_in_run: bool,
}

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
    pub(crate) guessed: Vec<(u32, PoolPage)>,
    /// Pages that held zeros.
    pub(crate) zeros: Vec<u32>,
    /// Pages that are yet to be looked for elsewhere.
    pub(crate) calm: Vec<Calm>,
    /// Pages whose content is stable already.
    pub(crate) stable: Vec<(u32, PoolPage)>,
    /// Pages that would found a stable page together with a partner.
    pub(crate) pairs: Vec<Pair>,
    /// Pages with the content of one of the pairs: to be looked up again once those are merged.
    pub(crate) deferred: Vec<(u32, Fingerprint)>,
    /// Pages that are to be tried once more at the next visit.
    pub(crate) later: Vec<u32>,
    /// The block of places that the window is to be based on.
    pub(crate) base: Option<PoolPage>,
    pub(crate) founding: FingerprintSet,
}

impl Plan {
    /// Adds a page that found a partner.
    pub(crate) fn pair(&mut self, own: (u32, Fingerprint), partner: (RegionId, u32)) {
        self.pairs.push(Pair {
            page: own.0,
            partner: partner.0,
            partner_page: partner.1,
            fingerprint: own.1,
        });
    }

    /// Every page that is to be merged, in no order.
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
    /// A page's fingerprint, and whether it holds only zeros.
    pub(crate) fn read_page(&mut self, inside: &Entered<'_, B>, page: u32) -> (Fingerprint, bool) {
        if inside.backing().is_zero(page) {
            return (Fingerprint::of_zeros(), true);
        }
        let content = &mut *self.scratch;
        inside.backing().read(page, content);
        (Fingerprint::of(content), false)
    }

    /// Reads a calm page of a watched region, and plans it.
    pub(crate) fn read_and_plan(&mut self, inside: &Entered<'_, B>, page: u32, plan: &mut Plan) {
        let id = inside.region.id();
        let (fingerprint, zero) = self.read_page(inside, page);
        let checksum = fingerprint.checksum();
        let items = self.items(id);
        let before = items.state(page);
        if let PageState::Volatile { checksum: seen } = before
            && seen != 0
            && seen != checksum
        {
            items.set_backoff(page, items.backoff(page).busy(items.now));
        }
        if before.calm_checksum() != Some(checksum) {
            items.set_state(page, PageState::Volatile { checksum });
        }
        self.plan_calm(id, page, fingerprint, zero, plan);
    }

    /// Whether a page may get a mapping of its own now.
    pub(crate) fn may_map(&self, id: RegionId, page: u32) -> bool {
        self.attached.get(&id).is_some_and(|attached| {
            let items = &attached.items;
            let calm = items.backoff(page).elapsed(items.now);
            let is_calm = self.hurried || attached.watch.is_none() || calm >= self.map_after;
            is_calm && items.state(page).calm_checksum().is_some()
        })
    }

    /// Notes what a calm page holds.
    pub(crate) fn plan_calm(
        &self,
        id: RegionId,
        page: u32,
        fingerprint: Fingerprint,
        zero: bool,
        plan: &mut Plan,
    ) {
        if zero {
            plan.zeros.push(page);
            return;
        }
        plan.calm.push(Calm {
            page,
            fingerprint,
            may_map: self.may_map(id, page),
            is_in_run: false,
        });
    }

    /// Leaves a calm page in the unstable index, for a later one to find.
    pub(crate) fn keep_candidate(&mut self, id: RegionId, page: u32, fingerprint: Fingerprint) {
        let watched = self.pending(id).is_some();
        self.unstable.insert(fingerprint, (id, page), watched);
        let checksum = fingerprint.checksum();
        self.items(id)
            .set_state(page, PageState::Unshared { checksum });
    }
}
