//! Huge pages: split only where enough of one can be shared.
//!
//! A huge page makes its guest faster, and merging any part of it takes that away for the whole of
//! it. So the pages of one are merged together or not at all. KSM splits a huge page for the first
//! page that it merges (`mm/ksm.c`, `try_to_merge_one_page`).

use std::collections::BTreeSet;

use crate::backing::Backing;
use crate::base::complaints::complain;
use crate::index::layouts::block_of;
use crate::merge::domain::Scanner;
use crate::merge::plan::Plan;
use crate::pages::item::PageState;
use crate::pages::region::{Entered, RegionId};

impl<B: Backing> Scanner<B> {
    /// Makes the planned pages ready to be merged one by one: splits the huge page they are part
    /// of, or leaves them out if they are too few. A plan is about one block.
    pub(crate) fn split_for(&mut self, inside: &Entered<'_, B>, plan: &mut Plan) {
        let Some(page) = plan.pages().next() else {
            return;
        };
        if !self.has_huge_page(inside, page) {
            return;
        }
        if plan.pages().count() < self.huge_page_shared_pages_min as usize {
            self.plan_left_out(inside, page, plan);
            self.find_equals(inside, plan);
        }
        if plan.pages().count() < self.huge_page_shared_pages_min as usize {
            self.leave_whole(inside.region.id(), plan);
        } else if plan.base.is_none() {
            // A block that is based is replaced as a whole.
            self.split(inside, page);
        }
    }

    /// Plans the rest of a block's calm pages too: those left out before count towards what it is
    /// worth now. A guest that fills its memory bit by bit would never share any of it otherwise.
    fn plan_left_out(&mut self, inside: &Entered<'_, B>, page: u32, plan: &mut Plan) {
        let planned: BTreeSet<u32> = plan.pages().collect();
        for page in block_of(page, inside.backing().pages()) {
            let state = self.items(inside.region.id()).state(page);
            if !matches!(state, PageState::Unshared { .. }) || planned.contains(&page) {
                continue;
            }
            if inside.is_exiting() {
                return;
            }
            self.read_and_plan(inside, page, plan);
        }
    }

    /// Splits the huge page that a page is part of, if it is of one.
    pub(crate) fn split_if_huge(&self, inside: &Entered<'_, B>, page: u32) {
        if self.has_huge_page(inside, page) {
            self.split(inside, page);
        }
    }

    /// Whether there is a huge page in the block of a page.
    fn has_huge_page(&self, inside: &Entered<'_, B>, page: u32) -> bool {
        let block = block_of(page, inside.backing().pages());
        let has = inside.backing().has_huge_page(block);
        has.unwrap_or_else(|error| {
            let id = inside.region.id().0;
            complain!(Warn, "cannot look for huge pages in region {id}: {error}");
            false
        })
    }

    fn split(&self, inside: &Entered<'_, B>, page: u32) {
        if let Err(error) = inside.backing().split_huge_page(page) {
            // Pinned, as a rule. Merging is right all the same, and memory comes back later.
            let id = inside.region.id().0;
            log::debug!("cannot split a huge page of region {id}: {error}");
        }
    }

    /// Leaves the planned pages as they are until they change. Those who could be partners stay in
    /// the index: with enough of them, a later region founds stable pages that make this one worth
    /// another look.
    fn leave_whole(&mut self, id: RegionId, plan: &mut Plan) {
        let plan = std::mem::take(plan);
        if let Some(first) = plan.base {
            self.stable.layouts.drop_if_unused(first);
        }
        for pair in &plan.pairs {
            let watched = self.pending(pair.partner).is_some();
            let partner = (pair.partner, pair.partner_page);
            self.unstable.insert(pair.fingerprint, partner, watched);
            if self.pending(id).is_some() {
                self.unstable.leave_out(pair.fingerprint, (id, pair.page));
            }
        }
        for page in plan.pages() {
            if let PageState::Volatile { checksum } = self.items(id).state(page) {
                self.items(id)
                    .set_state(page, PageState::Unshared { checksum });
            }
        }
    }
}
