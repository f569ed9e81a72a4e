//! One block device, as Firecracker's `drives` describe it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::Unsupported;

/// A block device over a file of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drive {
    /// Its name in the API: 1 to 64 characters of `[A-Za-z0-9_]`.
    pub drive_id: String,
    /// The file; its size is the disk's, rounded down to whole 512-byte sectors.
    pub path_on_host: PathBuf,
    /// Whether the guest's root file system is on it. At most one drive may say so.
    pub is_root_device: bool,
    /// Whether the guest may not write to it.
    #[serde(default)]
    pub is_read_only: bool,
    /// Partition with the root file system (`root=PARTUUID=`), for a root device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partuuid: Option<String>,
    /// Whether the guest may ask for a flush to stable storage.
    #[serde(default)]
    pub cache_type: CacheType,
    /// What is Samepage's own.
    #[serde(default, skip_serializing_if = "DriveSamepage::is_default")]
    pub samepage: DriveSamepage,
    /// How the file is read and written.
    #[serde(default)]
    pub io_engine: IoEngine,
    /// Firecracker's rate limiter.
    #[serde(default, skip_serializing_if = "Unsupported::is_absent")]
    pub rate_limiter: Unsupported,
    /// Firecracker's vhost-user-blk socket.
    #[serde(default, skip_serializing_if = "Unsupported::is_absent")]
    pub socket: Unsupported,
}

/// What is Samepage's own about a drive: the key `samepage`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveSamepage {
    /// Whether the file is locked while the VM runs: nobody else may open it for writing, and nobody
    /// else at all if the guest may write. Without it two VMs can destroy one image.
    #[serde(default = "lock_by_default")]
    pub lock: bool,
}

impl DriveSamepage {
    fn is_default(&self) -> bool {
        *self == DriveSamepage::default()
    }
}

impl Default for DriveSamepage {
    fn default() -> DriveSamepage {
        DriveSamepage {
            lock: lock_by_default(),
        }
    }
}

fn lock_by_default() -> bool {
    true
}

/// Firecracker's `cache_type`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CacheType {
    /// The device offers no flush: a host crash may lose what the guest wrote.
    #[default]
    Unsafe,
    /// The device offers flush, and a flush reaches the disk.
    Writeback,
}

/// Firecracker's `io_engine`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum IoEngine {
    /// Reads and writes on the event loop thread.
    #[default]
    Sync,
    /// io_uring; not supported yet.
    Async,
}
