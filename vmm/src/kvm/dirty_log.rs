//! KVM's log of the pages that vCPUs wrote to (`Documentation/virt/kvm/api.rst`, 4.8 and 4.117).
//!
//! KVM notices a write by protecting the page: the first write to it afterwards costs its guest
//! about 3 us. By itself it protects a page anew whenever the log is read; told to wait until the
//! page is *cleared*, it leaves those alone that nobody wants to hear of for now.

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVMIO, kvm_clear_dirty_log,
    kvm_clear_dirty_log__bindgen_ty_1, kvm_enable_cap,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::ioctl_with_mut_ref;
use vmm_sys_util::ioctl_iowr_nr;

ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);

/// `KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE`.
const MANUAL_PROTECT_ENABLE: u64 = 1;

/// Pages that a word of the log stands for.
const WORD_PAGES: usize = 64;

/// Has KVM keep pages in the log until they are cleared. Whether it can: not before Linux 5.3.
pub(crate) fn keep_until_cleared(vm: &VmFd) -> bool {
    let capability = kvm_enable_cap {
        cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
        args: [MANUAL_PROTECT_ENABLE, 0, 0, 0],
        ..kvm_enable_cap::default()
    };
    vm.enable_cap(&capability).is_ok()
}

/// Takes pages of a slot out of the log and protects them again. `pages` has a bit for each page
/// of the slot, and is not longer than that.
///
/// What is written to a page between a look at the log and this call is lost to the log.
pub(crate) fn clear(vm: &VmFd, slot: u32, slot_pages: u32, pages: &mut [u64]) -> errno::Result<()> {
    assert_eq!(pages.len(), (slot_pages as usize).div_ceil(WORD_PAGES));
    let mut request = kvm_clear_dirty_log {
        slot,
        num_pages: slot_pages,
        first_page: 0,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
            dirty_bitmap: pages.as_mut_ptr().cast(),
        },
    };
    // SAFETY: 1. The request takes this struct and a bitmap of `num_pages` bits, which `pages` has
    // (asserted) and which is exclusively borrowed for the call. 2. It changes what KVM protects,
    // never the content of memory.
    let cleared = unsafe { ioctl_with_mut_ref(vm, KVM_CLEAR_DIRTY_LOG(), &mut request) };
    if cleared == 0 {
        Ok(())
    } else {
        errno::errno_result()
    }
}
