//! Sharing stable pages that exist already.

use std::io;

use crate::backing::{Backing, Part};
use crate::budget::bytes_of;
use crate::group::{self, GAP_PAGES_MAX, RUN_NS};
use crate::item::PageState;
use crate::merge::{report, run_len};
use crate::page::{PageRange, PoolPage, range_pages, runs};
use crate::protected::Protected;
use crate::region::{Entered, RegionId};
use crate::scanner::Scanner;

/// A guest page, and the stable page that it may be equal to.
pub(crate) type Candidate = (u32, PoolPage);

/// Copying a page that a run is mapped around.
const OWN_PAGE_NS: u32 = 1_500;

/// How many of the ascending candidates, at least one, are protected together. `joins` tells whether
/// one that follows another would be mapped in one run with it.
fn group_len(candidates: &[Candidate], joins: impl Fn(&Candidate, &Candidate) -> bool) -> usize {
    group::len(
        candidates,
        |&(page, _)| page,
        |before, after| match joins(before, after) {
            true => (after.0 - before.0 - 1) * OWN_PAGE_NS,
            false => RUN_NS,
        },
    )
}

/// Whether two candidates can be mapped in one run: they are as far apart in the pool as in the
/// region, and the few pages between them are the guest's own. Those are copied, which takes less
/// than another mapping, and no memory: the copies take the place of what they are copied from.
fn joins(before: &Candidate, after: &Candidate, is_own: impl FnMut(u32) -> bool) -> bool {
    let mut gap = before.0 + 1..after.0;
    range_pages(&gap) <= GAP_PAGES_MAX
        && before.1.plus(after.0 - before.0) == after.1
        && gap.all(is_own)
}

/// The parts between the candidates of a run that are not to be shared.
fn gaps(run: &[Candidate]) -> Vec<PageRange> {
    run.windows(2)
        .map(|pair| pair[0].0 + 1..pair[1].0)
        .filter(|gap| !gap.is_empty())
        .collect()
}

/// All pages from the first of a run to its last.
fn span(run: &[Candidate]) -> PageRange {
    run[0].0..run[run.len() - 1].0 + 1
}

impl<B: Backing> Scanner<B> {
    /// Shares every candidate that is equal to its stable page. Returns those that are not.
    pub(crate) fn share_all(
        &mut self,
        inside: &Entered<'_, B>,
        candidates: &[Candidate],
    ) -> Vec<u32> {
        let id = inside.region.id();
        let mut unequal = Vec::new();
        let mut rest = candidates;
        while !rest.is_empty() {
            let items = self.items(id);
            let len = group_len(rest, |a, b| joins(a, b, |page| items.state(page).is_own()));
            let tried = self.share_group(inside, &rest[..len], &mut unequal);
            let tried_len = *tried.as_ref().unwrap_or(&len);
            report("share stable pages", id, tried.map(drop));
            rest = &rest[tried_len..];
        }
        unequal
    }

    /// Shares candidates under one protection. Returns how many were tried, at least one: the others
    /// would have writers wait for too long, because of what was written to meanwhile.
    fn share_group(
        &mut self,
        inside: &Entered<'_, B>,
        group: &[Candidate],
        unequal: &mut Vec<u32>,
    ) -> io::Result<usize> {
        let (Some(first), Some(last)) = (group.first(), group.last()) else {
            return Ok(group.len());
        };
        if inside.is_exiting() {
            return Ok(group.len());
        }
        let id = inside.region.id();
        let range = first.0..last.0 + 1;
        let gap_pages = range_pages(&range) - run_len(group);
        // The copies are there before the old pages go.
        let may_copy = gap_pages == 0 || self.budget.has_room(bytes_of(gap_pages));
        let remapped = self.items(id).any_in_pool_vma(&range);
        let mut protected = Protected::new(inside.backing(), range.clone(), remapped)?;
        let (equal, others) = self.compare(inside, group);
        let is_own = self.own_pages(inside, &range, &equal);
        let items = self.items(id);
        let covers =
            |&(page, pool_page): &Candidate| items.pool_page_under(page) == Some(pool_page);
        let joins = |a: &Candidate, b: &Candidate| {
            // What covers its stable page is uncovered, for which it needs no mapping.
            let (of_a, of_b) = (covers(a), covers(b));
            let is_between = |page: u32| may_copy && !of_a && is_own[(page - range.start) as usize];
            of_a == of_b && joins(a, b, is_between)
        };
        let len = group_len(&equal, joins);
        let parts: Vec<(&[Candidate], bool)> = runs(&equal[..len], usize::MAX, joins)
            .map(|part| (part, covers(&part[0])))
            .collect();
        let tried_len = match equal.get(len) {
            Some(next) => group.partition_point(|candidate| candidate.0 < next.0),
            None => group.len(),
        };
        let tried = group[tried_len - 1].0;
        unequal.extend(others.into_iter().filter(|&page| page <= tried));
        let those = |covering: bool| {
            let wanted = parts.iter().filter(move |part| part.1 == covering);
            wanted.map(|part| part.0).collect::<Vec<_>>()
        };
        self.share_runs(inside, &mut protected, &those(false))?;
        self.uncover(&mut protected, id, &those(true))?;
        Ok(tried_len)
    }

