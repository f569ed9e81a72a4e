//! A VM's configuration: the Firecracker config file, plus one key of our own.
//!
//! Field names, values and defaults are Firecracker's (`src/vmm/src/resources.rs` and
//! `src/vmm/src/vmm_config/` there), so that an existing file works unchanged. What Firecracker
//! knows and Samepage does not support yet is refused by name when it asks for something, never
//! silently ignored.

mod balloon;
mod devices;
mod drive;
mod entropy;
mod mac;
mod machine;
mod merge_mode;
mod network;
mod part;
mod rate_limiter;
mod unsupported;
mod validate;
mod vsock;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use balloon::{BalloonConfig, BalloonPatch};
pub use devices::VirtioDevice;
pub use drive::{CacheType, Drive, DriveSamepage, IoEngine};
pub use entropy::EntropyConfig;
pub use mac::{MacAddress, MacAddressError};
pub use machine::{HugePages, MEM_SIZE_MIB_MAX, MachineConfig, MachinePatch, VCPU_COUNT_MAX};
pub use merge_mode::MergeMode;
pub use network::{HOST_DEV_NAME_LEN_MAX, MTU_MAX, MTU_MIN, NetworkInterface, NetworkPatch};
pub use part::ConfigPart;
pub use rate_limiter::{RateLimiterConfig, TokenBucketConfig};
pub use unsupported::Unsupported;
pub use validate::ConfigError;
pub use vsock::{GUEST_CID_MIN, UDS_PATH_LEN_MAX, VsockConfig};

use crate::id::MergeDomain;

/// `kernel_image_path` that names the bare-metal guest embedded in the program instead of a file.
pub const BUILTIN_PAGELOAD: &str = "builtin:pageload";

/// Kernel command line when `boot_args` is absent: Firecracker's default
/// (`src/vmm/src/vmm_config/boot_source.rs`).
pub const DEFAULT_BOOT_ARGS: &str = "reboot=k panic=1 nomodule 8250.nr_uarts=0 i8042.noaux \
     i8042.nomux i8042.dumbkbd swiotlb=noforce";

/// Everything a VM is made of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct VmConfig {
    /// What the VM boots. May be absent until the VM starts, and is an empty path then, as in
    /// Firecracker.
    #[serde(default, skip_serializing_if = "BootSource::is_absent")]
    pub boot_source: BootSource,
    /// Block devices, in the order the guest finds them; a root device is moved to the front.
    #[serde(default)]
    pub drives: Vec<Drive>,
    /// vCPUs and memory.
    #[serde(default)]
    pub machine_config: MachineConfig,
    /// What is Samepage's own.
    #[serde(default)]
    pub samepage: SamepageConfig,
    /// Network interfaces, in the order the guest finds them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub network_interfaces: Vec<NetworkInterface>,
    /// Streams between programs of the guest and of the host, or none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockConfig>,
    /// Memory that the guest gives back. Without it a VM whose memory the engine merges has one of no
    /// size, which reports what the guest does not use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonConfig>,
    /// A source of random bytes, or none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entropy: Option<EntropyConfig>,
    /// Firecracker's `cpu-config`.
    #[serde(default, skip_serializing_if = "Unsupported::is_absent")]
    pub cpu_config: Unsupported,
    /// Firecracker's `mmds-config`.
    #[serde(default, skip_serializing_if = "Unsupported::is_absent")]
    pub mmds_config: Unsupported,
    /// Firecracker's `logger`.
    #[serde(default, skip_serializing_if = "Unsupported::is_absent")]
    pub logger: Unsupported,
    /// Firecracker's `metrics`.
    #[serde(default, skip_serializing_if = "Unsupported::is_absent")]
    pub metrics: Unsupported,
    /// Firecracker's `pmem`.
    #[serde(default, skip_serializing_if = "Unsupported::is_absent")]
    pub pmem: Unsupported,
    /// Firecracker's `memory-hotplug`.
    #[serde(default, skip_serializing_if = "Unsupported::is_absent")]
    pub memory_hotplug: Unsupported,
    /// Firecracker's `serial`.
    #[serde(default, skip_serializing_if = "Unsupported::is_absent")]
    pub serial: Unsupported,
}

impl VmConfig {
    /// A VM that boots `kernel_image_path` with everything else at its default.
    pub fn new(kernel_image_path: impl Into<PathBuf>) -> VmConfig {
        VmConfig {
            boot_source: BootSource {
                kernel_image_path: kernel_image_path.into(),
                boot_args: None,
                initrd_path: None,
            },
            drives: Vec::new(),
            machine_config: MachineConfig::default(),
            samepage: SamepageConfig::default(),
            network_interfaces: Vec::new(),
            vsock: None,
            balloon: None,
            entropy: None,
            cpu_config: Unsupported::ABSENT,
            mmds_config: Unsupported::ABSENT,
            logger: Unsupported::ABSENT,
            metrics: Unsupported::ABSENT,
            pmem: Unsupported::ABSENT,
            memory_hotplug: Unsupported::ABSENT,
            serial: Unsupported::ABSENT,
        }
    }

    /// Guest memory in bytes.
    pub fn mem_size_bytes(&self) -> u64 {
        self.machine_config.mem_size_mib << 20
    }

    /// What the host's kernel gives at a time when guest memory is touched, in bytes.
    pub(crate) fn page_bytes(&self) -> u64 {
        match self.machine_config.huge_pages {
            HugePages::None => 4096,
            HugePages::Transparent | HugePages::Hugetlbfs2M => 2 << 20,
        }
    }
}

/// What a VM boots.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    /// An uncompressed ELF kernel or a bzImage; or [`BUILTIN_PAGELOAD`].
    pub kernel_image_path: PathBuf,
    /// Kernel command line; [`DEFAULT_BOOT_ARGS`] when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_args: Option<String>,
    /// Initial RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd_path: Option<PathBuf>,
}

impl BootSource {
    /// Whether no kernel was named yet.
    pub fn is_absent(&self) -> bool {
        *self == BootSource::default()
    }

    /// Whether the embedded bare-metal guest is asked for.
    pub fn is_builtin_pageload(&self) -> bool {
        self.kernel_image_path == Path::new(BUILTIN_PAGELOAD)
    }

    /// The command line as configured, before the monitor adds its devices.
    pub fn boot_args(&self) -> &str {
        self.boot_args.as_deref().unwrap_or(DEFAULT_BOOT_ARGS)
    }
}

/// What is Samepage's own: the key `samepage`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SamepageConfig {
    /// VMs that name the same domain may share pages; a VM that names none shares with nobody.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub merge_domain: Option<MergeDomain>,
    /// Who merges this VM's memory.
    #[serde(default)]
    pub merge: MergeMode,
    /// Which VM is ended first when memory runs out: the lowest, and of several that one with the most
    /// private memory. Counts among all VMs that share the limit, also in other merge domains.
    #[serde(default)]
    pub oom_priority: i32,
}
