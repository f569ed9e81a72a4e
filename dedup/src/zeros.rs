//! Pages of zeros: given back, at no cost in pool pages.
//!
//! A guest's free memory has them by the run, its used memory one by one between others. So runs
//! that lie near each other are protected together, and dropped by one system call.

use std::io;

use crate::backing::Backing;
use crate::fingerprint::Fingerprint;
use crate::group::{self, RUN_NS};
use crate::item::PageState;
use crate::merge::{report, run_len};
use crate::page::{PageRange, range_pages, runs};
use crate::protected::Protected;
use crate::region::{Entered, RegionId};
use crate::scanner::Scanner;

/// Dropping a run along with others.
const DROP_NS: u32 = 1_000;

/// How many of the ascending pages, at least one, are protected together.
fn group_len(zeros: &[u32], in_pool_vma: impl Fn(u32) -> bool) -> usize {
    group::len(
        zeros,
        |&page| page,
        |&before, &after| match (in_pool_vma(before), in_pool_vma(after)) {
            (was, is) if was == is && before + 1 == after => 0,
            (_, true) => RUN_NS + DROP_NS,
            (_, false) => DROP_NS,
        },
    )
}

impl<B: Backing> Scanner<B> {
    /// Gives back those of the ascending pages that still hold zeros.
    pub(crate) fn merge_zeros(&mut self, inside: &Entered<'_, B>, zeros: &[u32]) {
        let id = inside.region.id();
        let mut rest = zeros;
        while !rest.is_empty() {
            let items = self.items(id);
            let (group, later) = rest.split_at(group_len(rest, |page| items.in_pool_vma(page)));
            report("drop zero pages", id, self.merge_zero_group(inside, group));
            rest = later;
        }
    }

    /// Gives back pages under one protection.
    fn merge_zero_group(&mut self, inside: &Entered<'_, B>, group: &[u32]) -> io::Result<()> {
        let (Some(first), Some(last)) = (group.first(), group.last()) else {
            return Ok(());
        };
        if inside.is_exiting() {
            return Ok(());
        }
        let id = inside.region.id();
        let range = *first..last + 1;
        let remapped = self.items(id).any_in_pool_vma(&range);
        let mut protected = Protected::new(inside.backing(), range, remapped)?;
        let items = self.items(id);
        let still_zero: Vec<(u32, bool)> = group
            .iter()
            .filter(|&&page| inside.backing().is_zero(page))
            .map(|&page| (page, items.in_pool_vma(page)))
            .collect();
        let parts = runs(&still_zero, usize::MAX, |a, b| a.0 + 1 == b.0 && a.1 == b.1);
        let (in_pool_vma, bare): (Vec<_>, Vec<_>) = parts
            .map(|run| (run[0].0..run[0].0 + run_len(run), run[0].1))
            .partition(|&(_, in_pool_vma)| in_pool_vma);
        let bare: Vec<PageRange> = bare.into_iter().map(|(part, _)| part).collect();
        let mut rest = bare.as_slice();
        while !rest.is_empty() {
            let (dropped, later) = rest.split_at(protected.drop_zeros(rest)?);
            dropped.iter().for_each(|part| self.note_zeros(id, part));
            rest = later;
        }
        for (part, _) in in_pool_vma {
            let added = self.items(id).vmas_added_by_remap(&part);
            if !self.takes_vmas(added, range_pages(&part)) {
                self.leave_out(id, &part);
                continue;
            }
            protected.unmap_zeros(&part)?;
            self.remap(id, &part, None);
            self.note_zeros(id, &part);
        }
        Ok(())
    }

    fn note_zeros(&mut self, id: RegionId, part: &PageRange) {
        for page in part.clone() {
            self.items(id).set_state(page, PageState::Zero);
        }
        self.changes += u64::from(range_pages(part));
    }

    /// Leaves zero pages out for good, until they change: trying again in each pass would cost CPU.
    fn leave_out(&mut self, id: RegionId, part: &PageRange) {
        let checksum = Fingerprint::of_zeros().checksum();
        for page in part.clone() {
            self.items(id)
                .set_state(page, PageState::Unshared { checksum });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merge::RUN_PAGES_MAX;
    use proptest::prelude::*;

    #[test]
    fn a_run_is_one_group_up_to_the_longest_run() {
        let run: Vec<u32> = (7..700).collect();
        assert_eq!(group_len(&run, |_| false), RUN_PAGES_MAX);
        assert_eq!(group_len(&run[..100], |_| false), 100);
    }

    #[test]
    fn every_second_page_makes_groups_of_more_than_a_hundred() {
        let zeros: Vec<u32> = (0..256).map(|page| 2 * page).collect();
        assert!(group_len(&zeros, |_| false) > 100);
        assert!(
            group_len(&zeros, |_| true) < 50,
            "these take a mapping each"
        );
    }

    proptest! {
        #[test]
        fn pages_far_apart_are_not_protected_together(step in 10..600u32, in_pool_vma: bool) {
            prop_assert_eq!(group_len(&[3, 3 + step], |_| in_pool_vma), 1);
            prop_assert_eq!(group_len(&[3, 12], |_| in_pool_vma), 2);
        }
    }
}