    /// The candidates of a protected group that are equal to their stable pages, and the pages that
    /// are not.
    fn compare(
        &mut self,
        inside: &Entered<'_, B>,
        group: &[Candidate],
    ) -> (Vec<Candidate>, Vec<u32>) {
        let id = inside.region.id();
        let (mut equal, mut others) = (Vec::with_capacity(group.len()), Vec::new());
        for &(page, pool_page) in group {
            // A page that founded a stable page may have been its own region's partner.
            if self.items(id).is_merged(page) {
                continue;
            }
            // Its last sharer may have left it since the window's visit.
            let is_stable = self.stable.sharers_of(pool_page) > 0;
            if is_stable && inside.backing().equals_pool(page, &self.pool, pool_page) {
                equal.push((page, pool_page));
            } else {
                others.push(page);
            }
        }
        (equal, others)
    }

    /// Which pages of a protected range can be copied to be mapped around. None that shows zeros: it
    /// may have no memory, and should not get any.
    fn own_pages(
        &mut self,
        inside: &Entered<'_, B>,
        range: &PageRange,
        equal: &[Candidate],
    ) -> Vec<bool> {
        let mut equal = equal.iter().map(|&(page, _)| page).peekable();
        let items = self.items(inside.region.id());
        range
            .clone()
            .map(|page| {
                equal.next_if_eq(&page).is_none()
                    && items.state(page).is_own()
                    && !inside.backing().is_zero(page)
            })
            .collect()
    }

    /// Maps compared runs of a protected range to stable pages, within the VMA budget.
    fn share_runs(
        &mut self,
        inside: &Entered<'_, B>,
        protected: &mut Protected<'_, B>,
        runs: &[&[Candidate]],
    ) -> io::Result<()> {
        let id = inside.region.id();
        let items = self.items(id);
        let (together, alone): (Vec<_>, Vec<_>) = runs.iter().partition(|run| {
            let range = span(run);
            range_pages(&range) == run_len(run) && !items.any_in_pool_vma(&range)
        });
        for run in alone {
            // Else its exit, which has freed its memory by now, would be given some again.
            if inside.is_exiting() {
                return Ok(());
            }
            self.share_alone(protected, id, run)?;
        }
        let mut added = 0;
        let together: Vec<&[Candidate]> = together
            .into_iter()
            .filter(|run| self.takes_vmas_for(id, run, &mut added))
            .collect();
        let mut rest = &together[..];
        while !rest.is_empty() && !inside.is_exiting() {
            let parts: Vec<Part> = rest.iter().map(|run| (span(run), run[0].1)).collect();
            let (shared, later) = rest.split_at(protected.share(&self.pool, &parts)?);
            for run in shared {
                self.note_mapped(id, run);
            }
            rest = later;
        }
        Ok(())
    }

    /// Maps a run that lies in mappings of the pool, or goes on around pages that are not shared.
    fn share_alone(
        &mut self,
        protected: &mut Protected<'_, B>,
        id: RegionId,
        run: &[Candidate],
    ) -> io::Result<()> {
        if !self.takes_vmas_for(id, run, &mut 0) {
            return Ok(());
        }
        let (range, first, own) = (span(run), run[0].1, gaps(run));
        if own.is_empty() {
            protected.share(&self.pool, &[(range, first)])?;
        } else {
            protected.bridge(&self.pool, &range, first, &own)?;
        }
        self.note_mapped(id, run);
        Ok(())
    }

    /// Whether a run may be mapped after others that will take `added` VMAs; counts it among them if
    /// so. Neighbours count one too many, because none of them is mapped yet.
    fn takes_vmas_for(&mut self, id: RegionId, run: &[Candidate], added: &mut i64) -> bool {
        let more = self.items(id).vmas_added_by_remap(&span(run));
        let takes = self.takes_vmas(*added + more, run_len(run));
        if takes {
            *added += more;
        } else {
            // Left out for good, until it changes: trying again in each pass would cost CPU.
            for &(page, pool_page) in run {
                let checksum = self.stable.fingerprint(pool_page).checksum();
                self.items(id)
                    .set_state(page, PageState::Unshared { checksum });
            }
        }
        takes
    }

