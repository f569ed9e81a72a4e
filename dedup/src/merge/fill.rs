//! Filling places: content that two pages share becomes a page of the pool.
//!
//! The copy comes first, and protection after it: to get memory for a run of pages and to fill it
//! takes longer than a writer may wait. A page that is written to while it is copied may be torn;
//! the copy is then of another name than the page was found by, and is given up. What remains is a
//! stable page like any other, which the pair is compared with under protection.

use std::io;

use crate::backing::{Backing, Pool};
use crate::base::page::{PageRange, PoolPage, runs};
use crate::index::layouts::{block_number, place_in};
use crate::merge::apply::{report, run_len};
use crate::merge::domain::Scanner;
use crate::merge::group::GROUP_PAGES_MAX;
use crate::merge::plan::Pair;
use crate::pages::backoff::Interval;
use crate::pages::item::PageState;
use crate::pages::region::{Entered, RegionId};

/// A pair, and the stable page that holds what it was found by.
pub(crate) type Founded = (Pair, PoolPage);

impl<B: Backing> Scanner<B> {
    /// Founds stable pages for pairs, which are ascending by page: each at its founder's place, in the
    /// block that the founder is based on if that is free. The caller is a sharer of each, and must
    /// leave them.
    pub(crate) fn found(
        &mut self,
        inside: &Entered<'_, B>,
        pairs: &[Pair],
        base: Option<PoolPage>,
    ) -> Vec<Founded> {
        if inside.is_exiting() || pairs.is_empty() {
            return Vec::new();
        }
        let id = inside.region.id();
        // What the budget has no room for is tried later.
        let (_reserved, granted) = self.budget.reserve_for_merge(run_len(pairs));
        let (pairs, put_off) = pairs.split_at(granted as usize);
        for pair in put_off {
            self.keep_candidate(id, pair.page, pair.fingerprint);
        }
        let mut placed: Vec<Founded> = Vec::with_capacity(pairs.len());
        for pair in pairs {
            let last = placed.last().filter(|(last, _)| last.page + 1 == pair.page);
            let next = last.map(|&(_, place)| place.plus(1));
            placed.extend(
                self.claim_place(id, pair, base, next)
                    .map(|place| (*pair, place)),
            );
        }
        if let Err(error) = self.copy(inside, &placed) {
            for &(_, place) in &placed {
                self.stable.abandon(place);
            }
            report("found stable pages", id, Err(error));
            return Vec::new();
        }
        let mut founded = Vec::with_capacity(placed.len());
        for (pair, place) in placed {
            // What the copy holds is what counts: its guest runs on, and an exit may have freed it.
            let is_right = self.pool.fingerprint(place) == pair.fingerprint;
            if is_right && self.is_held_by_partner(inside, &pair, place) {
                self.stable.insert(place, pair.fingerprint);
                self.stable.add_sharer(place);
                founded.push((pair, place));
            } else {
                self.stable.abandon(place);
                // One that is known there is to be found when this page is tried again.
                let own = (id, pair.page);
                if self.unstable.another(pair.fingerprint, own).is_none() {
                    self.keep_candidate(id, pair.page, pair.fingerprint);
                }
            }
        }
        founded
    }

