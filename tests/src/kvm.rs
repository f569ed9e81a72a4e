//! Whether this machine can run VMs.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;

use rustix::fs::{major, minor};

/// Numbers of KVM's device (`Documentation/admin-guide/devices.txt`).
const KVM_DEVICE: (u32, u32) = (10, 232);

/// True if the test should go on. Where `/dev/kvm` cannot be used a test fails, so that a machine
/// without it cannot pass by testing nothing; `SAMEPAGE_SKIP_KVM=1` leaves it out on purpose,
/// there and anywhere.
///
/// # Panics
/// If `/dev/kvm` cannot be used and nobody asked to skip.
pub fn is_present() -> bool {
    if std::env::var_os("SAMEPAGE_SKIP_KVM").is_some_and(|value| value == "1") {
        eprintln!("skipped: SAMEPAGE_SKIP_KVM=1");
        return false;
    }
    if let Err(error) = open() {
        panic!(
            "/dev/kvm cannot be used ({error}); set SAMEPAGE_SKIP_KVM=1 to skip the tests that need it"
        );
    }
    true
}

/// Opens `/dev/kvm`, which in a container may be a stand-in or somebody else's.
fn open() -> io::Result<File> {
    let device = File::options().read(true).write(true).open("/dev/kvm")?;
    let number = device.metadata()?.rdev();
    if (major(number), minor(number)) != KVM_DEVICE {
        return Err(io::Error::other("is not the device of KVM"));
    }
    Ok(device)
}
