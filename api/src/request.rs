//! What a client can ask for, after everything that can be checked without state was checked.

use dedup::Run;
use serde::{Deserialize, Deserializer, Serialize};
use vmm::VmId;
use vmm::config::VmConfig;

use crate::domain_name::DomainName;

/// One request of the API.
#[derive(Debug)]
pub enum Request {
    /// `GET /version`
    Version,
    /// `GET /openapi.json`
    OpenApi,
    /// `GET /vms`
    ListVms,
    /// `PUT /vms/{id}`
    CreateVm(VmId, Box<VmConfig>),
    /// `GET /vms/{id}`
    DescribeVm(VmId),
    /// `DELETE /vms/{id}`
    DeleteVm(VmId),
    /// `PUT /vms/{id}/actions`
    ActOnVm(VmId, ActionType),
    /// `PATCH /vms/{id}/vm`
    SetVmState(VmId, DesiredState),
    /// `GET /vms/{id}/config` and, as Firecracker names it, `GET /vms/{id}/vm/config`
    DescribeVmConfig(VmId),
    /// `GET /vms/{id}/merge`
    DescribeVmMerge(VmId),
    /// `GET /vms/{id}/console`
    VmConsole(VmId),
    /// `GET /merge`
    ListDomains,
    /// `GET /merge/{domain}`
    DescribeDomain(DomainName),
    /// `PATCH /merge/{domain}`
    PatchDomain(DomainName, MergePatch),
}

/// The body of `PUT /vms/{id}/actions`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ActionBody {
    /// What to do.
    pub action_type: ActionType,
}

/// Firecracker's actions, and two of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ActionType {
    /// Boots the VM.
    InstanceStart,
    /// Asks the guest to reboot, by its keyboard controller.
    SendCtrlAltDel,
    /// Ends the VM at once and gives its memory back (ours; Firecracker's process is killed).
    InstanceStop,
    /// Merges the VM's memory now; the reply says what that came to (ours).
    MergeNow,
    /// Accepted for Firecracker's clients; there is no metrics file to flush.
    FlushMetrics,
}

/// The body of `PATCH /vms/{id}/vm`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StateBody {
    /// The state to bring the VM to.
    pub state: DesiredState,
}

/// The states that a client can ask a started VM to be in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum DesiredState {
    /// No vCPU runs.
    Paused,
    /// The vCPUs run.
    Resumed,
}

/// The body of `PATCH /merge/{domain}`: what is absent stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MergePatch {
    /// What the worker does; KSM's `run` by name.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub run: Option<Run>,
    /// Pages looked at per batch, as KSM's file of this name.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub pages_to_scan: Option<u32>,
    /// Sleep between batches, as KSM's file of this name.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub sleep_millisecs: Option<u32>,
    /// Memory in bytes that the domain may take; null and 0 are for no budget.
    #[serde(
        skip_serializing_if = "Option::is_none",
        default,
        deserialize_with = "present"
    )]
    pub memory_budget: Option<Option<u64>>,
    /// How many times its limit may be promised to VMs; null and 0 are for as often as one likes.
    #[serde(
        skip_serializing_if = "Option::is_none",
        default,
        deserialize_with = "present"
    )]
    pub overcommit_ratio: Option<Option<f64>>,
    /// Whether VMs are ended so that an unmerge fits.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub unmerge_victims: Option<bool>,
}

/// Tells a value that is null from one that is absent.
fn present<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
) -> Result<Option<T>, D::Error> {
    T::deserialize(deserializer).map(Some)
}
