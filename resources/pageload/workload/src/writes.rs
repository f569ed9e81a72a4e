//! Which page is rewritten when.
//!
//! The order of the writes is fixed, so the number of steps made says what every page holds; a guest
//! keeps one counter instead of a version per page.
//!
//! Hot pages: step `k` writes hot page `k % hot_pages`, in its version `k / hot_pages + 1`.
//!
//! Merged pages: the calm pages stand in a circle, in an order of the VM's own. Steps come in pairs:
//! pair `k` gives the page at position `k` a content of its own, and then the page half a circle
//! behind its shared content back. So half of the shared pages can be merged at any time, and each
//! write meets a page that had half a circle's time to be merged.
//!
//! A wave: the same circle, once around with contents of the VM's own, and once around back.

use crate::content::Content;
use crate::permutation::Permutation;
use crate::plan::{PageKind, Plan};
use crate::workload::WriteMode;

/// Keeps the order of the writes apart from the order of the layout.
const ORDER_TAG: u64 = 0x4f52_4445_5200_0001;

/// A plan, and the steps made since memory was filled.
#[derive(Debug, Clone, Copy)]
pub struct Writes {
    plan: Plan,
    circle: Permutation,
    steps: u64,
}

/// One page to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// The page.
    pub page: u64,
    /// What it must hold now.
    pub before: Content,
    /// What it must hold from now on.
    pub after: Content,
}

impl Writes {
    /// Memory is filled as planned, and no step is made.
    #[must_use]
    pub fn new(plan: Plan) -> Writes {
        let circle = Permutation::new(plan.calm_pages(), plan.workload().seed ^ ORDER_TAG);
        Writes {
            plan,
            circle,
            steps: 0,
        }
    }

    /// The plan the pages were filled by.
    #[must_use]
    pub const fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Steps after which every page was met that is ever written (0: none is).
    #[must_use]
    pub const fn round_steps(&self) -> u64 {
        match self.plan.workload().write {
            WriteMode::None => 0,
            WriteMode::Hot => self.plan.hot_pages(),
            WriteMode::Merged | WriteMode::Wave => self.plan.calm_pages() * 2,
            WriteMode::Broken => self.plan.calm_pages(),
        }
    }

    /// Makes the next step. `None` if it changes no page, as when it meets one that is not shared.
    pub fn advance(&mut self) -> Option<Step> {
        let is_over =
            self.plan.workload().write == WriteMode::Wave && self.steps == self.round_steps();
        if self.round_steps() == 0 || is_over {
            return None;
        }
        let page = self.next_page();
        let before = self.content(page);
        self.steps += 1;
        let after = self.content(page);
        (before != after).then_some(Step {
            page,
            before,
            after,
        })
    }

    /// What page `page` holds after the steps made so far.
    #[must_use]
    pub fn content(&self, page: u64) -> Content {
        let (plan, calm_pages) = (&self.plan, self.plan.calm_pages());
        match (plan.workload().write, plan.kind(page)) {
            (WriteMode::Hot, PageKind::Hot) => {
                let version = match last(self.steps, page - calm_pages, plan.hot_pages()) {
                    Some(step) => step / plan.hot_pages() + 1,
                    None => 0,
                };
                plan.own_content(page, version)
            }
            (WriteMode::Merged, PageKind::Shared { id }) => {
                match last(self.steps.div_ceil(2), self.circle.apply(page), calm_pages) {
                    Some(pair) if pair + calm_pages / 2 >= self.steps / 2 => {
                        plan.own_content(page, pair / calm_pages + 1)
                    }
                    _ => Content::shared(id),
                }
            }
            (WriteMode::Broken, PageKind::Shared { id }) => {
                match last(self.steps, self.circle.apply(page), calm_pages) {
                    Some(step) => plan.own_content(page, step / calm_pages + 1),
                    None => Content::shared(id),
                }
            }
            (WriteMode::Wave, PageKind::Shared { id }) => {
                let position = self.circle.apply(page);
                let is_back = self.steps > calm_pages + position;
                if self.steps > position && !is_back {
                    plan.own_content(page, 1)
                } else {
                    Content::shared(id)
                }
            }
            _ => plan.content(page),
        }
    }

