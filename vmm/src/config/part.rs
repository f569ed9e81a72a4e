//! Parts of a configuration that a client may set one by one before the VM starts, as with
//! Firecracker.

use serde::{Deserialize, Serialize};

use super::{EntropyConfig, NetworkInterface, VmConfig};

/// One part, as its request has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ConfigPart {
    /// Firecracker's `PUT /entropy`.
    Entropy(EntropyConfig),
    /// Firecracker's `PUT /network-interfaces/{iface_id}`: in place of the one of the same id.
    NetworkInterface(NetworkInterface),
}

impl VmConfig {
    /// Sets a part, in place of what was there.
    pub fn set(&mut self, part: &ConfigPart) {
        match part {
            ConfigPart::Entropy(entropy) => self.entropy = Some(*entropy),
            ConfigPart::NetworkInterface(interface) => {
                let interfaces = &mut self.network_interfaces;
                let known = interfaces
                    .iter_mut()
                    .find(|known| known.iface_id == interface.iface_id);
                match known {
                    Some(known) => *known = interface.clone(),
                    None => interfaces.push(interface.clone()),
                }
            }
        }
    }
}
