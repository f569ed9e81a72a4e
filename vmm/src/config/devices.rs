//! The virtio devices of a configuration, in the order in which the guest finds them.

use super::{Drive, EntropyConfig, NetworkInterface, VmConfig};

/// One device with a place of its own.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum VirtioDevice<'a> {
    /// A block device.
    Drive(&'a Drive),
    /// A network interface.
    Network(&'a NetworkInterface),
    /// The entropy device.
    Entropy(&'a EntropyConfig),
}

impl VirtioDevice<'_> {
    /// What it is called in log messages.
    pub fn name(&self) -> &str {
        match self {
            VirtioDevice::Drive(drive) => &drive.drive_id,
            VirtioDevice::Network(interface) => &interface.iface_id,
            // Firecracker's name of it. A drive of this name is another device all the same.
            VirtioDevice::Entropy(_) => "rng",
        }
    }
}

impl VmConfig {
    /// The drives in the order the guest finds them: the root device first, hence `/dev/vda`.
    pub fn ordered_drives(&self) -> Vec<&Drive> {
        let mut drives: Vec<&Drive> = self.drives.iter().collect();
        drives.sort_by_key(|drive| !drive.is_root_device);
        drives
    }

    /// All devices that take a page of registers and an interrupt line: device number n of them is
    /// at `virtio::Slot` n, where the kernel's command line announces it.
    pub fn virtio_devices(&self) -> Vec<VirtioDevice<'_>> {
        let drives = self.ordered_drives().into_iter().map(VirtioDevice::Drive);
        let entropy = self.entropy.iter().map(VirtioDevice::Entropy);
        let networks = self.network_interfaces.iter().map(VirtioDevice::Network);
        drives.chain(networks).chain(entropy).collect()
    }
}
