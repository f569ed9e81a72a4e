//! A VM's RAM: one host mapping, seen as guest memory, merged or not.

use std::ops::Range;
use std::sync::{Arc, Weak};

use dedup::{
    AccessError, Engine, Mapping, PAGE_SIZE_BYTES, ProcessMemory, RegionAccess, RegionHandle,
};
use kvm_ioctls::VmFd;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::MmapRegion;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestRegionMmap};

use super::GuestMemory;
use super::dirty_log::DirtyLog;
use super::layout::ram_ranges;
use crate::config::HugePages;
use crate::ksm::KsmError;
use crate::virtio::Discard;

/// Errors of [`Ram::with_pages`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RamError {
    /// The host has no address space or memory for it.
    #[error("cannot map {size_bytes} bytes of guest memory: {error}")]
    Map {
        /// Guest memory in bytes.
        size_bytes: u64,
        /// The host's answer.
        #[source]
        error: dedup::MappingError,
    },
    /// The merge engine did not take the mapping.
    #[error("cannot register guest memory with the merge engine: {0}")]
    Register(#[source] dedup::EngineError),
    /// Kernel KSM did not take the mapping.
    #[error(transparent)]
    Ksm(#[from] KsmError),
    /// The mapping does not make guest memory.
    #[error("cannot use the mapping as guest memory: {0}")]
    Guest(String),
}

/// Who is to merge a VM's memory.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Merger<'a> {
    /// Nobody.
    Nobody,
    /// The merge engine.
    Engine(&'a Engine),
    /// Kernel KSM.
    Kernel,
}

/// Who owns the mapping.
#[derive(Debug)]
enum Backing {
    /// Not merged: unmapped when dropped.
    Private(Arc<Mapping>),
    /// Merged by the kernel: unmapped when dropped. Ends with one page that is no guest memory.
    Mergeable(Arc<Mapping>),
    /// Merged: handed over when the VM ends.
    Merged(RegionHandle),
}

/// The RAM of one VM.
#[derive(Debug)]
pub(crate) struct Ram {
    // Declared, hence dropped, before the memory it tells of.
    dirty_log: Option<DirtyLog>,
    // Declared, hence dropped, before the mapping it points into.
    memory: GuestMemory,
    backing: Backing,
    /// One for each range of `memory`: tells whether a clone of it is left somewhere.
    probes: Vec<Weak<MmapRegion<AtomicBitmap>>>,
}

/// Somebody still holds a clone of the guest memory, so it cannot be given back.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("guest memory is still in use by a device")]
pub(crate) struct StillInUse;

impl Ram {
    /// Guest memory in base pages.
    #[cfg(test)]
    pub(crate) fn new(size_bytes: u64, merger: Merger<'_>) -> Result<Ram, RamError> {
        Ram::with_pages(size_bytes, HugePages::None, merger)
    }

    /// Maps `size_bytes` of guest memory in pages of the size that the configuration asks for.
    /// `merger` merges it from now on.
    pub(crate) fn with_pages(
        size_bytes: u64,
        huge_pages: HugePages,
        merger: Merger<'_>,
    ) -> Result<Ram, RamError> {
        let size =
            usize::try_from(size_bytes).map_err(|error| RamError::Guest(error.to_string()))?;
        let mapped = match merger {
            Merger::Kernel => size + PAGE_SIZE_BYTES,
            Merger::Nobody | Merger::Engine(_) => size,
        };
        let mapping = match huge_pages {
            HugePages::Transparent => Mapping::with_huge_pages(mapped),
            HugePages::None | HugePages::Hugetlbfs2M => Mapping::new(mapped),
        };
        let mapping = mapping.map_err(|error| RamError::Map { size_bytes, error })?;
        let memory = guest_memory(&mapping, size)?;
        let (backing, dirty_log) = match merger {
            Merger::Engine(engine) => {
                let (log, source) = DirtyLog::new(&memory);
                let region = engine.register_watched(mapping, source);
                (
                    Backing::Merged(region.map_err(RamError::Register)?),
                    Some(log),
                )
            }
            Merger::Nobody => (Backing::Private(Arc::new(mapping)), None),
            Merger::Kernel => {
                make_mergeable(&mapping, size)?;
                (Backing::Mergeable(Arc::new(mapping)), None)
            }
        };
        let probes = memory
            .iter()
            .map(|region| Arc::downgrade(&region.get_mmap()));
        let probes = probes.collect();
        Ok(Ram {
            dirty_log,
            memory,
            backing,
            probes,
        })
    }

    /// Whether the VM's slots must log dirty pages.
    pub(crate) fn wants_dirty_log(&self) -> bool {
        self.dirty_log.is_some()
    }

    /// Tells the merge engine, from now on, what `vm` writes to.
    pub(crate) fn log_dirty(&self, vm: &Arc<VmFd>) {
        if let Some(log) = &self.dirty_log {
            log.attach(vm);
        }
    }

    /// The memory. Clones must be dropped before [`Ram::release`].
    pub(crate) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Counters of the merge engine for it; zeros when it is not merged.
    pub(crate) fn merge_stats(&self) -> dedup::RegionStats {
        match &self.backing {
            Backing::Private(_) | Backing::Mergeable(_) => dedup::RegionStats::default(),
            Backing::Merged(region) => region.stats(),
        }
    }

    /// Where kernel KSM merges it; `None` when that does not.
    pub(crate) fn mergeable(&self) -> Option<Range<usize>> {
        let Backing::Mergeable(mapping) = &self.backing else {
            return None;
        };
        let start = mapping.as_ptr().addr();
        Some(start..start + mapping.size_bytes() - PAGE_SIZE_BYTES)
    }

    /// Memory that nobody shares with it, as far as can be told cheaply: a page that kernel KSM
    /// merged counts, as nothing but `/proc/PID/smaps` tells it from others.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub(crate) fn private_bytes(&self, process: &ProcessMemory) -> std::io::Result<u64> {
        process.private_bytes_of(match &self.backing {
            Backing::Private(mapping) | Backing::Mergeable(mapping) => mapping,
            Backing::Merged(region) => region.mapping(),
        })
    }

    /// What merges it on demand; `None` when the engine does not merge it.
    pub(crate) fn merger(&self) -> Option<RegionAccess> {
        match &self.backing {
            Backing::Private(_) | Backing::Mergeable(_) => None,
            Backing::Merged(region) => Some(region.access()),
        }
    }

    /// What gives up pages of it, which are those of its mapping.
    pub(crate) fn discard(&self) -> Arc<dyn Discard> {
        match &self.backing {
            Backing::Private(mapping) | Backing::Mergeable(mapping) => {
                Arc::new(Unmerged(Arc::downgrade(mapping)))
            }
            Backing::Merged(region) => Arc::new(Merged(region.access())),
        }
    }

    /// Gives the memory back: unmaps it, or hands it to the merge engine (ARCHITECTURE.md, section 6).
    ///
    /// # Errors
    /// [`StillInUse`] when a clone of [`Ram::memory`] is left, which is a bug of a device. The
    /// mapping is then leaked: a dangling pointer in the monitor would be worse.
    pub(crate) fn release(self) -> Result<(), StillInUse> {
        let Ram {
            dirty_log,
            memory,
            backing,
            probes,
        } = self;
        drop(dirty_log);
        drop(memory);
        if probes.iter().any(|probe| probe.strong_count() > 0) {
            std::mem::forget(backing);
            return Err(StillInUse);
        }
        match backing {
            Backing::Private(mapping) | Backing::Mergeable(mapping) => drop(mapping),
            Backing::Merged(region) => {
                let path = region.exit();
                log::debug!("guest memory left the merge engine: {path:?}");
            }
        }
        Ok(())
    }
}

