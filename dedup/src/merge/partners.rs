//! Where a window's calm pages find their equals: at the same place first, elsewhere after that.

use crate::backing::Backing;
use crate::base::page::{PoolPage, runs};
use crate::index::fingerprint::Fingerprint;
use crate::index::layouts::{block_number, block_of, place_in};
use crate::merge::apply::run_len;
use crate::merge::domain::Scanner;
use crate::merge::plan::{Calm, Plan};
use crate::pages::item::PageState;
use crate::pages::region::{Entered, RegionId};

/// Regions that are asked what they hold at a place. Of fleets with several images, this many
/// neighbours hold one of the same image nearly for sure.
const PEERS_MAX: usize = 16;

/// Guesses of a block that are looked at before it is based because of them.
const SAMPLE_PAGES: usize = 16;

/// Pages of a run from which on it is mapped before it was calm for long.
const RUN_PAGES_MIN: usize = 16;

/// What a run in the middle of a mapping adds: its own mapping, and that of what is behind it.
const VMAS_OF_RUN: i64 = 2;

/// Where an equal page is known.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Equal {
    Stable(PoolPage),
    Unstable(RegionId, u32),
}

impl Equal {
    /// The page after it.
    fn next(self) -> Equal {
        match self {
            Equal::Stable(pool_page) => Equal::Stable(pool_page.plus(1)),
            Equal::Unstable(id, page) => Equal::Unstable(id, page + 1),
        }
    }
}

impl<B: Backing> Scanner<B> {
    /// Decides what becomes of the calm pages of a window: they equal a place or another stable page,
    /// found a stable page with a partner, or are left for a later page to find.
    pub(crate) fn find_equals(&mut self, inside: &Entered<'_, B>, plan: &mut Plan) {
        let id = inside.region.id();
        let calm = std::mem::take(&mut plan.calm);
        let page = match (calm.first(), plan.guessed.first()) {
            (Some(calm), _) => calm.page,
            (None, Some(&(page, _))) => page,
            (None, None) => return,
        };
        let peers = self.peers(id, page);
        let with_peers: Vec<(Calm, Option<RegionId>)> = calm
            .into_iter()
            .map(|calm| {
                let checksum = calm.fingerprint.checksum();
                (calm, self.peer_of(&peers, calm.page, checksum))
            })
            .collect();
        let base = self.base_of(id, page);
        if base.is_none() && plan.base.is_none() {
            plan.base = self.choose_block(inside, plan, &with_peers);
        }
        let base = base.or(plan.base);
        self.read_far_guesses(inside, base, plan);
        let read = std::mem::take(&mut plan.calm);
        let with_peers = with_peers
            .into_iter()
            .chain(read.into_iter().map(|calm| (calm, None)));
        let place_of = |page: u32| base.map(|first| place_in(first, page));
        let mut open = Vec::new();
        for (calm, peer) in with_peers {
            match place_of(calm.page) {
                Some(place) if self.stable.fingerprint(place) == Some(calm.fingerprint) => {
                    plan.stable.push((calm.page, place));
                }
                _ => open.push((calm, peer)),
            }
        }
        open.sort_unstable_by_key(|(calm, _)| calm.page);
        self.hasten_runs(id, &mut open);
        for (calm, peer) in open {
            let place = place_of(calm.page);
            let extends = self.next_stable(id, &calm, plan);
            if let Some(next) = extends {
                plan.stable.push((calm.page, next));
            } else if let Some(peer) = peer
                && !calm.is_in_run
                && place.is_some_and(|place| self.stable.is_empty(place))
            {
                plan.pair((calm.page, calm.fingerprint), (peer, calm.page));
            } else {
                self.find_elsewhere(id, calm, plan);
            }
        }
        if plan.base.is_some() {
            self.plan_known(inside, page, plan);
        }
    }

    /// Guesses that would take mappings are given up.
    fn read_far_guesses(
        &mut self,
        inside: &Entered<'_, B>,
        base: Option<PoolPage>,
        plan: &mut Plan,
    ) {
        let id = inside.region.id();
        for (page, pool_page) in std::mem::take(&mut plan.guessed) {
            let items = self.items(id);
            let is_near = items.pool_page_under(page) == Some(pool_page)
                || base.is_some_and(|first| place_in(first, page) == pool_page);
            if is_near {
                plan.guessed.push((page, pool_page));
            } else {
                self.read_and_plan(inside, page, plan);
            }
        }
    }

    /// Regions that may hold the same at the same place: those that registered just before or after,
    /// which are often of the same image.
    fn peers(&self, id: RegionId, page: u32) -> Vec<RegionId> {
        let knowing = (self.attached.iter()).filter(|(_, it)| it.items.knows_block(page));
        let others = knowing
            .map(|(&other, _)| other)
            .filter(|&other| other != id);
        let mut peers: Vec<RegionId> = others.collect();
        peers.sort_unstable_by_key(|&other| (other > id, other.0.abs_diff(id.0)));
        peers.truncate(PEERS_MAX);
        peers
    }

