//! Which pages of a VM were written to: KVM's dirty log for its vCPUs, vm-memory's bitmap for the
//! monitor's own device writes.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dedup::{DirtySource, PAGE_SIZE_BYTES, PageSet};
use kvm_ioctls::VmFd;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use vmm_sys_util::errno;

use super::GuestMemory;
use super::layout::ram_ranges;
use crate::kvm;

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
    vm: Option<LoggedVm>,
}

#[derive(Debug)]
struct LoggedVm {
    vm: Arc<VmFd>,
    /// Whether pages stay in KVM's log until they are cleared.
    is_kept: bool,
}

impl LoggedVm {
    /// Adds what vCPUs wrote to in a slot, whose first page is page `first` of the region. Ignored
    /// pages stay in the log, where they cost their guest nothing.
    fn collect(
        &self,
        (slot, slot_bytes, first): (u32, u64, u32),
        dirty: &mut PageSet,
        ignored: &PageSet,
    ) -> Result<(), errno::Error> {
        let size = usize::try_from(slot_bytes).map_err(|_| errno::Error::new(libc::EFBIG))?;
        let mut written = self.vm.get_dirty_log(slot, size)?;
        if self.is_kept {
            for (word, page) in written.iter_mut().zip((first..).step_by(64)) {
                *word &= !ignored.word_from(page);
            }
            if written.iter().any(|&word| word != 0) {
                let slot_pages = slot_bytes / PAGE_SIZE_BYTES as u64;
                let slot_pages = u32::try_from(slot_pages).unwrap_or(u32::MAX);
                kvm::dirty_log::clear(&self.vm, slot, slot_pages, &mut written)?;
            }
        }
        dirty.insert_words(first, &written);
        Ok(())
    }
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
            parts.vm = Some(LoggedVm {
                vm: vm.clone(),
                is_kept: kvm::dirty_log::keep_until_cleared(vm),
            });
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
    fn collect(&self, dirty: &mut PageSet, ignored: &PageSet) -> io::Result<()> {
        let parts = lock(&self.0);
        let Some(Parts { memory, vm }) = &*parts else {
            return Ok(());
        };
        let size_bytes = u64::from(dirty.pages()) * PAGE_SIZE_BYTES as u64;
        let ranges = ram_ranges(size_bytes);
        for ((slot, region), range) in (0..).zip(memory.iter()).zip(ranges) {
            let first = range.mapping_offset / PAGE_SIZE_BYTES as u64;
            let first = u32::try_from(first).map_err(io::Error::other)?;
            if let Some(vm) = vm {
                vm.collect((slot, region.len(), first), dirty, ignored)
                    .map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
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
    use crate::memory::ram::{Merger, Ram};
    use kvm_ioctls::VcpuExit;
    use vm_memory::{Bytes, GuestAddress};

    /// A VM that logs writes to its 256 pages; `None` where there shall be none.
    fn vm_with_memory() -> Option<(Arc<VmFd>, Ram)> {
        if std::env::var("SAMEPAGE_SKIP_KVM").is_ok_and(|value| value == "1") {
            return None;
        }
        let (kvm, _) =
            Host::open_kvm().expect("this test needs /dev/kvm; SAMEPAGE_SKIP_KVM=1 skips it");
        let ram = Ram::new(1 << 20, Merger::Nobody).unwrap();
        let vm = vm::create(&kvm, ram.memory(), true).unwrap();
        Some((Arc::new(vm), ram))
    }

    #[test]
    fn device_writes_are_told_once_and_a_closed_log_tells_nothing() {
        let Some((vm, ram)) = vm_with_memory() else {
            return;
        };
        let (log, source) = DirtyLog::new(ram.memory());
        let collect = || {
            let mut dirty = PageSet::new(256);
            source.collect(&mut dirty, &PageSet::new(256)).unwrap();
            (0..256)
                .filter(|&page| dirty.contains(page))
                .collect::<Vec<u32>>()
        };

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

    /// Real mode: adds 1 to the byte at 0x3000 and to that at 0x4000, says so by port 0x10, and
    /// starts over.
    const ADD_TO_TWO_PAGES: [u8; 12] = [
        0xfe, 0x06, 0x00, 0x30, 0xfe, 0x06, 0x00, 0x40, 0xe6, 0x10, 0xeb, 0xf4,
    ];

    #[test]
    fn an_ignored_page_is_told_of_once_it_is_not_ignored_any_more() {
        let Some((vm, ram)) = vm_with_memory() else {
            return;
        };
        let (log, source) = DirtyLog::new(ram.memory());
        log.attach(&vm);
        let code = GuestAddress(0x1000);
        ram.memory().write_slice(&ADD_TO_TWO_PAGES, code).unwrap();
        let mut vcpu = vm.create_vcpu(0).unwrap();
        let mut registers = vcpu.get_sregs().unwrap();
        (registers.cs.base, registers.cs.selector) = (0, 0);
        vcpu.set_sregs(&registers).unwrap();
        let start = kvm_bindings::kvm_regs {
            rip: 0x1000,
            rflags: 2,
            ..kvm_bindings::kvm_regs::default()
        };
        vcpu.set_regs(&start).unwrap();
        let mut told_after_writes = |ignored: &[u32]| {
            let exit = vcpu.run().unwrap();
            assert!(matches!(exit, VcpuExit::IoOut(0x10, _)), "{exit:?}");
            let (mut dirty, mut ignore) = (PageSet::new(256), PageSet::new(256));
            ignored.iter().for_each(|&page| ignore.insert(page));
            source.collect(&mut dirty, &ignore).unwrap();
            [3, 4].map(|page| dirty.contains(page))
        };
        assert_eq!(told_after_writes(&[]), [true, true]);
        assert_eq!(told_after_writes(&[4]), [true, false]);
        assert_eq!(told_after_writes(&[3, 4]), [false, false]);
        assert_eq!(told_after_writes(&[]), [true, true]);
        let mut dirty = PageSet::new(256);
        source.collect(&mut dirty, &PageSet::new(256)).unwrap();
        assert_eq!(dirty, PageSet::new(256), "nothing was written since");
        drop((vcpu, log, vm));
        ram.release().unwrap();
    }
}
