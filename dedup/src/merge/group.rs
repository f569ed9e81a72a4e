//! How many pages are protected together: whoever writes to one of them waits for all.

use crate::base::page::HUGE_PAGE_PAGES;

/// Longest range that is protected at once: a huge page, or a block of a layout.
pub(crate) const GROUP_PAGES_MAX: u32 = HUGE_PAGE_PAGES;
/// What a writer may wait for at most, by the costs below.
const GROUP_NS_MAX: u32 = 300_000;
/// Mapping a run: the system call, and the VMAs that it splits. 3 to 6 us, the more the longer the
/// kernel's tree of who maps the pool is.
pub(crate) const MAP_NS: u32 = 5_000;
/// Beginning a further part of those that are dropped by one call.
pub(crate) const DISCARD_NS: u32 = 200;
/// Comparing a page and dropping its private copy.
const PAGE_NS: u32 = 500;
/// Protecting and releasing a page that is not merged.
const GAP_NS: u32 = 20;

/// How many of the ascending items, at least one, are protected together. `step_ns` tells what it
/// takes to go on from one to the next, beyond comparing the pages.
pub(crate) fn len<T>(
    items: &[T],
    page_of: impl Fn(&T) -> u32,
    step_ns: impl Fn(&T, &T) -> u32,
) -> usize {
    let Some(first) = items.first() else {
        return 0;
    };
    let mut spent_ns = PAGE_NS + MAP_NS;
    for (index, pair) in items.windows(2).enumerate() {
        let gap_pages = page_of(&pair[1]) - page_of(&pair[0]) - 1;
        let pages = page_of(&pair[1]) - page_of(first) + 1;
        spent_ns += PAGE_NS + gap_pages * GAP_NS + step_ns(&pair[0], &pair[1]);
        if pages > GROUP_PAGES_MAX || spent_ns > GROUP_NS_MAX {
            return index + 1;
        }
    }
    items.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_pages_of_a_block_are_one_group_however_they_are_scattered() {
        let all: Vec<u32> = (0..600).collect();
        assert_eq!(len(&all, |&page| page, |_, _| 0), GROUP_PAGES_MAX as usize);
        let some: Vec<u32> = (0..512).step_by(3).collect();
        let step_ns = |_: &u32, _: &u32| DISCARD_NS;
        assert_eq!(len(&some, |&page| page, step_ns), some.len());
        assert_eq!(len(&[3, 3 + GROUP_PAGES_MAX], |&page| page, step_ns), 1);
    }

    proptest! {
        #[test]
        fn no_writer_waits_for_more_than_the_bound(
            steps in proptest::collection::vec((1..80u32, any::<bool>()), 1..400),
        ) {
            let mut page = 0;
            let items: Vec<(u32, bool)> = steps
                .iter()
                .map(|&(step, maps)| {
                    page += step;
                    (page, maps)
                })
                .collect();
            let cost = |&(_, maps): &(u32, bool)| if maps { MAP_NS } else { DISCARD_NS };
            let len = len(&items, |&(page, _)| page, |_, after| cost(after));
            prop_assert!((1..=items.len()).contains(&len));
            let group = &items[..len];
            let pages = group[len - 1].0 - group[0].0 + 1;
            let merged = u32::try_from(len).unwrap();
            let gaps_ns = (pages - merged) * GAP_NS;
            let steps_ns: u32 = group[1..].iter().map(cost).sum();
            let spent_ns = MAP_NS + merged * PAGE_NS + gaps_ns + steps_ns;
            prop_assert!(len == 1 || (pages <= GROUP_PAGES_MAX && spent_ns <= GROUP_NS_MAX));
        }
    }
}
