//! Sharing stable pages that exist already.

use std::io;

use crate::backing::Backing;
use crate::merge::{RUN_PAGES_MAX, report, run_len};
use crate::page::{PageRange, PoolPage, runs};
use crate::protected::Protected;
use crate::region::Entered;
use crate::scanner::Scanner;

/// A guest page, and the stable page that it may be equal to.
pub(crate) type Candidate = (u32, PoolPage);

/// What a writer may wait for at most, by the costs below.
const GROUP_US_MAX: u32 = 300;
/// Mapping a run: the system call, and the VMAs that it splits.
pub(crate) const PART_US: u32 = 6;
/// Comparing a page and dropping its private copy, in parts of a microsecond.
const PAGES_PER_US: u32 = 2;
/// Pages between two candidates that are protected along with them.
const GAP_PAGES_MAX: u32 = 8;

/// How many of the ascending candidates, at least one, are protected together.
fn group_len(candidates: &[Candidate]) -> usize {
    grouped(
        candidates,
        |&(page, _)| page,
        |before, after| u32::from(!continues(before, after)) * PART_US,
    )
}

/// How many of the ascending items, at least one, are protected together. `part_us` tells what it
/// takes to begin a part with the second of two neighbours, 0 if it continues that of the first.
pub(crate) fn grouped<T>(
    items: &[T],
    page_of: impl Fn(&T) -> u32,
    part_us: impl Fn(&T, &T) -> u32,
) -> usize {
    let (mut parts_us, mut pages) = (PART_US, 1);
    for (index, pair) in items.windows(2).enumerate() {
        let step = page_of(&pair[1]) - page_of(&pair[0]);
        pages += step;
        parts_us += part_us(&pair[0], &pair[1]);
        if step > GAP_PAGES_MAX
            || pages as usize > RUN_PAGES_MAX
            || parts_us + pages / PAGES_PER_US > GROUP_US_MAX
        {
            return index + 1;
        }
    }
    items.len()
}

fn continues(before: &Candidate, after: &Candidate) -> bool {
    before.0 + 1 == after.0 && before.1.plus(1) == after.1
}

impl<B: Backing> Scanner<B> {
    /// Shares every candidate that is equal to its stable page. Returns those that are not.
    pub(crate) fn share_all(
        &mut self,
        inside: &Entered<'_, B>,
        candidates: &[Candidate],
    ) -> Vec<u32> {
        let mut unequal = Vec::new();
        let mut rest = candidates;
        while !rest.is_empty() {
            let (group, later) = rest.split_at(group_len(rest));
            let done = self.share_group(inside, group, &mut unequal);
            report("share stable pages", inside.region.id(), done);
            rest = later;
        }
        unequal
    }

    /// Shares candidates under one protection.
    fn share_group(
        &mut self,
        inside: &Entered<'_, B>,
        group: &[Candidate],
        unequal: &mut Vec<u32>,
    ) -> io::Result<()> {
        let (Some(first), Some(last)) = (group.first(), group.last()) else {
            return Ok(());
        };
        if inside.is_exiting() {
            return Ok(());
        }
        let id = inside.region.id();
        let range = first.0..last.0 + 1;
        let remapped = self.items(id).any_in_pool_vma(&range);
        let mut protected = Protected::new(inside.backing(), range, remapped)?;
        let mut equal: Vec<(Candidate, bool)> = Vec::with_capacity(group.len());
        for &(page, pool_page) in group {
            // A page that founded a stable page may have been its own region's partner.
            if self.items(id).is_merged(page) {
                continue;
            }
            // Its last sharer may have left it since the window's visit.
            let is_stable = self.stable.sharers_of(pool_page) > 0;
            if is_stable && inside.backing().equals_pool(page, &self.pool, pool_page) {
                let covers = self.items(id).pool_page_under(page) == Some(pool_page);
                equal.push(((page, pool_page), covers));
            } else {
                unequal.push(page);
            }
        }
        let (mut covering, mut pool_pages): (Vec<PageRange>, Vec<PoolPage>) = Default::default();
        for part in runs(&equal, usize::MAX, |a, b| {
            continues(&a.0, &b.0) && a.1 == b.1
        }) {
            let ((page, pool_page), is_covering) = part[0];
            let pages = page..page + run_len(part);
            if is_covering {
                covering.push(pages);
                pool_pages.push(pool_page);
            } else {
                self.share(&mut protected, id, &pages, pool_page)?;
            }
        }
        let mut done = 0;
        while done < covering.len() {
            let more = protected.uncover(&covering[done..])?;
            for (pages, &pool_page) in covering.iter().zip(&pool_pages).skip(done).take(more) {
                self.note_shared(id, pages, pool_page);
            }
            done += more;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_run_is_one_group_up_to_the_longest_run() {
        let run: Vec<Candidate> = (0..600).map(|page| (page, PoolPage(page + 7))).collect();
        assert_eq!(group_len(&run), RUN_PAGES_MAX);
        assert_eq!(group_len(&run[..100]), 100);
    }

    #[test]
    fn pages_far_apart_are_not_protected_together() {
        let apart = [(0, PoolPage(0)), (GAP_PAGES_MAX + 1, PoolPage(1))];
        assert_eq!(group_len(&apart), 1);
    }

    proptest! {
        #[test]
        fn no_writer_waits_for_more_than_the_bound(
            steps in proptest::collection::vec((1..12u32, 0..50u32), 1..200)
        ) {
            let mut page = 0;
            let candidates: Vec<Candidate> = steps
                .iter()
                .map(|&(step, pool)| {
                    page += step;
                    (page, PoolPage(pool))
                })
                .collect();
            let len = group_len(&candidates);
            prop_assert!((1..=candidates.len()).contains(&len));
            let group = &candidates[..len];
            let parts = u32::try_from(runs(group, usize::MAX, continues).count()).unwrap();
            let pages = group[len - 1].0 - group[0].0 + 1;
            prop_assert!(parts * PART_US + pages / PAGES_PER_US <= GROUP_US_MAX);
        }
    }
}
