//! vCPUs and memory, as Firecracker's `machine-config` describes them.

use serde::{Deserialize, Serialize};

/// Most vCPUs of a VM, Firecracker's limit.
pub const VCPU_COUNT_MAX: u8 = 32;

/// Most memory of a VM: 1 TiB. Guest physical addresses stay within 41 bits, which every CPU that
/// runs KVM has.
pub const MEM_SIZE_MIB_MAX: u64 = 1 << 20;

/// Firecracker's `machine-config`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// Number of vCPUs, 1 to [`VCPU_COUNT_MAX`].
    pub vcpu_count: u8,
    /// Guest memory in MiB, 1 to [`MEM_SIZE_MIB_MAX`].
    pub mem_size_mib: u64,
    /// Whether the guest sees two threads a core; then `vcpu_count` is 1 or even.
    #[serde(default)]
    pub smt: bool,
    /// Dirty page tracking for diff snapshots; not supported yet.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// CPU template; only `None` is supported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_template: Option<String>,
    /// Huge pages of the host; only `None` is supported, as merging works on 4 KiB pages.
    #[serde(default)]
    pub huge_pages: HugePages,
}

impl Default for MachineConfig {
    fn default() -> MachineConfig {
        MachineConfig {
            vcpu_count: 1,
            mem_size_mib: 128,
            smt: false,
            track_dirty_pages: false,
            cpu_template: None,
            huge_pages: HugePages::None,
        }
    }
}

/// The body of Firecracker's `PATCH /machine-config`: what is absent stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachinePatch {
    /// Number of vCPUs.
    #[serde(default)]
    pub vcpu_count: Option<u8>,
    /// Guest memory in MiB.
    #[serde(default)]
    pub mem_size_mib: Option<u64>,
    /// Whether the guest sees two threads a core.
    #[serde(default)]
    pub smt: Option<bool>,
    /// Dirty page tracking for diff snapshots.
    #[serde(default)]
    pub track_dirty_pages: Option<bool>,
    /// CPU template.
    #[serde(default)]
    pub cpu_template: Option<String>,
    /// Huge pages of the host.
    #[serde(default)]
    pub huge_pages: Option<HugePages>,
}

impl MachineConfig {
    /// Takes over what `patch` has.
    pub(super) fn update(&mut self, patch: &MachinePatch) {
        self.vcpu_count = patch.vcpu_count.unwrap_or(self.vcpu_count);
        self.mem_size_mib = patch.mem_size_mib.unwrap_or(self.mem_size_mib);
        self.smt = patch.smt.unwrap_or(self.smt);
        self.track_dirty_pages = patch.track_dirty_pages.unwrap_or(self.track_dirty_pages);
        if let Some(template) = &patch.cpu_template {
            self.cpu_template = Some(template.clone());
        }
        self.huge_pages = patch.huge_pages.unwrap_or(self.huge_pages);
    }
}

/// Firecracker's `huge_pages`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum HugePages {
    /// 4 KiB pages.
    #[default]
    None,
    /// Transparent huge pages.
    Transparent,
    /// hugetlbfs pages of 2 MiB.
    #[serde(rename = "2M")]
    Hugetlbfs2M,
}
