//! Where the workload's pages are in guest-physical memory.
//!
//! The guest's image is loaded at 1 MiB and, with its stacks and page tables, ends below
//! [`FIRST_PAGE_ADDRESS`]. All RAM from there on belongs to the workload, in the order of its
//! addresses; page indices go on across the hole below 4 GiB.

/// Bytes in a page.
pub const PAGE_BYTES: u64 = 4096;
/// Guest-physical address of the image.
pub const IMAGE_ADDRESS: u64 = 1 << 20;
/// Guest-physical address of page 0 of the workload.
pub const FIRST_PAGE_ADDRESS: u64 = 2 << 20;
/// RAM at and beyond this guest-physical address is not used: the guest's page tables end there.
pub const RAM_END_MAX: u64 = 64 << 30;

/// Pages the workload has in a guest with this much memory (without a hole beyond what monitors
/// leave for devices below 4 GiB, and with less than [`RAM_END_MAX`]).
#[must_use]
pub const fn page_count(mem_size_bytes: u64) -> u64 {
    mem_size_bytes.saturating_sub(FIRST_PAGE_ADDRESS) / PAGE_BYTES
}

/// The part of a range of RAM that belongs to the workload, as its first address and its pages.
#[must_use]
pub const fn usable(start_address: u64, size_bytes: u64) -> (u64, u64) {
    let end = start_address.saturating_add(size_bytes);
    let end = if end < RAM_END_MAX { end } else { RAM_END_MAX };
    let first = if start_address < FIRST_PAGE_ADDRESS {
        FIRST_PAGE_ADDRESS
    } else if start_address < RAM_END_MAX {
        start_address.next_multiple_of(PAGE_BYTES)
    } else {
        RAM_END_MAX
    };
    (first, end.saturating_sub(first) / PAGE_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_ram_beyond_the_image_is_used() {
        assert_eq!(page_count(64 << 20), 15_872);
        assert_eq!(page_count(1 << 20), 0);
        assert_eq!(usable(1 << 20, 63 << 20), (2 << 20, 15_872));
        assert_eq!(usable(0, 0x9fc00), (2 << 20, 0));
    }

    #[test]
    fn a_hole_costs_no_page() {
        let (low, high) = (
            usable(1 << 20, (3 << 30) - (1 << 20)),
            usable(4 << 30, 1 << 30),
        );
        assert_eq!(low.1 + high.1, page_count(4 << 30));
        assert_eq!(high.0, 4 << 30);
    }

    #[test]
    fn ranges_are_cut_to_whole_pages_and_mapped_addresses() {
        assert_eq!(usable((4 << 20) + 1, 0x3000), ((4 << 20) + 0x1000, 2));
        assert_eq!(
            usable(RAM_END_MAX - 0x1000, 0x5000),
            (RAM_END_MAX - 0x1000, 1)
        );
        assert_eq!(usable(RAM_END_MAX, 0x5000).1, 0);
        assert_eq!(usable(u64::MAX, 0x5000).1, 0);
    }
}
