//! Whether this machine can run VMs.

use std::path::Path;

/// True if the test should go on. Where `/dev/kvm` is missing a test fails, so that a machine
/// without it cannot pass by testing nothing, unless `SAMEPAGE_SKIP_KVM=1` says so on purpose.
///
/// # Panics
/// If there is no `/dev/kvm` and nobody asked to skip.
pub fn is_present() -> bool {
    if Path::new("/dev/kvm").exists() {
        return true;
    }
    let skip = std::env::var_os("SAMEPAGE_SKIP_KVM").is_some_and(|value| value == "1");
    assert!(
        skip,
        "/dev/kvm is missing; set SAMEPAGE_SKIP_KVM=1 to skip the tests that need it"
    );
    eprintln!("skipped: no /dev/kvm");
    false
}