    fn next_page(&self) -> u64 {
        let calm_pages = self.plan.calm_pages();
        if self.plan.workload().write == WriteMode::Hot {
            return calm_pages + self.steps % self.plan.hot_pages();
        }
        if matches!(
            self.plan.workload().write,
            WriteMode::Broken | WriteMode::Wave
        ) {
            return self.circle.invert(self.steps % calm_pages);
        }
        let behind = if self.steps.is_multiple_of(2) {
            0
        } else {
            calm_pages / 2
        };
        self.circle
            .invert((self.steps / 2 + calm_pages - behind) % calm_pages)
    }
}

/// The last of the steps `0..steps` that met `position` of a circle with `len` positions.
const fn last(steps: u64, position: u64, len: u64) -> Option<u64> {
    match steps.checked_sub(position + 1) {
        Some(since) => Some(position + since / len * len),
        None => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::Workload;
    use proptest::prelude::*;
    use std::vec::Vec;

    fn writes(write: WriteMode, hot_pages: u64, pages: u64, seed: u64) -> Writes {
        Writes::new(Plan::new(
            Workload {
                seed,
                write,
                hot_pages,
                ..Workload::default()
            },
            pages,
        ))
    }

    proptest! {
        #[test]
        fn contents_are_what_the_steps_wrote(
            write in prop_oneof![
                Just(WriteMode::Hot), Just(WriteMode::Merged), Just(WriteMode::Broken),
                Just(WriteMode::Wave)
            ],
            hot_pages in 0u64..20, pages in 0u64..300, seed: u64, steps in 0usize..2000,
        ) {
            let mut writes = writes(write, hot_pages, pages, seed);
            let mut memory: Vec<_> = (0..pages).map(|page| writes.plan().content(page)).collect();
            for _ in 0..steps {
                if let Some(step) = writes.advance() {
                    let held = &mut memory[usize::try_from(step.page).unwrap()];
                    prop_assert_eq!(*held, step.before);
                    *held = step.after;
                }
            }
            for (page, held) in (0..).zip(memory) {
                prop_assert_eq!(writes.content(page), held);
            }
        }
    }

    #[test]
    fn quiet_workloads_never_write() {
        let mut writes = writes(WriteMode::None, 64, 1000, 1);
        assert!((0..5000).all(|_| writes.advance().is_none()));
    }

    #[test]
    fn hot_pages_get_a_new_version_each_round() {
        let mut writes = writes(WriteMode::Hot, 3, 10, 5);
        let steps: Vec<_> = (0..6).filter_map(|_| writes.advance()).collect();
        assert_eq!(
            steps.iter().map(|step| step.page).collect::<Vec<_>>(),
            [7, 8, 9, 7, 8, 9]
        );
        assert_eq!(steps[3].after, writes.plan().own_content(7, 2));
    }

    #[test]
    fn broken_pages_are_all_broken_in_one_round_and_stay_so() {
        let mut writes = writes(WriteMode::Broken, 0, 6400, 5);
        let broken = (0..writes.round_steps())
            .filter_map(|_| writes.advance())
            .count();
        assert_eq!(broken, 4480);
        let is_own = |page| writes.content(page) != writes.plan().content(page);
        assert_eq!((0..6400).filter(|&page| is_own(page)).count(), 4480);
    }

    #[test]
    fn a_wave_breaks_all_shared_pages_gives_them_back_and_ends() {
        let mut writes = writes(WriteMode::Wave, 0, 6400, 5);
        let own_pages = |writes: &Writes| {
            let is_own = |&page: &u64| writes.content(page) != writes.plan().content(page);
            (0..6400).filter(is_own).count()
        };
        for _ in 0..writes.round_steps() / 2 {
            writes.advance();
        }
        assert_eq!(own_pages(&writes), 4480);
        for _ in 0..writes.round_steps() / 2 {
            writes.advance();
        }
        assert_eq!(own_pages(&writes), 0);
        assert!((0..5000).all(|_| writes.advance().is_none()));
    }

    #[test]
    fn merged_pages_are_broken_and_given_back_every_round() {
        let mut writes = writes(WriteMode::Merged, 0, 6400, 5);
        for _ in 0..writes.round_steps() {
            writes.advance();
        }
        let (mut broken, mut restored) = (0, 0);
        for _ in 0..writes.round_steps() {
            if let Some(step) = writes.advance() {
                let shared = writes.plan().content(step.page);
                broken += usize::from(step.before == shared);
                restored += usize::from(step.after == shared);
            }
        }
        assert_eq!((broken, restored), (4480, 4480));
    }
}
