//! Which page holds what after filling.

use crate::content::Content;
use crate::permutation::Permutation;
use crate::workload::{Layout, Workload};

/// Pages in a row that are of one kind. Runs are what a merge engine that maps whole ranges lives on.
pub const RUN_PAGES: u64 = 64;

/// Odd and not a multiple of 5: `run * RUN_STEP % 100` takes each value once in 100 runs, so the
/// percentages are exact over 6400 pages and near over any part of them.
const RUN_STEP: u64 = 37;

/// What a page is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageKind {
    /// Holds a content that every VM has which has a page of this kind for the same number.
    Shared {
        /// The number of the content.
        id: u64,
    },
    /// Holds zeros (written, so that a frame stands behind them).
    Zero,
    /// Holds what no other page holds.
    Private,
    /// Holds what no other page holds, and is rewritten if the workload writes hot pages.
    Hot,
}

/// A workload laid over a number of pages.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    workload: Workload,
    pages: u64,
    hot_pages: u64,
    order: Permutation,
}

impl Plan {
    /// Lays a valid workload over this many pages; with fewer pages than hot ones, all are hot.
    #[must_use]
    pub fn new(workload: Workload, pages: u64) -> Plan {
        let hot_pages = workload.hot_pages.min(pages);
        let calm_pages = pages - hot_pages;
        let order_len = match workload.layout {
            Layout::Same => 0,
            Layout::Runs => calm_pages / RUN_PAGES,
            Layout::Shuffled => calm_pages,
        };
        Plan {
            workload,
            pages,
            hot_pages,
            order: Permutation::new(order_len, workload.seed),
        }
    }

    /// The workload that is laid out.
    #[must_use]
    pub const fn workload(&self) -> &Workload {
        &self.workload
    }

    /// All pages.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.pages
    }

    /// Pages that are not hot; the hot ones follow them.
    #[must_use]
    pub const fn calm_pages(&self) -> u64 {
        self.pages - self.hot_pages
    }

    /// Hot pages: those asked for, or all there are.
    #[must_use]
    pub const fn hot_pages(&self) -> u64 {
        self.hot_pages
    }

    /// What page `page` is for.
    #[must_use]
    pub fn kind(&self, page: u64) -> PageKind {
        if page >= self.calm_pages() {
            PageKind::Hot
        } else {
            self.kind_at(self.place(page))
        }
    }

    /// What page `page` holds once memory is filled and nothing was rewritten.
    #[must_use]
    pub fn content(&self, page: u64) -> Content {
        match self.kind(page) {
            PageKind::Shared { id } => Content::shared(id),
            PageKind::Zero => Content::Zero,
            PageKind::Private | PageKind::Hot => self.own_content(page, 0),
        }
    }

    /// What page `page` holds as its version `version`, in this VM only.
    #[must_use]
    pub const fn own_content(&self, page: u64, version: u64) -> Content {
        Content::own(self.workload.seed, page, version)
    }

    /// What the calm page at this place of the common order is for. Independent of the seed and the
    /// layout: it is what makes VMs alike.
    pub(crate) fn kind_at(&self, place: u64) -> PageKind {
        let Workload { shared, zero, .. } = self.workload;
        let percentile = (place / RUN_PAGES).wrapping_mul(RUN_STEP) % 100;
        if percentile < u64::from(shared) {
            PageKind::Shared { id: place }
        } else if percentile < u64::from(shared) + u64::from(zero) {
            PageKind::Zero
        } else {
            PageKind::Private
        }
    }

    /// The place in the common order that a calm page of this VM stands for.
    fn place(&self, page: u64) -> u64 {
        match self.workload.layout {
            Layout::Same => page,
            Layout::Runs => self.order.apply(page / RUN_PAGES) * RUN_PAGES + page % RUN_PAGES,
            Layout::Shuffled => self.order.apply(page),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::vec::Vec;

    const LAYOUTS: [Layout; 3] = [Layout::Same, Layout::Runs, Layout::Shuffled];

    fn plan(layout: Layout, seed: u64, pages: u64) -> Plan {
        Plan::new(
            Workload {
                layout,
                seed,
                ..Workload::default()
            },
            pages,
        )
    }

    #[test]
    fn plans_are_deterministic() {
        for layout in LAYOUTS {
            let (one, other) = (plan(layout, 3, 5000), plan(layout, 3, 5000));
            assert!((0..5000).all(|page| one.content(page) == other.content(page)));
        }
    }

    #[test]
    fn every_layout_holds_the_same_shared_contents() {
        let contents = |plan: Plan| -> HashSet<Content> {
            let shared = |&page: &u64| matches!(plan.kind(page), PageKind::Shared { .. });
            (0..plan.pages())
                .filter(shared)
                .map(|page| plan.content(page))
                .collect()
        };
        let same = contents(plan(Layout::Same, 1, 7777));
        for layout in LAYOUTS {
            for seed in 0..3 {
                assert_eq!(contents(plan(layout, seed, 7777)), same);
            }
        }
    }

    #[test]
    fn percentages_are_exact_over_6400_calm_pages() {
        for layout in LAYOUTS {
            let plan = plan(layout, 9, 6464);
            let kinds: Vec<_> = (0..6464).map(|page| plan.kind(page)).collect();
            let count = |kind| kinds.iter().filter(|&&k| k == kind).count();
            assert_eq!(count(PageKind::Zero), 640);
            assert_eq!(count(PageKind::Private), 1280);
            assert_eq!(count(PageKind::Hot), 64);
        }
    }

    #[test]
    fn runs_stay_whole_but_move() {
        let (one, other) = (plan(Layout::Runs, 1, 6464), plan(Layout::Runs, 2, 6464));
        let starts = (0..100).map(|run| run * RUN_PAGES);
        let moved = starts
            .clone()
            .filter(|&start| one.place(start) != other.place(start));
        assert!(moved.count() > 90);
        for start in starts {
            let place = one.place(start);
            assert!((0..RUN_PAGES).all(|i| one.place(start + i) == place + i));
        }
    }

    #[test]
    fn too_few_pages_are_all_hot() {
        let plan = plan(Layout::Runs, 1, 10);
        assert!((0..10).all(|page| plan.kind(page) == PageKind::Hot));
    }
}