    /// A peer whose page of this number was of this checksum when it was last read.
    fn peer_of(&self, peers: &[RegionId], page: u32, checksum: u32) -> Option<RegionId> {
        let holds = |peer: &&RegionId| {
            let items = self.attached.get(peer).map(|attached| &attached.items);
            let state = items.filter(|items| items.knows_block(page));
            state.is_some_and(|items| match items.state(page) {
                PageState::Stable(pool_page) => {
                    let held = self.stable.fingerprint(pool_page);
                    held.map(Fingerprint::checksum) == Some(checksum)
                }
                state => state.calm_checksum() == Some(checksum),
            })
        };
        peers.iter().find(holds).copied()
    }

    /// The block of places that a block is worth being based on; a new one if most of what it could
    /// share has no place yet in those that there are.
    fn choose_block(
        &mut self,
        inside: &Entered<'_, B>,
        plan: &Plan,
        calm: &[(Calm, Option<RegionId>)],
    ) -> Option<PoolPage> {
        let id = inside.region.id();
        let page = (calm.first().map(|(calm, _)| calm.page))
            .or(plan.guessed.first().map(|&(page, _)| page))?;
        let block = block_of(page, inside.backing().pages());
        let number = block_number(page);
        let with_peer = calm.iter().filter(|(_, peer)| peer.is_some()).count();
        let is_new = |page: &u32| {
            let of_calm = calm.binary_search_by_key(page, |(calm, _)| calm.page);
            let guessed = plan.guessed.binary_search_by_key(page, |&(page, _)| page);
            of_calm.is_err() && guessed.is_err()
        };
        let items = &self.attached.get(&id)?.items;
        // Those that found no equal before, and may find one now.
        let others: Vec<(u32, u32)> = block
            .filter(is_new)
            .filter_map(|page| Some((page, items.state(page).calm_checksum()?)))
            .collect();
        let known = match with_peer {
            0 => 0,
            _ => {
                let peers = self.peers(id, page);
                let has_peer = |&&(page, checksum): &&(u32, u32)| {
                    self.peer_of(&peers, page, checksum).is_some()
                };
                others.iter().filter(has_peer).count()
            }
        };
        let new = with_peer + known;
        let gain = |first: PoolPage| {
            let of_calm = calm.iter().filter(|(calm, peer)| {
                let place = place_in(first, calm.page);
                let held = self.stable.fingerprint(place);
                held == Some(calm.fingerprint) || peer.is_some() && self.stable.is_empty(place)
            });
            let of_others = others.iter().filter(|&&(page, checksum)| {
                let held = self.stable.fingerprint(place_in(first, page));
                held.map(Fingerprint::checksum) == Some(checksum)
            });
            of_calm.count() + of_others.count() + self.sample(inside, &plan.guessed, first)
        };
        let pages_min = self.base_pages_min as usize;
        let blocks = self.stable.layouts.blocks_of(number).iter();
        let best = blocks.map(|&first| (gain(first), first)).max();
        match best {
            Some((gain, first)) if gain >= pages_min && gain >= new / 4 * 3 => Some(first),
            _ if new >= pages_min => self.stable.layouts.add(number),
            _ => None,
        }
    }

    /// About how many of the guessed pages equal their places in a block: many begin alike that do
    /// not go on so.
    fn sample(
        &self,
        inside: &Entered<'_, B>,
        guessed: &[(u32, PoolPage)],
        first: PoolPage,
    ) -> usize {
        let there: Vec<(u32, PoolPage)> = (guessed.iter().copied())
            .filter(|&(page, pool_page)| pool_page == place_in(first, page))
            .collect();
        let sampled = there.iter().step_by(there.len() / SAMPLE_PAGES + 1);
        let equals = |&&(page, place): &&(u32, PoolPage)| {
            inside.backing().equals_pool(page, &self.pool, place)
        };
        let equal = sampled.clone().filter(equals).count();
        there.len() * equal / sampled.len().max(1)
    }

    /// A block that is to be based takes along what found no equal before, and has one in a peer now.
    fn plan_known(&mut self, inside: &Entered<'_, B>, page: u32, plan: &mut Plan) {
        let id = inside.region.id();
        let Some(first) = plan.base else {
            return;
        };
        let peers = self.peers(id, page);
        let planned: std::collections::BTreeSet<u32> = plan.pages().collect();
        for page in block_of(page, inside.backing().pages()) {
            let Some(checksum) = self.items(id).state(page).calm_checksum() else {
                continue;
            };
            let may_pair = self.stable.is_empty(place_in(first, page)) && !planned.contains(&page);
            let partner = self.peer_of(&peers, page, checksum);
            let Some(partner) = partner.filter(|_| may_pair) else {
                continue;
            };
            let (fingerprint, zero) = self.read_page(inside, page);
            if !zero && fingerprint.checksum() == checksum {
                plan.pair((page, fingerprint), (partner, page));
            }
        }
    }

