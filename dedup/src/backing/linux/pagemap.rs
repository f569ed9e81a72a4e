//! What lies behind pages, asked of the kernel by `PAGEMAP_SCAN` (`fs/proc/task_mmu.c`, Linux 6.7).
//!
//! The older `/proc/PID/pagemap` read gives 8 bytes for each page and cannot tell the zero page
//! from a private one without a privilege; this one returns ranges, and both facts.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use linux_raw_sys::general::{
    PAGE_IS_FILE, PAGE_IS_HUGE, PAGE_IS_PFNZERO, PAGE_IS_PRESENT, PAGE_IS_SWAPPED, page_region,
    pm_scan_arg,
};

use crate::backing::Residency;
use crate::backing::mapping::Mapping;
use crate::base::failpoint::may_fail;
use crate::base::page::{PAGE_SIZE_BYTES, PageRange};

/// `_IOWR('f', 16, struct pm_scan_arg)` of `include/uapi/linux/fs.h`.
const PAGEMAP_SCAN: libc::c_ulong =
    3 << 30 | (size_of::<pm_scan_arg>() as libc::c_ulong) << 16 | (b'f' as libc::c_ulong) << 8 | 16;

/// Ranges fetched by one call.
const REGIONS_PER_CALL: usize = 128;

/// Which pages a scan is about, and what it tells of them.
#[derive(Clone, Copy, Debug)]
struct Categories {
    any_of: u32,
    none_of: u32,
    told: u32,
}

const NOTHING: page_region = page_region {
    start: 0,
    end: 0,
    categories: 0,
};

/// This process's `/proc/self/pagemap`.
#[derive(Debug)]
pub(crate) struct Pagemap(File);

impl Pagemap {
    pub(crate) fn open() -> io::Result<Pagemap> {
        Ok(Pagemap(File::open("/proc/self/pagemap")?))
    }

    /// Appends what lies behind `range` of `mapping`.
    pub(crate) fn scan(
        &self,
        mapping: &Mapping,
        range: PageRange,
        found: &mut Vec<(PageRange, Residency)>,
    ) -> io::Result<()> {
        may_fail!("pagemap");
        let base = mapping.address(0).addr() as u64;
        let page_of = |address: u64| {
            u32::try_from((address - base) / PAGE_SIZE_BYTES as u64).unwrap_or(u32::MAX)
        };
        let categories = Categories {
            any_of: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            none_of: 0,
            told: PAGE_IS_PRESENT | PAGE_IS_SWAPPED | PAGE_IS_FILE | PAGE_IS_PFNZERO,
        };
        self.for_each(mapping, range, categories, |region| {
            if let Some(residency) = residency(region.categories) {
                found.push((page_of(region.start)..page_of(region.end), residency));
            }
        })
    }

    /// Bytes of `mapping` in pages of its own: neither the pool's nor the kernel's zero page.
    pub(crate) fn private_bytes(&self, mapping: &Mapping) -> io::Result<u64> {
        let mut private_bytes = 0;
        let categories = Categories {
            any_of: PAGE_IS_PRESENT,
            none_of: PAGE_IS_FILE | PAGE_IS_PFNZERO,
            told: PAGE_IS_PRESENT,
        };
        self.for_each(mapping, 0..mapping.pages(), categories, |region| {
            private_bytes += region.end - region.start;
        })?;
        Ok(private_bytes)
    }

    fn for_each(
        &self,
        mapping: &Mapping,
        range: PageRange,
        categories: Categories,
        mut found: impl FnMut(&page_region),
    ) -> io::Result<()> {
        let end = mapping.address(range.end).addr() as u64;
        let mut start = mapping.address(range.start).addr() as u64;
        while start < end {
            let mut regions = [NOTHING; REGIONS_PER_CALL];
            let (filled, walk_end) = self.scan_once(start..end, categories, &mut regions)?;
            regions[..filled].iter().for_each(&mut found);
            if walk_end <= start {
                return Err(io::Error::other("PAGEMAP_SCAN made no progress"));
            }
            start = walk_end;
        }
        Ok(())
    }

