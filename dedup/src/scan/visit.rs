//! One window of a region: what became of its pages since the last visit, and what to merge.

use std::io;

use crate::backing::{Backing, Residency};
use crate::base::page::{PageRange, PoolPage};
use crate::index::fingerprint::Fingerprint;
use crate::index::layouts::{block_number, place_in};
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
    /// Visits the pages of a window and merges what can be merged. Returns the pages visited.
    pub(crate) fn scan_window(
        &mut self,
        inside: &Entered<'_, B>,
        window: PageRange,
    ) -> io::Result<u32> {
        let mut plan = Plan::default();
        let changes = self.changes;
        let visited = match self.take_watched(inside.region.id(), window.clone()) {
            Some(pages) => self.visit_watched(inside, &pages, &mut plan)?,
            None => self.visit(inside, window.clone(), &mut plan)?,
        };
        self.pages_scanned += u64::from(visited);
        self.merge(inside, &mut plan);
        let page = window.start;
        self.settle_watched(inside, window, &plan.later);
        self.heal(inside, page);
        if self.changes > changes
            && let Some(attached) = self.attached(inside.region.id())
        {
            attached.looks.hasten();
        }
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
                Residency::Pool => visited += crate::base::page::range_pages(&range),
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
        items.state(page).is_volatile() && !hurried && !items.backoff(page).is_due(items.now)
    }

    fn visit_private(&mut self, inside: &Entered<'_, B>, page: u32, plan: &mut Plan) {
        let id = inside.region.id();
        let (fingerprint, zero) = self.read_page(inside, page);
        let checksum = fingerprint.checksum();
        let before = self.items(id).state(page);
        let calm = match before {
            PageState::Volatile { checksum: seen }
            | PageState::Unshared { checksum: seen }
            | PageState::LeftOut { checksum: seen } => seen == checksum,
            _ => false,
        };
        if !calm {
            self.unshared_by_guest(id, page);
            let items = self.items(id);
            items.set_state(page, PageState::Volatile { checksum });
            if let PageState::Volatile { .. } | PageState::Unshared { .. } = before {
                items.set_backoff(page, items.backoff(page).changed(items.now));
            }
            self.changes += u64::from(!before.is_volatile());
            return;
        }
        self.changes += u64::from(before.calm_checksum().is_none());
        self.plan_calm(id, page, fingerprint, zero, plan);
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

    /// The stable page that a page is likely to be equal to: the one that it is mapped to and was written
    /// over, or the one at its place. Only if the page begins like it.
    pub(crate) fn guess(&self, inside: &Entered<'_, B>, page: u32) -> Option<PoolPage> {
        let id = inside.region.id();
        let items = &self.attached.get(&id)?.items;
        let blocks = match self.base_of(id, page) {
            Some(_) => &[],
            None => self.stable.layouts.blocks_of(block_number(page)),
        };
        let places = blocks.iter().map(|&first| place_in(first, page));
        (items.pool_page_under(page).into_iter())
            .chain(places)
            .filter(|&pool_page| self.stable.sharers_of(pool_page) > 0)
            .find(|&pool_page| inside.backing().may_equal_pool(page, &self.pool, pool_page))
    }

    /// Notes what a calm page holds.
    fn plan_calm(
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

    /// Accounts for a guest's write to a page that was shared.
    pub(crate) fn unshared_by_guest(&mut self, id: RegionId, page: u32) {
        if let PageState::Stable(pool_page) = self.items(id).state(page) {
            self.stable.drop_sharer(pool_page);
        }
    }
}
