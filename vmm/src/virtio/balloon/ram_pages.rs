//! From page frames that a guest names to pages of its VM's one mapping. Pure.

use std::ops::Range;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::super::GuestMemory;

/// A guest's page frame is 4 KiB, whatever its pages are (virtio 1.2, 5.5.6).
pub(super) const FRAME_BYTES: u64 = 4096;
/// Most pages that are given up at once: what the merge engine takes at a time, and a huge page. They
/// end where one ends.
const PIECE_PAGES: u32 = 512;

/// Guest RAM: each range of page frames, with the page of the mapping that it begins at.
#[derive(Debug)]
pub(super) struct RamPages(Vec<(Range<u64>, u32)>);

impl RamPages {
    /// The regions of `memory` lie in the mapping one behind the other, in the order of their
    /// addresses (`memory::layout::ram_ranges`).
    pub(super) fn of(memory: &GuestMemory) -> RamPages {
        let mut first_page = 0;
        let ranges = memory.iter().map(|region| {
            let GuestAddress(start) = region.start_addr();
            let pages = u32::try_from(region.len() / FRAME_BYTES).unwrap_or(u32::MAX);
            let frames = start / FRAME_BYTES..start / FRAME_BYTES + u64::from(pages);
            let range = (frames, first_page);
            first_page += pages;
            range
        });
        RamPages(ranges.collect())
    }

    /// The pages of the frames that are RAM.
    pub(super) fn pages(&self, frames: Range<u64>) -> impl Iterator<Item = Range<u32>> + '_ {
        self.0.iter().filter_map(move |(ram, first_page)| {
            let start = frames.start.max(ram.start);
            let end = frames.end.min(ram.end);
            let page = |frame: u64| {
                u32::try_from(frame - ram.start)
                    .ok()?
                    .checked_add(*first_page)
            };
            (start < end).then_some(())?;
            Some(page(start)?..page(end)?)
        })
    }
}

/// Pages that are to be given up, in few runs and in order.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Runs {
    /// The next one last. None is empty, none touches another.
    left: Vec<Range<u32>>,
}

impl Runs {
    /// Of pages in any order, named any number of times.
    pub(super) fn of(mut pages: Vec<Range<u32>>) -> Runs {
        pages.retain(|range| !range.is_empty());
        pages.sort_unstable_by_key(|range| std::cmp::Reverse((range.end, range.start)));
        let mut left: Vec<Range<u32>> = Vec::new();
        for range in pages {
            match left.last_mut() {
                Some(above) if range.end >= above.start => {
                    above.start = above.start.min(range.start);
                }
                _ => left.push(range),
            }
        }
        Runs { left }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.left.is_empty()
    }

    /// Takes what is to be given up next, at once.
    pub(super) fn next_piece(&mut self) -> Option<Range<u32>> {
        let run = self.left.pop()?;
        let border = (run.start / PIECE_PAGES + 1).saturating_mul(PIECE_PAGES);
        let end = run.end.min(border);
        if end < run.end {
            self.left.push(end..run.end);
        }
        Some(run.start..end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::layout::{MMIO_HOLE_END, MMIO_HOLE_START, ram_ranges};
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn ram() -> RamPages {
        let ranges = [(GuestAddress(0), 0x4000), (GuestAddress(0x8000), 0x4000)];
        RamPages::of(&GuestMemory::from_ranges(&ranges).unwrap())
    }

    /// First pages, and pages after the last.
    fn pages(ram: &RamPages, frames: Range<u64>) -> Vec<(u32, u32)> {
        let pages = ram.pages(frames);
        pages.map(|pages| (pages.start, pages.end)).collect()
    }

    #[test]
    fn frames_behind_the_hole_are_the_pages_behind_those_before_it() {
        let ram = ram();
        assert_eq!(pages(&ram, 1..3), [(1, 3)]);
        assert_eq!(pages(&ram, 9..10), [(5, 6)]);
        assert_eq!(pages(&ram, 0..u64::MAX), [(0, 4), (4, 8)]);
    }

    #[test]
    fn frames_that_are_no_ram_are_no_pages() {
        for frames in [4..8, 12..13, 3..3, u64::MAX - 1..u64::MAX] {
            assert_eq!(pages(&ram(), frames.clone()), [], "{frames:?}");
        }
    }

    #[test]
    fn a_vm_with_memory_on_both_sides_of_the_hole_has_its_pages_where_its_mapping_has_them() {
        let ranges = ram_ranges(MMIO_HOLE_START + (1 << 20));
        let frames = |range: &crate::memory::layout::RamRange| {
            let frames = range.start / FRAME_BYTES..range.end() / FRAME_BYTES;
            let first_page = u32::try_from(range.mapping_offset / FRAME_BYTES).unwrap();
            (frames, first_page)
        };
        let ram = RamPages(ranges.iter().map(frames).collect());
        let high = MMIO_HOLE_END / FRAME_BYTES;
        assert_eq!(pages(&ram, high..high + 1), [(0xc_0000, 0xc_0001)]);
    }

    proptest! {
        #[test]
        fn pieces_are_each_page_once_in_order_and_none_crosses_a_border(
            ranges in prop::collection::vec((0..3000_u32, 0..700_u32), 0..20),
        ) {
            let ranges: Vec<_> = ranges.iter().map(|&(start, len)| start..start + len).collect();
            let expected: BTreeSet<u32> = ranges.iter().cloned().flatten().collect();
            let mut runs = Runs::of(ranges);
            let mut given = Vec::new();
            let mut pieces = 0;
            while let Some(piece) = runs.next_piece() {
                prop_assert_eq!(piece.start / PIECE_PAGES, (piece.end - 1) / PIECE_PAGES);
                given.extend(piece);
                pieces += 1;
            }
            prop_assert!(runs.is_empty());
            prop_assert!(given.iter().eq(expected.iter()), "{:?}", given);
            // No more than there are runs, and borders in them.
            let is_first = |page: &&u32| {
                page.is_multiple_of(PIECE_PAGES) || !expected.contains(&(**page - 1))
            };
            prop_assert_eq!(pieces, expected.iter().filter(is_first).count());
        }
    }
}
