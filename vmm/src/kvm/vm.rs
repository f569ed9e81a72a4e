//! A KVM VM: memory, interrupt controllers, timer.

use kvm_bindings::{
    KVM_MEM_LOG_DIRTY_PAGES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VmFd};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use super::KvmError;
use crate::memory::GuestMemory;

/// Three pages KVM takes for itself on Intel CPUs; in the MMIO hole, below 4 GiB.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// Creates a VM with IOAPIC, PIC, LAPICs and PIT in KVM, and `memory` as its RAM.
///
/// With `logs_dirty` KVM keeps a log of the pages that vCPUs write to.
///
/// The VM's descriptor must not outlive the mapping under `memory`.
pub(crate) fn create(kvm: &Kvm, memory: &GuestMemory, logs_dirty: bool) -> Result<VmFd, KvmError> {
    #[cfg(feature = "failpoints")]
    fail::fail_point!("kvm_create_vm", |_| {
        let error = kvm_ioctls::Error::new(libc::ENOMEM);
        Err(KvmError::of("KVM_CREATE_VM")(error))
    });
    let vm = create_vm(kvm)?;
    vm.set_tss_address(TSS_ADDRESS)
        .map_err(KvmError::of("KVM_SET_TSS_ADDR"))?;
    vm.create_irq_chip()
        .map_err(KvmError::of("KVM_CREATE_IRQCHIP"))?;
    // KVM answers port 0x61 as well: kernels calibrate their clock by it.
    let pit = kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..kvm_pit_config::default()
    };
    vm.create_pit2(pit)
        .map_err(KvmError::of("KVM_CREATE_PIT2"))?;
    set_memory(&vm, memory, logs_dirty)?;
    Ok(vm)
}

/// `KVM_CREATE_VM` gives up when a signal comes, and on a loaded host one may come each time.
pub(crate) fn create_vm(kvm: &Kvm) -> Result<VmFd, KvmError> {
    const ATTEMPTS: u32 = 5;
    let mut attempt = 1;
    loop {
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR && attempt < ATTEMPTS => attempt += 1,
            result => return result.map_err(KvmError::of("KVM_CREATE_VM")),
        }
    }
}

fn set_memory(vm: &VmFd, memory: &GuestMemory, logs_dirty: bool) -> Result<(), KvmError> {
    let flags = if logs_dirty {
        KVM_MEM_LOG_DIRTY_PAGES
    } else {
        0
    };
    for (slot, region) in (0..).zip(memory.iter()) {
        let slot = kvm_userspace_memory_region {
            slot,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: region.as_ptr().addr() as u64,
            flags,
        };
        // SAFETY: 1. The range is a region of `memory`, all of it mapped. 2. The mapping outlives
        // the VM (this module's contract; `machine::Machine::tear_down` keeps the order). 3. Ranges
        // of guest memory do not overlap, in the guest as on the host.
        unsafe { vm.set_user_memory_region(slot) }
            .map_err(KvmError::of("KVM_SET_USER_MEMORY_REGION"))?;
    }
    Ok(())
}
