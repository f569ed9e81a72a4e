//! A VM's RAM: one host mapping, seen as guest memory, merged or not.

use std::sync::{Arc, Weak};

use dedup::{Engine, Mapping, RegionHandle};
use kvm_ioctls::VmFd;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::MmapRegion;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestRegionMmap};

use super::GuestMemory;
use super::dirty_log::DirtyLog;
use super::layout::ram_ranges;
use crate::config::HugePages;

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
}

/// Who owns the mapping.
#[derive(Debug)]
enum Backing {
    /// Not merged: unmapped when dropped.
    Private(Mapping),
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
        let mapping = match huge_pages {
            HugePages::Transparent => Mapping::with_huge_pages(size),
            HugePages::None | HugePages::Hugetlbfs2M => Mapping::new(size),
        };
        let mapping = mapping.map_err(|error| RamError::Map { size_bytes, error })?;
        let memory = guest_memory(&mapping)?;
        let (backing, dirty_log) = match merger {
            Merger::Engine(engine) => {
                let (log, source) = DirtyLog::new(&memory);
                let region = engine.register_watched(mapping, source);
                (
                    Backing::Merged(region.map_err(RamError::Register)?),
                    Some(log),
                )
            }
            Merger::Nobody => (Backing::Private(mapping), None),
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
            Backing::Private(_) => dedup::RegionStats::default(),
            Backing::Merged(region) => region.stats(),
        }
    }

    /// Memory that nobody shares with it.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub(crate) fn private_bytes(&self) -> std::io::Result<u64> {
        match &self.backing {
            Backing::Private(mapping) => mapping.private_bytes(),
            Backing::Merged(region) => region.mapping().private_bytes(),
        }
    }

    /// What merges it on demand; `None` when it is not merged.
    pub(crate) fn merger(&self) -> Option<dedup::RegionMerger> {
        match &self.backing {
            Backing::Private(_) => None,
            Backing::Merged(region) => Some(region.merger()),
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
            Backing::Private(mapping) => drop(mapping),
            Backing::Merged(region) => {
                let path = region.exit();
                log::debug!("guest memory left the merge engine: {path:?}");
            }
        }
        Ok(())
    }
}

fn guest_memory(mapping: &Mapping) -> Result<GuestMemory, RamError> {
    let guest = |error: &dyn std::fmt::Display| RamError::Guest(error.to_string());
    let mut regions = Vec::new();
    for range in ram_ranges(mapping.size_bytes() as u64) {
        let offset = usize::try_from(range.mapping_offset).map_err(|error| guest(&error))?;
        let size = usize::try_from(range.size_bytes).map_err(|error| guest(&error))?;
        let pointer = mapping.as_ptr().wrapping_add(offset);
        // SAFETY: 1. `pointer..pointer + size` lies in the mapping, as the ranges cover it exactly
        // once (`layout::ram_ranges`). 2. The mapping outlives the region: `Ram` keeps both, drops
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
}
