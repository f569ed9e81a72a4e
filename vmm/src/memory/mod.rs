//! Guest memory: where it lies for the guest and how the monitor reaches it.

pub(crate) mod dirty_log;
pub mod layout;
#[expect(
    unsafe_code,
    reason = "builds guest memory over a mapping that it keeps alive"
)]
pub(crate) mod ram;

use vm_memory::GuestMemoryMmap;
use vm_memory::bitmap::AtomicBitmap;

/// Guest memory as loaders and devices see it: bounds-checked, and every write of the monitor
/// marks its page in a bitmap, so that the merge engine learns of it.
///
/// Clones share the mapping and do not own it: all of them must be gone before the VM's memory is
/// given back.
pub type GuestMemory = GuestMemoryMmap<AtomicBitmap>;
