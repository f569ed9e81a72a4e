//! Parts of a configuration that a client may set one by one before the VM starts, as with
//! Firecracker.

use serde::{Deserialize, Serialize};

use super::{
    BalloonConfig, BootSource, Drive, EntropyConfig, MachineConfig, MachinePatch, NetworkInterface,
    VmConfig, VsockConfig,
};

/// One part, as its request has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ConfigPart {
    /// Firecracker's `PUT /balloon`.
    Balloon(BalloonConfig),
    /// Firecracker's `PUT /boot-source`.
    BootSource(BootSource),
    /// Firecracker's `PUT /drives/{drive_id}`: in place of the one of the same id.
    Drive(Drive),
    /// Firecracker's `PUT /entropy`.
    Entropy(EntropyConfig),
    /// Firecracker's `PUT /machine-config`.
    Machine(MachineConfig),
    /// Firecracker's `PATCH /machine-config`.
    MachinePatch(MachinePatch),
    /// Firecracker's `PUT /network-interfaces/{iface_id}`: in place of the one of the same id.
    NetworkInterface(NetworkInterface),
    /// Firecracker's `PUT /vsock`.
    Vsock(VsockConfig),
}

impl VmConfig {
    /// Sets a part, in place of what was there.
    pub fn set(&mut self, part: &ConfigPart) {
        match part {
            ConfigPart::Balloon(balloon) => self.balloon = Some(*balloon),
            ConfigPart::BootSource(boot_source) => self.boot_source = boot_source.clone(),
            ConfigPart::Drive(drive) => {
                put(&mut self.drives, drive, |known| &known.drive_id);
            }
            ConfigPart::Entropy(entropy) => self.entropy = Some(*entropy),
            ConfigPart::Machine(machine) => self.machine_config = machine.clone(),
            ConfigPart::MachinePatch(patch) => self.machine_config.update(patch),
            ConfigPart::NetworkInterface(interface) => {
                put(&mut self.network_interfaces, interface, |known| {
                    &known.iface_id
                });
            }
            ConfigPart::Vsock(vsock) => self.vsock = Some(vsock.clone()),
        }
    }
}

/// Puts `item` in place of the one of its id, or behind all others.
fn put<T: Clone>(items: &mut Vec<T>, item: &T, id: impl Fn(&T) -> &String) {
    match items.iter_mut().find(|known| id(known) == id(item)) {
        Some(known) => *known = item.clone(),
        None => items.push(item.clone()),
    }
}
