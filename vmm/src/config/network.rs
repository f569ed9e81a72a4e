//! One network interface, as Firecracker's `network-interfaces` describe it.

use serde::{Deserialize, Serialize};

use super::{MacAddress, RateLimiterConfig};

/// A network interface over a tap device of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterface {
    /// Its name in the API: 1 to 64 characters of `[A-Za-z0-9_]`.
    pub iface_id: String,
    /// The tap device. Where there is none of this name it is made, for as long as the VM runs.
    pub host_dev_name: String,
    /// The guest's Ethernet address; the guest makes one up where it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_mac: Option<MacAddress>,
    /// The largest packet that the guest is to send, in bytes without the Ethernet header; the guest
    /// decides where it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// How fast the guest may receive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter: Option<RateLimiterConfig>,
    /// How fast the guest may send.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter: Option<RateLimiterConfig>,
}

/// Longest name of a network device: `IFNAMSIZ` of Linux less the NUL at the end.
pub const HOST_DEV_NAME_LEN_MAX: usize = 15;
/// The least `mtu`, as in Firecracker: it is the least of IPv4 (RFC 791).
pub const MTU_MIN: u32 = 68;
/// The largest `mtu`: the device has 16 bits for it (virtio 1.2, 5.1.4).
pub const MTU_MAX: u32 = 65_535;

impl NetworkInterface {
    /// An interface over `host_dev_name` with everything else at its default.
    pub fn new(iface_id: impl Into<String>, host_dev_name: impl Into<String>) -> NetworkInterface {
        NetworkInterface {
            iface_id: iface_id.into(),
            host_dev_name: host_dev_name.into(),
            guest_mac: None,
            mtu: None,
            rx_rate_limiter: None,
            tx_rate_limiter: None,
        }
    }
}

/// Firecracker's `PATCH /network-interfaces/{iface_id}`: new limits of an interface of a VM that runs.
/// What is absent stays as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkPatch {
    /// The interface.
    pub iface_id: String,
    /// How fast the guest may receive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter: Option<RateLimiterConfig>,
    /// How fast the guest may send.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter: Option<RateLimiterConfig>,
}

impl NetworkInterface {
    /// Changes what `patch` has.
    pub(crate) fn update(&mut self, patch: &NetworkPatch) {
        for (limiter, patch) in [
            (&mut self.rx_rate_limiter, &patch.rx_rate_limiter),
            (&mut self.tx_rate_limiter, &patch.tx_rate_limiter),
        ] {
            if let Some(patch) = patch {
                let limiter = limiter.get_or_insert_default();
                limiter.bandwidth = patch.bandwidth.or(limiter.bandwidth);
                limiter.ops = patch.ops.or(limiter.ops);
            }
        }
    }
}
