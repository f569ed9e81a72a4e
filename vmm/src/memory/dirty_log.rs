//! Which pages of a VM were written to: KVM's dirty log for its vCPUs, vm-memory's bitmap for the
//! monitor's own device writes.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dedup::{DirtySource, PAGE_SIZE_BYTES, PageSet};
use kvm_ioctls::VmFd;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::GuestMemory;
use super::layout::ram_ranges;

/// The VM's end of its dirty log. Dropping it closes the log: the engine, which holds the other
/// end a little longer than the VM lives, then no longer reaches the VM or its memory.
#[derive(Debug)]
pub(crate) struct DirtyLog(Arc<Mutex<Option<Parts>>>);

/// The engine's end.
#[derive(Debug)]
struct Source(Arc<Mutex<Option<Parts>>>);

#[derive(Debug)]
struct Parts {
    memory: GuestMemory,
    /// `None` until the VM is there: before, the monitor alone writes.
    vm: Option<Arc<VmFd>>,
}

fn lock(parts: &Mutex<Option<Parts>>) -> MutexGuard<'_, Option<Parts>> {
    // Every change is one assignment: a panic leaves none half done.
    parts.lock().unwrap_or_else(PoisonError::into_inner)
}

impl DirtyLog {
    /// A log of `memory`, and its end for the engine.
    pub(crate) fn new(memory: &GuestMemory) -> (DirtyLog, Box<dyn DirtySource>) {
        let memory = memory.clone();
        let parts = Arc::new(Mutex::new(Some(Parts { memory, vm: None })));
        (DirtyLog(parts.clone()), Box::new(Source(parts)))
    }

    /// From now on the writes of `vm` are told. Its slots are those of the memory, in its order,
    /// with `KVM_MEM_LOG_DIRTY_PAGES`.
    pub(crate) fn attach(&self, vm: &Arc<VmFd>) {
        if let Some(parts) = &mut *lock(&self.0) {
            parts.vm = Some(vm.clone());
        }
    }
}

impl Drop for DirtyLog {
    fn drop(&mut self) {
        // Bound first: the VM's descriptor may close here, which should not happen under the lock.
        let parts = lock(&self.0).take();
        drop(parts);
    }
}

impl DirtySource for Source {
    fn collect(&self, dirty: &mut PageSet) -> io::Result<()> {
        let parts = lock(&self.0);
        let Some(Parts { memory, vm }) = &*parts else {
            return Ok(());
        };
        let size_bytes = u64::from(dirty.pages()) * PAGE_SIZE_BYTES as u64;
        let ranges = ram_ranges(size_bytes);
        for ((slot, region), range) in (0..).zip(memory.iter()).zip(ranges) {
            let first = range.mapping_offset / PAGE_SIZE_BYTES as u64;
            let first = u32::try_from(first).map_err(io::Error::other)?;
            let slot_bytes = usize::try_from(region.len()).map_err(io::Error::other)?;
            if let Some(vm) = vm {
                let by_vcpus = vm.get_dirty_log(slot, slot_bytes);
                let by_vcpus = by_vcpus.map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
                dirty.insert_words(first, &by_vcpus);
            }
            dirty.insert_words(first, &region.get_mmap().bitmap().get_and_reset());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::vm;
    use crate::machine::Host;
    use crate::memory::ram::Ram;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn device_writes_are_told_once_and_a_closed_log_tells_nothing() {
        if std::env::var("SAMEPAGE_SKIP_KVM").is_ok_and(|value| value == "1") {
            return;
        }
        let (kvm, _) =
            Host::open_kvm().expect("this test needs /dev/kvm; SAMEPAGE_SKIP_KVM=1 skips it");
        let ram = Ram::new(1 << 20, None).unwrap();
        let (log, source) = DirtyLog::new(ram.memory());
        let collect = || {
            let mut dirty = PageSet::new(256);
            source.collect(&mut dirty).unwrap();
            (0..256)
                .filter(|&page| dirty.contains(page))
                .collect::<Vec<u32>>()
        };

        let vm = Arc::new(vm::create(&kvm, ram.memory(), true).unwrap());
        log.attach(&vm);
        collect();
        ram.memory()
            .write_obj(1_u8, GuestAddress(5 * 4096 + 7))
            .unwrap();
        ram.memory()
            .write_slice(&[0; 8192], GuestAddress(200 * 4096 + 1))
            .unwrap();
        assert_eq!(collect(), [5, 200, 201, 202]);
        assert_eq!(collect(), [0; 0]);
        ram.memory().write_obj(1_u8, GuestAddress(0)).unwrap();
        drop(log);
        assert_eq!(collect(), [0; 0]);
        assert_eq!(Arc::strong_count(&vm), 1);
        drop(vm);
        ram.release().unwrap();
    }
}
