//! The merge counters that a set of workloads must lead to.

use core::fmt;

use crate::plan::{PageKind, Plan};
use crate::workload::Workload;

/// What a complete merge of all VMs' workload pages, as filled, comes to. The words are KSM's.
///
/// The pages below [`FIRST_PAGE_ADDRESS`](crate::layout::FIRST_PAGE_ADDRESS) are not in it: the
/// guest's image and what the monitor put there for booting are alike in all VMs as well.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Expected {
    /// Distinct contents, zero left out, that two or more pages have.
    pub pages_shared: u64,
    /// Pages that can be given back for them: the copies beyond the first.
    pub pages_sharing: u64,
    /// Zero pages.
    pub pages_zero: u64,
    /// Pages that no other page equals, hot ones left out.
    pub pages_unshared: u64,
    /// Hot pages: unshared, or volatile while they are rewritten.
    pub pages_hot: u64,
}

impl Expected {
    /// All pages of all VMs.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.pages_shared
            + self.pages_sharing
            + self.pages_zero
            + self.pages_unshared
            + self.pages_hot
    }
}

/// Why nothing can be expected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OracleError {
    /// Two VMs have this seed, so that their private pages are alike as far as they overlap.
    SameSeed(u64),
}

impl fmt::Display for OracleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            OracleError::SameSeed(seed) => write!(f, "seed: {seed} is given to two VMs"),
        }
    }
}

impl core::error::Error for OracleError {}

/// Counts what a complete merge of these VMs (workload, pages) comes to.
///
/// # Errors
/// [`OracleError::SameSeed`].
pub fn expect(vms: &[(Workload, u64)]) -> Result<Expected, OracleError> {
    for (index, (vm, _)) in vms.iter().enumerate() {
        if vms[..index].iter().any(|(other, _)| other.seed == vm.seed) {
            return Err(OracleError::SameSeed(vm.seed));
        }
    }
    let plans = || {
        vms.iter()
            .map(|&(workload, pages)| Plan::new(workload, pages))
    };
    let mut expected = Expected {
        pages_hot: plans().map(|plan| plan.hot_pages()).sum(),
        ..Expected::default()
    };
    let places = plans().map(|plan| plan.calm_pages()).max().unwrap_or(0);
    // A place of the common order is one page in each VM, and a content's number is its place:
    // so the copies of a content are the VMs that have it, and nothing has to be remembered.
    for place in 0..places {
        let mut copies = 0;
        for plan in plans().filter(|plan| place < plan.calm_pages()) {
            match plan.kind_at(place) {
                PageKind::Shared { .. } => copies += 1,
                PageKind::Zero => expected.pages_zero += 1,
                PageKind::Private | PageKind::Hot => expected.pages_unshared += 1,
            }
        }
        match copies {
            0 => {}
            1 => expected.pages_unshared += 1,
            _ => {
                expected.pages_shared += 1;
                expected.pages_sharing += copies - 1;
            }
        }
    }
    Ok(expected)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::content::WORDS_PER_PAGE;
    use crate::workload::Layout;
    use proptest::prelude::*;
    use std::collections::HashMap;
    use std::vec::Vec;

    /// Fills real pages and counts equal ones.
    fn recount(vms: &[(Workload, u64)]) -> Expected {
        let mut copies: HashMap<Vec<u64>, u64> = HashMap::new();
        let mut expected = Expected::default();
        for &(workload, pages) in vms {
            let plan = Plan::new(workload, pages);
            for page in 0..pages {
                let mut words = std::vec![0; WORDS_PER_PAGE];
                plan.content(page).write(|index, word| words[index] = word);
                expected.pages_hot += u64::from(plan.kind(page) == PageKind::Hot);
                *copies.entry(words).or_default() += 1;
            }
        }
        for (words, copies) in copies {
            match copies {
                _ if words.iter().all(|&word| word == 0) => expected.pages_zero += copies,
                1 => expected.pages_unshared += 1,
                _ => {
                    expected.pages_shared += 1;
                    expected.pages_sharing += copies - 1;
                }
            }
        }
        expected.pages_unshared -= expected.pages_hot;
        expected
    }

    prop_compose! {
        fn any_vm()(
            shared in 0u8..=100, rest in 0u8..=100, hot_pages in 0u64..80, pages in 0u64..1500,
            layout in prop_oneof![Just(Layout::Same), Just(Layout::Runs), Just(Layout::Shuffled)],
        ) -> (Workload, u64) {
            let zero = rest % (101 - shared);
            let private = 100 - shared - zero;
            let workload =
                Workload { shared, zero, private, hot_pages, layout, ..Workload::default() };
            (workload, pages)
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn expected_counters_equal_a_recount_of_real_pages(
            mut vms in prop::collection::vec(any_vm(), 0..5), first_seed in 0u64..1000,
        ) {
            for (seed, vm) in (first_seed..).zip(&mut vms) {
                vm.0.seed = seed;
            }
            let expected = expect(&vms).unwrap();
            prop_assert_eq!(expected, recount(&vms));
            prop_assert_eq!(expected.pages(), vms.iter().map(|vm| vm.1).sum::<u64>());
        }
    }

    #[test]
    fn fleet_of_equal_guests_shares_seventy_percent() {
        let vms: Vec<_> = (0..8).map(|seed| (Workload::quiet(seed), 6464)).collect();
        let expected = expect(&vms).unwrap();
        assert_eq!(
            (expected.pages_shared, expected.pages_sharing),
            (4480, 7 * 4480)
        );
        assert_eq!(
            (expected.pages_zero, expected.pages_unshared),
            (8 * 640, 8 * 1280)
        );
        assert_eq!(expected.pages_hot, 8 * 64);
    }

    #[test]
    fn equal_seeds_are_refused() {
        let vms = [(Workload::quiet(4), 10), (Workload::quiet(4), 20)];
        assert_eq!(expect(&vms), Err(OracleError::SameSeed(4)));
    }
}