/// Gives up pages that the engine merges.
#[derive(Debug)]
struct Merged(RegionAccess);

impl Discard for Merged {
    fn discard(&self, pages: Range<u32>) -> Result<u32, AccessError> {
        self.0.discard(pages)
    }
}

/// Gives up pages that nobody merges, or kernel KSM. Does not keep the mapping.
#[derive(Debug)]
struct Unmerged(Weak<Mapping>);

impl Discard for Unmerged {
    fn discard(&self, pages: Range<u32>) -> Result<u32, AccessError> {
        let mapping = self.0.upgrade().ok_or(AccessError::Exiting)?;
        let Range { start, end } = pages;
        if start > end || end > mapping.pages() {
            let pages = mapping.pages();
            return Err(AccessError::Range { start, end, pages });
        }
        // Lossless: u32 to usize on a 64-bit host.
        let bytes = |pages: u32| pages as usize * PAGE_SIZE_BYTES;
        let address = mapping.as_ptr().wrapping_add(bytes(start));
        // SAFETY: 1. The range lies in the mapping, as was just seen, and the mapping stays until the
        // end of this call. 2. What goes is the guest's, which gave it up, and whoever reads it sees
        // zeros: all access to guest memory is by calls that may race.
        let advised =
            unsafe { libc::madvise(address.cast(), bytes(end - start), libc::MADV_DONTNEED) };
        match advised {
            0 => Ok(end - start),
            _ => Err(std::io::Error::last_os_error().into()),
        }
    }
}

/// Has kernel KSM merge the first `size_bytes` of `mapping`.
///
/// The page behind them is left out on purpose: the kernel makes one VMA of neighbours that are
/// alike, and tells KSM's pages for each VMA, so it would tell those of two VMs as one figure.
///
/// Rejected: `PR_SET_MEMORY_MERGE`, which would have it merge all that the monitor holds.
fn make_mergeable(mapping: &Mapping, size_bytes: usize) -> Result<(), KsmError> {
    assert!(size_bytes <= mapping.size_bytes());
    let start = mapping.as_ptr().cast();
    // SAFETY: 1. The range lies in the mapping, as was just asserted. 2. The advice changes no
    // content: pages that are merged are copied when they are written to.
    let advised = unsafe { libc::madvise(start, size_bytes, libc::MADV_MERGEABLE) };
    if advised == 0 {
        Ok(())
    } else {
        Err(KsmError::of_madvise(std::io::Error::last_os_error()))
    }
}

