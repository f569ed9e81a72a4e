//! The vsock device, as Firecracker's `vsock` describes it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The least address of a guest: those below are the hypervisor's and the host's.
pub const GUEST_CID_MIN: u32 = 3;
/// Longest `uds_path` in bytes: `_`, a port of ten digits and a NUL behind it fit into an address
/// (`sun_path` of unix(7)).
pub const UDS_PATH_LEN_MAX: usize = 108 - 1 - 10 - 1;

/// Streams between programs of the guest and of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's address.
    pub guest_cid: u32,
    /// The unix socket that clients of the guest connect to. It is made when the VM starts, and
    /// removed when that ends. Servers for the guest listen on it with `_` and their port behind it.
    pub uds_path: PathBuf,
    /// Means nothing, as in Firecracker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_id: Option<String>,
}
