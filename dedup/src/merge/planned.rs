//! The merge itself: what a window's visit planned, tried.
//!
//! What was planned is stale by now: guests ran on. So pages are protected first, compared byte by
//! byte, and only then changed; what changed meanwhile is let go. Pausing the vCPUs for a merge was
//! rejected: it stops every writer of the VM for the sake of a few pages.

use crate::backing::Backing;
use crate::index::fingerprint::Fingerprint;
use crate::index::layouts::place_in;
use crate::merge::apply::{Candidate, Target, report};
use crate::merge::domain::Scanner;
use crate::merge::plan::{Calm, Plan};
use crate::pages::item::PageState;
use crate::pages::region::{Entered, RegionId};

impl<B: Backing> Scanner<B> {
    /// Tries what was planned for a window; then what that showed: pages that are not what they were
    /// guessed to be, and pages with the content of one that just found a stable page.
    pub(crate) fn merge(&mut self, inside: &Entered<'_, B>, plan: &mut Plan) {
        self.find_equals(inside, plan);
        self.split_for(inside, plan);
        let wrongly_guessed = self.merge_planned(inside, plan);
        let mut again = Plan::default();
        for page in wrongly_guessed {
            if inside.is_exiting() {
                return;
            }
            // It may be part of a block that was based since.
            if !self.items(inside.region.id()).is_merged(page) {
                self.read_and_plan(inside, page, &mut again);
            }
        }
        let deferred = plan.deferred.drain(..);
        again.calm.extend(deferred.map(|(page, fingerprint)| Calm {
            page,
            fingerprint,
            may_map: true,
            is_in_run: false,
        }));
        again.calm.sort_unstable_by_key(|calm| calm.page);
        // The founding pair's partner may be this very page.
        let items = self.items(inside.region.id());
        again.calm.retain(|calm| !items.is_merged(calm.page));
        self.find_equals(inside, &mut again);
        self.merge_planned(inside, &mut again);
        plan.later.extend(again.later);
        plan.later
            .extend(again.deferred.iter().map(|&(page, _)| page));
    }

    /// Tries a plan. Returns the pages that were guessed wrongly.
    fn merge_planned(&mut self, inside: &Entered<'_, B>, plan: &mut Plan) -> Vec<u32> {
        let id = inside.region.id();
        let Some(page) = plan.pages().next() else {
            return Vec::new();
        };
        plan.pairs.sort_unstable_by_key(|pair| pair.page);
        let base = self.base_of(id, page).or(plan.base);
        let founded = self.found(inside, &plan.pairs, base);
        let wanted = plan.base;
        if !self.may_build()
            && let Some(first) = plan.base.take()
        {
            // Each run by itself then: merging is what gives memory back.
            self.stable.layouts.drop_if_unused(first);
        }
        if let Some(first) = plan.base {
            let based = self.base(inside, page, Some(first), self.base_pages_min);
            report("base a block", id, based.map(drop));
        }
        if wanted.is_some() && self.base_of(id, page) != wanted {
            self.split_if_huge(inside, page);
        }
        let own = founded.iter().map(|&(pair, place)| (pair.page, place));
        let known = plan.guessed.iter().chain(&plan.stable).copied();
        let mut candidates: Vec<Candidate> = known
            .chain(own)
            .map(|(page, place)| (page, Target::Stable(place)))
            .collect();
        candidates.extend(self.droppable_zeros(id, &plan.zeros));
        let mut unequal = Vec::new();
        if let Some(first) = plan.base
            && self.base_of(id, page) != Some(first)
        {
            // Not one by one what would take one mapping for all. What was guessed is read.
            let is_there =
                |&(page, target): &Candidate| target == Target::Stable(place_in(first, page));
            let dropped = candidates.extract_if(.., |candidate| is_there(candidate));
            unequal.extend(dropped.map(|(page, _)| page));
        }
        // Of a block that was based most are merged by now. Protecting it once more would give a huge
        // page of it a page table.
        let items = self.items(id);
        candidates.retain(|&(page, _)| !items.is_merged(page));
        candidates.sort_unstable_by_key(|&(page, _)| page);
        candidates.dedup_by_key(|&mut (page, _)| page);
        unequal.extend(self.apply(inside, &candidates));
        unequal.sort_unstable();

        let own = self.revisit_partners(id, &plan.pairs, &founded);
        plan.later.extend(own);
        self.revisit_sharers(&founded);
        for &(_, place) in &founded {
            self.stable.drop_sharer(place);
        }
        if let Some(first) = plan.base {
            self.stable.layouts.drop_if_unused(first);
        }
        self.keep_tried(id, plan);
        unequal.retain(|page| plan.guessed.iter().any(|&(guessed, _)| guessed == *page));
        unequal
    }

    /// Those of the pages of zeros that can be dropped one by one. The others count as calm pages,
    /// until there are enough of them in a block to build it anew.
    fn droppable_zeros(&mut self, id: RegionId, zeros: &[u32]) -> Vec<Candidate> {
        let checksum = Fingerprint::of_zeros().checksum();
        let items = self.items(id);
        let mut droppable = Vec::with_capacity(zeros.len());
        for &page in zeros {
            if !items.in_pool_vma(page) {
                droppable.push((page, Target::Zeros));
            } else if !items.is_merged(page) {
                items.set_state(page, PageState::Unshared { checksum });
            }
        }
        droppable
    }

    /// Has pages that were tried and are as they were, for want of memory, say, tried once more.
    fn keep_tried(&mut self, id: RegionId, plan: &mut Plan) {
        let items = self.items(id);
        let stable = plan.guessed.iter().chain(&plan.stable);
        let pairs = plan.pairs.iter().map(|pair| pair.page);
        let tried = stable.map(|&(page, _)| page).chain(pairs);
        let is_left = |page: &u32| matches!(items.state(*page), PageState::Unshared { .. });
        plan.later.extend(tried.filter(is_left));
    }
}