    /// Whether a huge page lies in `range` of `mapping`, in whole or in part.
    pub(crate) fn has_huge_page(&self, mapping: &Mapping, range: &PageRange) -> io::Result<bool> {
        let start = mapping.address(range.start).addr() as u64;
        let end = mapping.address(range.end).addr() as u64;
        let categories = Categories {
            any_of: PAGE_IS_HUGE,
            none_of: 0,
            told: PAGE_IS_HUGE,
        };
        let (filled, _) = self.scan_once(start..end, categories, &mut [NOTHING])?;
        Ok(filled > 0)
    }

    /// Finds pages of any of the `categories`.
    fn scan_once(
        &self,
        addresses: Range<u64>,
        categories: Categories,
        regions: &mut [page_region],
    ) -> io::Result<(usize, u64)> {
        let mut request = pm_scan_arg {
            size: size_of::<pm_scan_arg>() as u64,
            flags: 0,
            start: addresses.start,
            end: addresses.end,
            walk_end: 0,
            vec: regions.as_mut_ptr().addr() as u64,
            vec_len: regions.len() as u64,
            max_pages: 0,
            category_inverted: u64::from(categories.none_of),
            category_mask: u64::from(categories.none_of),
            category_anyof_mask: u64::from(categories.any_of),
            return_mask: u64::from(categories.told),
        };
        // SAFETY:
        // - `request` is the struct that this request takes, valid for the call.
        // - `vec` and `vec_len` name `regions`, which is exclusively borrowed for the call.
        let filled = unsafe { libc::ioctl(self.0.as_raw_fd(), PAGEMAP_SCAN, &raw mut request) };
        super::check::check(filled)?;
        Ok((
            usize::try_from(filled).unwrap_or(0).min(regions.len()),
            request.walk_end,
        ))
    }
}

fn residency(categories: u64) -> Option<Residency> {
    let has = |category: u32| categories & u64::from(category) != 0;
    if has(PAGE_IS_SWAPPED) {
        // A page that is being migrated is called swapped as well; the pool's then keep their mark.
        Some(if has(PAGE_IS_FILE) {
            Residency::Pool
        } else {
            Residency::Swapped
        })
    } else if !has(PAGE_IS_PRESENT) {
        None
    } else if has(PAGE_IS_PFNZERO) {
        Some(Residency::ZeroPage)
    } else if has(PAGE_IS_FILE) {
        Some(Residency::Pool)
    } else {
        Some(Residency::Private)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_pages_that_were_written_to_are_private() {
        let mapping = Mapping::new(64 * PAGE_SIZE_BYTES).unwrap();
        let memory = std::fs::OpenOptions::new()
            .write(true)
            .open("/proc/self/mem")
            .unwrap();
        for page in [3, 4, 40] {
            let address = mapping.address(page).addr() as u64;
            std::os::unix::fs::FileExt::write_at(&memory, &[1], address).unwrap();
        }
        // Shows the kernel's zero page.
        mapping.read_page(50, &mut [0; crate::base::page::PAGE_WORDS]);
        let pagemap = Pagemap::open().unwrap();
        assert_eq!(pagemap.private_bytes(&mapping).unwrap(), 3 * 4096);
    }

    #[test]
    fn a_pool_page_that_is_being_moved_is_the_pools() {
        let of = |categories| residency(u64::from(categories));
        assert_eq!(of(PAGE_IS_SWAPPED | PAGE_IS_FILE), Some(Residency::Pool));
        assert_eq!(of(PAGE_IS_SWAPPED), Some(Residency::Swapped));
        assert_eq!(of(PAGE_IS_PRESENT | PAGE_IS_FILE), Some(Residency::Pool));
        assert_eq!(of(PAGE_IS_PRESENT), Some(Residency::Private));
        assert_eq!(
            of(PAGE_IS_PRESENT | PAGE_IS_PFNZERO),
            Some(Residency::ZeroPage)
        );
        assert_eq!(of(0), None);
    }
}
