//! The page that KVM shares with the thread of a vCPU: what an internal error was, and the flag by
//! which another thread makes the next KVM_RUN return at once.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::KVM_INTERNAL_ERROR_EMULATION;
use kvm_ioctls::VcpuFd;

/// `KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES`.
const FLAG_INSTRUCTION_BYTES: u64 = 1;

/// Why KVM gave up (`KVM_EXIT_INTERNAL_ERROR`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum InternalError {
    /// It cannot execute an instruction; its bytes, where KVM tells them.
    Emulation(Option<Vec<u8>>),
    /// Anything else, by KVM's number.
    Other(u32),
}

/// Reads why KVM gave up. Only meaningful right after a KVM_RUN that said so.
pub(crate) fn internal_error(vcpu: &mut VcpuFd) -> InternalError {
    let exit = &vcpu.get_kvm_run().__bindgen_anon_1;
    // SAFETY: 1. Every bit pattern is a valid value of these integers. 2. The union is all in the
    // page, zeroed by KVM at first, so nothing read is uninitialised.
    let failure = unsafe { exit.emulation_failure };
    if failure.suberror != KVM_INTERNAL_ERROR_EMULATION {
        return InternalError::Other(failure.suberror);
    }
    // Two 64-bit words follow `ndata` at least when bytes are there: the flags and the bytes.
    if failure.ndata < 3 || failure.flags & FLAG_INSTRUCTION_BYTES == 0 {
        return InternalError::Emulation(None);
    }
    // SAFETY: bytes, valid whatever they hold.
    let instruction = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
    let length = usize::from(instruction.insn_size).min(instruction.insn_bytes.len());
    InternalError::Emulation(Some(instruction.insn_bytes[..length].to_vec()))
}

/// Makes a vCPU's KVM_RUN return at once, from any thread, as long as the vCPU is there.
#[derive(Debug, Default)]
pub(crate) struct Kick {
    immediate_exit: Mutex<Option<Flag>>,
}

#[derive(Debug)]
struct Flag(NonNull<u8>);

// SAFETY: the pointer is only used behind `Kick`'s mutex, to store a byte atomically.
unsafe impl Send for Flag {}

/// Takes the kick away when the vCPU goes. Must be dropped before the vCPU.
#[derive(Debug)]
pub(crate) struct Armed {
    kick: Arc<Kick>,
}

impl Kick {
    fn lock(&self) -> MutexGuard<'_, Option<Flag>> {
        self.immediate_exit
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Points the kick at `vcpu`, until the guard is dropped.
    pub(crate) fn arm(self: &Arc<Kick>, vcpu: &mut VcpuFd) -> Armed {
        let flag = NonNull::from(&mut vcpu.get_kvm_run().immediate_exit);
        *self.lock() = Some(Flag(flag));
        Armed { kick: self.clone() }
    }

    /// Lets the vCPU's current or next KVM_RUN return. The caller then signals its thread, for the
    /// case that it is in the guest already.
    pub(crate) fn request(&self) {
        self.store(1);
    }

    fn store(&self, value: u8) {
        if let Some(flag) = &*self.lock() {
            // SAFETY: 1. The byte is in the page KVM maps for the vCPU, alive until `Armed` was
            // dropped, which takes the pointer away under this mutex. 2. All other accesses are
            // the kernel's reads and this function's stores, all of one byte.
            let flag = unsafe { AtomicU8::from_ptr(flag.0.as_ptr()) };
            flag.store(value, Ordering::SeqCst);
        }
    }
}

impl Armed {
    /// Withdraws the request: for the vCPU's own thread, before it looks at what is wanted of it.
    pub(crate) fn clear(&self) {
        self.kick.store(0);
    }
}

impl Drop for Armed {
    fn drop(&mut self) {
        *self.kick.lock() = None;
    }
}