    /// Drops the copies of compared runs of a protected range, whose stable pages lie under them.
    fn uncover(
        &mut self,
        protected: &mut Protected<'_, B>,
        id: RegionId,
        covering: &[&[Candidate]],
    ) -> io::Result<()> {
        let parts: Vec<PageRange> = covering
            .iter()
            .map(|run| run[0].0..run[0].0 + run_len(run))
            .collect();
        let mut done = 0;
        while done < parts.len() {
            let more = protected.uncover(&parts[done..])?;
            for run in &covering[done..done + more] {
                self.note_shared(id, run);
            }
            done += more;
        }
        Ok(())
    }

    /// Accounts for a run that is one mapping of the pool now.
    fn note_mapped(&mut self, id: RegionId, run: &[Candidate]) {
        self.remap(id, &span(run), Some(run[0].1));
        self.note_shared(id, run);
    }

    /// Accounts for pages that are mapped to stable pages now.
    fn note_shared(&mut self, id: RegionId, run: &[Candidate]) {
        for &(page, pool_page) in run {
            self.items(id).set_state(page, PageState::Stable(pool_page));
            self.stable.add_sharer(pool_page);
        }
        self.places.note(id);
        self.changes += u64::from(run_len(run));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::group::{GROUP_NS_MAX, PAGE_NS};
    use crate::merge::RUN_PAGES_MAX;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn joins_all(before: &Candidate, after: &Candidate) -> bool {
        joins(before, after, |_| true)
    }

    #[test]
    fn a_run_is_one_group_up_to_the_longest_run() {
        let run: Vec<Candidate> = (0..600).map(|page| (page, PoolPage(page + 7))).collect();
        assert_eq!(group_len(&run, joins_all), RUN_PAGES_MAX);
        assert_eq!(group_len(&run[..100], joins_all), 100);
    }

    #[test]
    fn pages_far_apart_are_not_protected_together() {
        let apart = [(0, PoolPage(0)), (GAP_PAGES_MAX + 2, PoolPage(1))];
        assert_eq!(group_len(&apart, joins_all), 1);
    }

    #[test]
    fn a_run_goes_on_behind_few_pages_of_the_guests_own() {
        let own = BTreeSet::from([3, 4]);
        let joins = |before, after| joins(&before, &after, |page| own.contains(&page));
        assert!(joins((2, PoolPage(12)), (5, PoolPage(15))));
        assert!(joins((2, PoolPage(12)), (3, PoolPage(13))));
        assert!(
            !joins((2, PoolPage(12)), (5, PoolPage(16))),
            "another distance"
        );
        assert!(!joins((2, PoolPage(12)), (6, PoolPage(16))), "not its own");
        assert!(
            !joins_all(&(0, PoolPage(0)), &(10, PoolPage(10))),
            "too many"
        );
    }

    proptest! {
        #[test]
        fn no_writer_waits_for_more_than_the_bound_and_only_own_pages_are_copied(
            steps in proptest::collection::vec((1..12u32, 0..3u32), 1..400),
            own in proptest::collection::btree_set(0..2000u32, 0..2000),
        ) {
            let mut page = 0;
            let candidates: Vec<Candidate> = steps
                .iter()
                .map(|&(step, pool)| {
                    page += step;
                    (page, PoolPage(page + pool / 2))
                })
                .collect();
            let joins = |a: &Candidate, b: &Candidate| joins(a, b, |page| own.contains(&page));
            let len = group_len(&candidates, joins);
            prop_assert!((1..=candidates.len()).contains(&len));
            let group = &candidates[..len];
            let parts: Vec<&[Candidate]> = runs(group, usize::MAX, joins).collect();
            let mut copied = 0;
            for part in &parts {
                let distances: BTreeSet<u32> = part.iter().map(|&(page, pool)| pool.0 - page).collect();
                prop_assert_eq!(distances.len(), 1);
                for page in gaps(part).into_iter().flatten() {
                    prop_assert!(own.contains(&page));
                    copied += 1;
                }
            }
            let pages = group[len - 1].0 - group[0].0 + 1;
            let runs = u32::try_from(parts.len()).unwrap();
            let spent_ns = runs * RUN_NS + pages * PAGE_NS + copied * OWN_PAGE_NS;
            prop_assert!(len == 1 || spent_ns <= GROUP_NS_MAX, "{}", spent_ns);
        }
    }
}
