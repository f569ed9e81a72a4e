//! Parts of a configuration that a client may set one by one before the VM starts, as with
//! Firecracker.

use serde::{Deserialize, Serialize};

use super::{EntropyConfig, VmConfig};

/// One part, as its request has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ConfigPart {
    /// Firecracker's `PUT /entropy`.
    Entropy(EntropyConfig),
}

impl VmConfig {
    /// Sets a part, in place of what was there.
    pub fn set(&mut self, part: &ConfigPart) {
        match part {
            ConfigPart::Entropy(entropy) => self.entropy = Some(*entropy),
        }
    }
}
