//! Making pages what they are to become: group, protect, compare again, apply, wake.
//!
//! A page that lies over the place that it equals only has to lose its private copy, as has a page of
//! zeros that lies over nothing. All of these in a group are dropped by one call. What equals a page
//! of the pool elsewhere is mapped there, a run at a time.

use std::io;

use crate::backing::Backing;
use crate::base::complaints::complain;
use crate::base::page::{PageRange, PoolPage, runs};
use crate::index::fingerprint::Fingerprint;
use crate::merge::domain::Scanner;
use crate::merge::group::{self, DISCARD_NS, MAP_NS};
use crate::merge::protected::Protected;
use crate::pages::item::PageState;
use crate::pages::region::{Entered, RegionId};
use crate::pages::region_items::Items;

/// What a page is to become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// Zeros that take no memory. For a page that lies over no page of the pool only.
    Zeros,
    /// A sharer of a stable page.
    Stable(PoolPage),
}

/// A guest page, and what it may be equal to.
pub(crate) type Candidate = (u32, Target);

/// Whether a page becomes its target by losing its private copy.
fn is_under(items: &Items, &(page, target): &Candidate) -> bool {
    match target {
        Target::Zeros => !items.in_pool_vma(page),
        Target::Stable(pool_page) => items.pool_page_under(page) == Some(pool_page),
    }
}

/// Whether two candidates are applied by one call on one range.
fn joins(items: &Items, before: &Candidate, after: &Candidate) -> bool {
    let is_next = match (before.1, after.1) {
        (Target::Zeros, Target::Zeros) => true,
        (Target::Stable(one), Target::Stable(other)) => one.plus(1) == other,
        _ => false,
    };
    before.0 + 1 == after.0
        && (is_next || is_under(items, before))
        && is_under(items, before) == is_under(items, after)
}

/// How many of the ascending candidates, at least one, are protected together.
fn group_len(items: &Items, candidates: &[Candidate]) -> usize {
    group::len(
        candidates,
        |&(page, _)| page,
        |before, after| match (joins(items, before, after), is_under(items, after)) {
            (true, _) => 0,
            (false, true) => DISCARD_NS,
            (false, false) => MAP_NS,
        },
    )
}

impl<B: Backing> Scanner<B> {
    /// Makes every ascending candidate what it is to become, if it is equal to that. Returns those
    /// that are not.
    pub(crate) fn apply(&mut self, inside: &Entered<'_, B>, candidates: &[Candidate]) -> Vec<u32> {
        let id = inside.region.id();
        let mut unequal = Vec::new();
        let mut rest = candidates;
        while !rest.is_empty() {
            let len = group_len(self.items(id), rest);
            let tried = self.apply_group(inside, &rest[..len], &mut unequal);
            let tried_len = *tried.as_ref().unwrap_or(&len);
            report("merge pages", id, tried.map(drop));
            rest = &rest[tried_len..];
        }
        unequal
    }

    /// Applies candidates under one protection. Returns how many were tried, at least one: the others
    /// would have writers wait for too long, because of what was written to meanwhile.
    fn apply_group(
        &mut self,
        inside: &Entered<'_, B>,
        group: &[Candidate],
        unequal: &mut Vec<u32>,
    ) -> io::Result<usize> {
        if inside.is_exiting() {
            return Ok(group.len());
        }
        let id = inside.region.id();
        let range = group[0].0..group[group.len() - 1].0 + 1;
        let mut protected = Protected::new(inside, range)?;
        let (equal, others) = self.compare(inside, &protected, group);
        let items = self.items(id);
        let len = group_len(items, &equal);
        let tried_len = match equal.get(len) {
            Some(next) => group.partition_point(|candidate| candidate.0 < next.0),
            None => group.len(),
        };
        let (to_drop, to_map): (Vec<_>, Vec<_>) =
            runs(&equal[..len], usize::MAX, |a, b| joins(items, a, b))
                .partition(|run| is_under(items, &run[0]));
        let tried = group[tried_len - 1].0;
        unequal.extend(others.into_iter().filter(|&page| page <= tried));
        self.drop_copies(&mut protected, id, &to_drop)?;
        for run in to_map {
            // Else its exit, which has freed its memory by now, would be given some again.
            if inside.is_exiting() {
                break;
            }
            self.map(&mut protected, id, run)?;
        }
        Ok(tried_len)
    }