    /// Fills empty places of the block that begins at `first` with what pages of a guest's block share
    /// in other blocks of places: its mappings there are needless then. What was in such a place when they were made,
    /// nobody shares any more. The caller is a sharer of each place returned, and must leave it.
    pub(crate) fn refill(
        &mut self,
        inside: &Entered<'_, B>,
        block: &PageRange,
        first: PoolPage,
    ) -> Vec<PoolPage> {
        let id = inside.region.id();
        let mut wanted = Vec::new();
        for page in block.clone() {
            if let PageState::Stable(pool_page) = self.items(id).state(page)
                && let Some(fingerprint) = self.stable.fingerprint(pool_page)
                && self.can_move(page, pool_page, place_in(first, page))
            {
                wanted.push((page, fingerprint));
            }
        }
        let (_reserved, granted) = self.budget.reserve_for_merge(run_len(&wanted));
        wanted.truncate(granted as usize);
        wanted.retain(|&(page, _)| self.stable.claim(place_in(first, page)));
        let mut filled = Vec::with_capacity(wanted.len());
        for run in runs(&wanted, GROUP_PAGES_MAX as usize, |a, b| a.0 + 1 == b.0) {
            let range = run[0].0..run[0].0 + run_len(run);
            let place = place_in(first, range.start);
            let copied = inside.backing().fill(range, &self.pool, place);
            for &(page, fingerprint) in run {
                let place = place_in(first, page);
                // Its guest may have written to it, and an exit may have freed it.
                if copied.is_ok() && self.pool.fingerprint(place) == fingerprint {
                    self.stable.insert(place, fingerprint);
                    self.stable.add_sharer(place);
                    filled.push(place);
                } else {
                    self.stable.abandon(place);
                }
            }
            report("fill places anew", id, copied);
        }
        filled
    }

    /// Whether a page's place is empty, and its stable page lies at the place of another block. Whoever
    /// shares that can come along, so that the content moves. One that lies elsewhere would be there twice.
    pub(crate) fn can_move(&self, page: u32, pool_page: PoolPage, place: PoolPage) -> bool {
        self.stable.is_empty(place) && self.stable.layouts.guest_page(pool_page) == Some(page)
    }