    /// Has ascending calm pages mapped at once that are a long run of another region's pages, or of the
    /// pool's, if there are mappings for that: it takes one. To fill the places of the latter too would
    /// take a page for each.
    fn hasten_runs(&self, id: RegionId, open: &mut [(Calm, Option<RegionId>)]) {
        let equals: Vec<(u32, Option<Equal>)> = open
            .iter()
            .map(|(calm, _)| (calm.page, self.equal_of(id, calm)))
            .collect();
        let is_next = |a: &(u32, Option<Equal>), b: &(u32, Option<Equal>)| {
            a.0 + 1 == b.0 && a.1.is_some_and(|equal| b.1 == Some(equal.next()))
        };
        let mut rest = open;
        for run in runs(&equals, usize::MAX, is_next) {
            let (mine, others) = rest.split_at_mut(run.len());
            if run.len() >= RUN_PAGES_MIN && self.takes_vmas(VMAS_OF_RUN, run_len(run)) {
                let is_in_run = matches!(run[0].1, Some(Equal::Stable(_)));
                for (calm, _) in mine {
                    (calm.may_map, calm.is_in_run) = (true, is_in_run);
                }
            }
            rest = others;
        }
    }

    /// Where an equal of a calm page is known.
    fn equal_of(&self, id: RegionId, calm: &Calm) -> Option<Equal> {
        let stable = self.stable.find(calm.fingerprint);
        let other = || self.unstable.another(calm.fingerprint, (id, calm.page));
        stable
            .map(Equal::Stable)
            .or_else(|| other().map(|(id, page)| Equal::Unstable(id, page)))
    }

    /// A stable page that lengthens what a neighbour of an equal page is mapped to, or is about to be.
    /// It takes no mapping of its own, so it need not wait until the page was calm for long.
    fn next_stable(&self, id: RegionId, calm: &Calm, plan: &Plan) -> Option<PoolPage> {
        let is_left_out = matches!(
            self.attached.get(&id)?.items.state(calm.page),
            PageState::LeftOut { .. }
        );
        // The account does not know that the kernel joins the two.
        if !self.takes_vmas(1, 1) || is_left_out && !self.vmas.have_plenty() {
            return None;
        }
        let last = plan.stable.last().filter(|last| last.0 + 1 == calm.page);
        let last = last.map(|&(_, place)| place.plus(1));
        let mut next = last.into_iter().chain(self.next_places(id, calm.page));
        next.find(|&place| self.stable.fingerprint(place) == Some(calm.fingerprint))
    }

    /// Looks for an equal of a page at any other place.
    fn find_elsewhere(&mut self, id: RegionId, calm: Calm, plan: &mut Plan) {
        let (page, fingerprint) = (calm.page, calm.fingerprint);
        let stable = self.stable.find(fingerprint);
        let is_left_out = matches!(self.items(id).state(page), PageState::LeftOut { .. });
        if is_left_out && !self.vmas.have_plenty() {
            // It was tried, and costs more than it saves as long as it stays as it is.
        } else if !calm.may_map || self.vmas.are_refused() {
            let checksum = fingerprint.checksum();
            let other = self.unstable.another(fingerprint, (id, page));
            let only = self.unstable.only_other(fingerprint, (id, page));
            let younger = only.filter(|only| only.0 > id && stable.is_none());
            if let Some((other, other_page)) = younger {
                // The index keeps the oldest, whose place it is to be.
                self.keep_candidate(id, page, fingerprint);
                let attached = self.attached(other).into_iter();
                let alone = attached.filter(|it| it.is_alone(other_page, checksum));
                alone.for_each(|it| it.will_map(other_page, checksum));
            } else if stable.is_some() || plan.founding.contains(&fingerprint) || other.is_some() {
                // Not in the index: the one that is known there must be found then.
                let attached = self.attached(id).into_iter();
                attached.for_each(|attached| attached.will_map(page, checksum));
            } else {
                self.keep_candidate(id, page, fingerprint);
            }
        } else if let Some(pool_page) = stable {
            plan.stable.push((page, pool_page));
        } else if plan.founding.contains(&fingerprint) {
            plan.deferred.push((page, fingerprint));
        } else if let Some(partner) = self.partner(id, page, fingerprint) {
            plan.founding.insert(fingerprint);
            plan.pair((page, fingerprint), partner);
        } else {
            self.keep_candidate(id, page, fingerprint);
        }
    }

    /// Another page that is calm, alone, and was of this fingerprint when it was visited.
    fn partner(
        &mut self,
        id: RegionId,
        page: u32,
        fingerprint: Fingerprint,
    ) -> Option<(RegionId, u32)> {
        let attached = &self.attached;
        self.unstable
            .take_partner(fingerprint, |&(other, other_page)| {
                let attached = attached.get(&other);
                (other, other_page) != (id, page)
                    && attached.is_some_and(|it| it.is_alone(other_page, fingerprint.checksum()))
            })
    }
}