    /// The candidates of a protected group that are equal to their targets, and the pages that are
    /// not. A pinned page is neither: a device may be writing to it.
    fn compare(
        &mut self,
        inside: &Entered<'_, B>,
        protected: &Protected<'_, B>,
        group: &[Candidate],
    ) -> (Vec<Candidate>, Vec<u32>) {
        let id = inside.region.id();
        let (mut equal, mut others) = (Vec::with_capacity(group.len()), Vec::new());
        for &(page, target) in group {
            // A page that founded a stable page may have been its own region's partner.
            if self.items(id).is_merged(page) || protected.is_pinned(page) {
                continue;
            }
            let is_equal = match target {
                Target::Zeros => inside.backing().is_zero(page),
                // Its last sharer may have left it since the window's visit.
                Target::Stable(pool_page) => {
                    self.stable.sharers_of(pool_page) > 0
                        && inside.backing().equals_pool(page, &self.pool, pool_page)
                }
            };
            match is_equal {
                true => equal.push((page, target)),
                false => others.push(page),
            }
        }
        (equal, others)
    }

    /// Drops the copies of compared runs of a protected range, all by one call if the kernel can.
    fn drop_copies(
        &mut self,
        protected: &mut Protected<'_, B>,
        id: RegionId,
        runs: &[&[Candidate]],
    ) -> io::Result<()> {
        let parts: Vec<PageRange> = runs.iter().map(|run| span(run)).collect();
        let mut done = 0;
        while done < parts.len() {
            let more = protected.discard(&parts[done..])?;
            for run in &runs[done..done + more] {
                self.note_merged(id, run);
            }
            done += more;
        }
        Ok(())
    }

    /// Maps a compared run of a protected range to stable pages, within the VMA budget.
    fn map(
        &mut self,
        protected: &mut Protected<'_, B>,
        id: RegionId,
        run: &[Candidate],
    ) -> io::Result<()> {
        let Some(&(_, Target::Stable(first))) = run.first() else {
            return Ok(());
        };
        let range = span(run);
        let added = self.items(id).vmas_added_by_remap(&range);
        if !self.takes_vmas(added, run_len(run)) {
            // What the kernel refuses just now is tried in the next pass.
            if !self.vmas.are_refused() {
                self.leave_out(id, run);
            }
            return Ok(());
        }
        let mapped = protected.map(&self.pool, &range, first);
        self.vmas.note_tried(added, &mapped);
        mapped?;
        self.remap(id, &range, Some(first));
        self.note_merged(id, run);
        Ok(())
    }

    /// Leaves pages out until they change: trying again in each pass would cost CPU.
    fn leave_out(&mut self, id: RegionId, run: &[Candidate]) {
        for &(page, target) in run {
            if let Target::Stable(pool_page) = target {
                let fingerprint = self.stable.fingerprint(pool_page);
                let checksum = fingerprint.map_or(0, Fingerprint::checksum);
                let left_out = PageState::LeftOut { checksum };
                self.items(id).set_state(page, left_out);
            }
        }
    }

    /// Accounts for pages that are what they were to become.
    fn note_merged(&mut self, id: RegionId, run: &[Candidate]) {
        for &(page, target) in run {
            let state = match target {
                Target::Zeros => PageState::Zero,
                Target::Stable(pool_page) => {
                    self.stable.add_sharer(pool_page);
                    PageState::Stable(pool_page)
                }
            };
            self.items(id).set_state(page, state);
        }
        self.changes += u64::from(run_len(run));
    }
}

/// All pages of a run.
fn span(run: &[Candidate]) -> PageRange {
    run[0].0..run[0].0 + run_len(run)
}

pub(crate) fn run_len<T>(run: &[T]) -> u32 {
    u32::try_from(run.len()).unwrap_or(u32::MAX)
}

/// A merge that failed costs its saving and nothing else; the pages are tried again next pass.
pub(crate) fn report(what: &str, id: RegionId, done: io::Result<()>) {
    if let Err(error) = done {
        complain!(Warn, "cannot {what} in region {}: {error}", id.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_dropped_is_joined_whatever_is_under_it_and_what_is_mapped_only_as_a_run() {
        let mut items = Items::new(20);
        let stable = |page: u32, pool: u32| (page, Target::Stable(PoolPage(pool)));
        items.remap(&(2..6), Some(PoolPage(12)));
        assert!(joins(&items, &stable(2, 12), &stable(3, 13)));
        assert!(
            !joins(&items, &stable(5, 15), &stable(6, 16)),
            "one is mapped"
        );
        assert!(joins(&items, &stable(6, 30), &stable(7, 31)));
        assert!(!joins(&items, &stable(6, 30), &stable(7, 40)));
        assert!(!joins(&items, &stable(6, 30), &stable(8, 32)), "a gap");
        let zeros = |page: u32| (page, Target::Zeros);
        assert!(joins(&items, &zeros(8), &zeros(9)));
        assert!(!joins(&items, &zeros(6), &stable(7, 31)));
        items.remap(&(6..7), Some(PoolPage(40)));
        assert!(
            joins(&items, &stable(5, 15), &stable(6, 40)),
            "both are dropped"
        );
    }
}