fn guest_memory(mapping: &Mapping, size_bytes: usize) -> Result<GuestMemory, RamError> {
    let guest = |error: &dyn std::fmt::Display| RamError::Guest(error.to_string());
    let mut regions = Vec::new();
    assert!(size_bytes <= mapping.size_bytes());
    for range in ram_ranges(size_bytes as u64) {
        let offset = usize::try_from(range.mapping_offset).map_err(|error| guest(&error))?;
        let size = usize::try_from(range.size_bytes).map_err(|error| guest(&error))?;
        let pointer = mapping.as_ptr().wrapping_add(offset);
        // SAFETY: 1. `pointer..pointer + size` lies in the mapping, as the ranges cover its first
        // `size_bytes` exactly once (`layout::ram_ranges`). 2. The mapping outlives the region: `Ram` keeps both, drops
        // the mapping last, and `release` leaks it when a clone of the region is left.
        let region = unsafe {
            MmapRegion::build_raw(
                pointer,
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            )
        };
        let region = region.map_err(|error| guest(&error))?;
        let region = GuestRegionMmap::new(region, GuestAddress(range.start))
            .ok_or_else(|| guest(&"it wraps around"))?;
        regions.push(region);
    }
    GuestMemory::from_regions(regions).map_err(|error| guest(&error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::layout::{MMIO_HOLE_END, MMIO_HOLE_START};
    use vm_memory::Bytes;

    #[test]
    fn memory_beyond_the_hole_is_one_mapping_in_two_ranges() {
        let ram = Ram::new(MMIO_HOLE_START + (1 << 20), Merger::Nobody).unwrap();
        let memory = ram.memory();
        assert_eq!(memory.num_regions(), 2);
        memory
            .write_obj(0x1234_5678_u32, GuestAddress(MMIO_HOLE_END + 4))
            .unwrap();
        let Backing::Private(mapping) = &ram.backing else {
            panic!("there is no engine");
        };
        let high = mapping.as_ptr().wrapping_add(3 << 30).wrapping_add(4);
        assert_eq!(
            memory
                .get_host_address(GuestAddress(MMIO_HOLE_END + 4))
                .unwrap(),
            high
        );
        memory
            .write_obj(0_u8, GuestAddress(MMIO_HOLE_START))
            .unwrap_err();
        ram.release().unwrap();
    }

    #[test]
    fn release_notices_a_clone_that_was_left_behind() {
        let ram = Ram::new(1 << 20, Merger::Nobody).unwrap();
        let left = ram.memory().clone();
        assert_eq!(ram.release(), Err(StillInUse));
        left.write_obj(1_u8, GuestAddress(0)).unwrap();
    }

    /// Addresses and flags of the mappings of this process.
    fn flags_of_mappings() -> Vec<(String, String)> {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let addresses = smaps.lines().filter_map(|line| {
            let (addresses, _) = line.split_once(' ')?;
            addresses.contains('-').then(|| addresses.to_owned())
        });
        let flags = smaps
            .lines()
            .filter_map(|line| line.strip_prefix("VmFlags:"));
        addresses.zip(flags.map(str::to_owned)).collect()
    }

    #[test]
    fn the_kernel_may_merge_each_vms_memory_as_a_mapping_of_its_own() {
        if crate::ksm::Ksm::default().check().is_err() {
            eprintln!("skipped: this kernel has no KSM");
            return;
        }
        // Several, one behind the other: without something between they would become one mapping.
        let rams: Vec<Ram> = (0..4)
            .map(|_| Ram::new(4 << 20, Merger::Kernel).unwrap())
            .collect();
        let others = Ram::new(4 << 20, Merger::Nobody).unwrap();
        assert_eq!(others.mergeable(), None);
        let mappings = flags_of_mappings();
        for ram in &rams {
            let range = ram.mergeable().unwrap();
            assert_eq!(range.len(), 4 << 20);
            let addresses = format!("{:08x}-{:08x}", range.start, range.end);
            let (_, flags) = mappings
                .iter()
                .find(|(found, _)| *found == addresses)
                .unwrap_or_else(|| panic!("{addresses} is no mapping of its own: {mappings:?}"));
            let has = |flag| flags.split_whitespace().any(|found| found == flag);
            assert!(has("mg"), "mergeable: {flags}");
            assert!(has("nh"), "no huge pages: {flags}");
        }
        assert!(rams.iter().all(|ram| !ram.wants_dirty_log()));
        rams.into_iter().for_each(|ram| ram.release().unwrap());
    }
}
