//! How many pages are protected together: whoever writes to one of them waits for all, and so does
//! who reads one that lies alone.

use crate::merge::RUN_PAGES_MAX;

/// What a writer may wait for at most, by the costs below and those of each kind of merge.
pub(crate) const GROUP_NS_MAX: u32 = 300_000;
/// Mapping a run: the system call, and the VMAs that it splits. 3 to 6 us, the more the longer the
/// kernel's tree of who maps the pool is.
pub(crate) const RUN_NS: u32 = 5_000;
/// Comparing a page and dropping its private copy.
pub(crate) const PAGE_NS: u32 = 500;
/// Pages between two that are merged which are protected along with them, or lie between two of one
/// run.
pub(crate) const GAP_PAGES_MAX: u32 = 8;

/// How many of the ascending items, at least one, are protected together. `step_ns` tells what it
/// takes to go on from one to the next, beyond comparing the pages.
pub(crate) fn len<T>(
    items: &[T],
    page_of: impl Fn(&T) -> u32,
    step_ns: impl Fn(&T, &T) -> u32,
) -> usize {
    let (mut pages, mut spent_ns) = (1, PAGE_NS + RUN_NS);
    for (index, pair) in items.windows(2).enumerate() {
        let step = page_of(&pair[1]) - page_of(&pair[0]);
        pages += step;
        spent_ns += step * PAGE_NS + step_ns(&pair[0], &pair[1]);
        if step - 1 > GAP_PAGES_MAX || pages as usize > RUN_PAGES_MAX || spent_ns > GROUP_NS_MAX {
            return index + 1;
        }
    }
    items.len()
}
