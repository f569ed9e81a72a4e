//! Whether this host's KVM can be used, for a caller that has no monitor yet.

use std::io;
use std::time::{Duration, Instant};

use crate::kvm::vm::create_vm;
use crate::machine::Host;

/// Makes a VM without memory and vCPUs, and drops it. Returns how long `KVM_CREATE_VM` took.
///
/// # Errors
/// `NotFound` or `PermissionDenied` when `/dev/kvm` is not there or not for us, and whatever else
/// the kernel says.
pub fn kvm_create_vm_time() -> io::Result<Duration> {
    let (kvm, _) = Host::open_kvm().map_err(|error| error.to_os_error())?;
    let start = Instant::now();
    let vm = create_vm(&kvm).map_err(|error| error.to_os_error())?;
    let took = start.elapsed();
    drop(vm);
    Ok(took)
}