    /// Whether a pair's partner holds what was copied. Of what it held when it was last read only 16
    /// bits are known.
    fn is_held_by_partner(&self, inside: &Entered<'_, B>, pair: &Pair, place: PoolPage) -> bool {
        let holds = |partner: &Entered<'_, B>| {
            let backing = partner.backing();
            backing.equals_pool(pair.partner_page, &self.pool, place)
        };
        if pair.partner == inside.region.id() {
            return holds(inside);
        }
        let partner = self.region(pair.partner);
        let entered = partner.as_ref().and_then(|region| region.enter());
        entered.is_some_and(|entered| holds(&entered))
    }

    /// Takes an empty place for a pair; `None` when the pool is full. A pair of two places has one
    /// next to what its neighbours are mapped to, or that of the older region: the pool then keeps the
    /// order of one guest's memory, in which the others find runs.
    fn claim_place(
        &mut self,
        id: RegionId,
        pair: &Pair,
        base: Option<PoolPage>,
        next: Option<PoolPage>,
    ) -> Option<PoolPage> {
        let (partner, partner_page) = (pair.partner, pair.partner_page);
        let is_same_place = partner_page == pair.page;
        let (page, base) = if is_same_place || id < partner {
            (pair.page, base)
        } else {
            (partner_page, self.base_of(partner, partner_page))
        };
        let number = block_number(page);
        let blocks = self.stable.layouts.blocks_of(number).iter().copied();
        let homes = base.into_iter().chain(blocks);
        let homes = homes.map(|first| place_in(first, page));
        let mut nearby = Vec::new();
        if !is_same_place {
            nearby.extend(next);
            nearby.extend(self.next_places(id, pair.page));
            nearby.extend(self.next_places(partner, partner_page));
        }
        let mut places = nearby.into_iter().chain(homes);
        let place = match places.find(|&place| self.stable.is_empty(place)) {
            Some(place) => place,
            None => place_in(self.stable.layouts.add(number)?, page),
        };
        self.stable.claim(place).then_some(place)
    }

    /// The places that would lengthen what a page's neighbours are mapped to.
    pub(crate) fn next_places(&self, id: RegionId, page: u32) -> Vec<PoolPage> {
        let Some(attached) = self.attached.get(&id) else {
            return Vec::new();
        };
        let items = &attached.items;
        let stable = |page: u32| match items.state(page) {
            PageState::Stable(pool_page) => Some(pool_page),
            _ => None,
        };
        let left = page
            .checked_sub(1)
            .and_then(stable)
            .map(|place| place.plus(1));
        let right = Some(page + 1)
            .filter(|&page| page < items.pages())
            .and_then(stable);
        let right = right.and_then(|place| place.0.checked_sub(1)).map(PoolPage);
        left.into_iter().chain(right).collect()
    }

    fn copy(&self, inside: &Entered<'_, B>, placed: &[Founded]) -> io::Result<()> {
        let is_next = |a: &Founded, b: &Founded| a.0.page + 1 == b.0.page && a.1.plus(1) == b.1;
        for run in runs(placed, GROUP_PAGES_MAX as usize, is_next) {
            let (pair, first) = run[0];
            let range = pair.page..pair.page + run_len(run);
            inside.backing().fill(range, &self.pool, first)?;
        }
        Ok(())
    }

    /// Has everybody else who lies over places that were just filled, and held the same when it was
    /// last read, tried once more. Partners that were not merged too.
    pub(crate) fn revisit_sharers(&mut self, founded: &[Founded]) {
        for &(pair, place) in founded {
            let checksum = pair.fingerprint.checksum();
            // The place may be that of the pair's partner, or of neither.
            let Some(page) = self.stable.layouts.guest_page(place) else {
                continue;
            };
            for attached in self.attached.values_mut() {
                let items = &attached.items;
                let lies_there = items.knows_block(page)
                    && items.pool_page_under(page) == Some(place)
                    && items.state(page).calm_checksum() == Some(checksum);
                if let Some(watch) = attached.watch.as_mut().filter(|_| lies_there) {
                    watch.pending.insert(page);
                    attached.looks.hasten();
                }
            }
        }
    }

    /// Has the partners of pairs tried, at the visit of their own region. Not at once: to protect and
    /// release the few that lie there takes longer than to look at them once more. Or puts a partner
    /// back into the index, if the one that found it was left out for want of VMAs: they would find
    /// each other in each pass, for ever. Returns those that lie in the region in hand.
    pub(crate) fn revisit_partners(
        &mut self,
        id: RegionId,
        pairs: &[Pair],
        founded: &[Founded],
    ) -> Vec<u32> {
        let mut own = Vec::new();
        for pair in pairs {
            // A partner's region may have left since.
            if self.pending(pair.partner).is_none() {
                continue;
            }
            let partner = (pair.partner, pair.partner_page);
            if let PageState::LeftOut { .. } = self.items(id).state(pair.page) {
                self.unstable.insert(pair.fingerprint, partner, true);
                continue;
            }
            let state = self.items(pair.partner).state(pair.partner_page);
            if state.calm_checksum().is_some() {
                self.map_now(partner);
                own.extend((pair.partner == id).then_some(pair.partner_page));
            }
        }
        let woken = founded
            .iter()
            .filter_map(|(pair, _)| self.wake_alone(id, pair));
        own.extend(woken);
        own
    }

    /// Has the page tried once more that was left in the index with a content which is stable now.
    /// Returns it if it lies in the region in hand.
    fn wake_alone(&mut self, id: RegionId, pair: &Pair) -> Option<u32> {
        let known = [(id, pair.page), (pair.partner, pair.partner_page)];
        let attached = &self.attached;
        let alone = self.unstable.take_partner(pair.fingerprint, |page| {
            let attached = attached.get(&page.0);
            let checksum = pair.fingerprint.checksum();
            !known.contains(page) && attached.is_some_and(|it| it.is_alone(page.1, checksum))
        });
        self.map_now(alone?);
        alone
            .filter(|&(other, _)| other == id)
            .map(|(_, page)| page)
    }

    /// Has a calm page tried at its next visit, which need not wait any more to be mapped elsewhere.
    fn map_now(&mut self, (id, page): (RegionId, u32)) {
        let map_after = self.map_after;
        let Some(attached) = self.attached(id) else {
            return;
        };
        if let Some(watch) = &mut attached.watch {
            watch.pending.insert(page);
            attached.looks.hasten();
            let items = &mut attached.items;
            let since = Interval(items.now.0.wrapping_sub(u32::from(map_after)));
            items.set_backoff(page, items.backoff(page).calmed(since));
        }
    }
}
