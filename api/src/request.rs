//! What a client can ask for, after everything that can be checked without state was checked.

use dedup::{AdvisorMode, Pace, Run};
use serde::{Deserialize, Deserializer, Serialize};
use vmm::VmId;
use vmm::config::{BalloonPatch, ConfigPart, NetworkPatch, VmConfig};

use crate::domain_name::DomainName;
use crate::telemetry::{LoggerConfig, MetricsConfig};

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
    /// `PUT /vms/{id}/boot-source` and the like: a part of the configuration, before the start
    ConfigureVm(VmId, Box<ConfigPart>),
    /// `PATCH /vms/{id}/network-interfaces/{iface_id}`
    LimitNetwork(VmId, Box<NetworkPatch>),
    /// `GET /vms/{id}/balloon`
    DescribeBalloon(VmId),
    /// `PATCH /vms/{id}/balloon` and `PATCH /vms/{id}/balloon/statistics`
    PatchBalloon(VmId, BalloonPatch),
    /// `GET /vms/{id}/balloon/statistics`
    BalloonStatistics(VmId),
    /// `PATCH /vms/{id}/vm`
    SetVmState(VmId, DesiredState),
    /// `GET /vms/{id}/config` and, as Firecracker names it, `GET /vms/{id}/vm/config`
    DescribeVmConfig(VmId),
    /// `GET /vms/{id}/machine-config`
    DescribeMachine(VmId),
    /// `GET /vms/{id}/version`
    VmVersion(VmId),
    /// `PUT /vms/{id}/logger`
    SetLogger(VmId, LoggerConfig),
    /// `PUT /vms/{id}/metrics`
    SetMetrics(VmId, MetricsConfig),
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

impl Request {
    /// The VM that it is about, if it is about one.
    pub fn vm(&self) -> Option<&VmId> {
        match self {
            Request::Version
            | Request::OpenApi
            | Request::ListVms
            | Request::ListDomains
            | Request::DescribeDomain(_)
            | Request::PatchDomain(..) => None,
            Request::CreateVm(id, _)
            | Request::DescribeVm(id)
            | Request::DeleteVm(id)
            | Request::ActOnVm(id, _)
            | Request::ConfigureVm(id, _)
            | Request::LimitNetwork(id, _)
            | Request::DescribeBalloon(id)
            | Request::PatchBalloon(id, _)
            | Request::BalloonStatistics(id)
            | Request::SetVmState(id, _)
            | Request::DescribeVmConfig(id)
            | Request::DescribeMachine(id)
            | Request::VmVersion(id)
            | Request::SetLogger(id, _)
            | Request::SetMetrics(id, _)
            | Request::DescribeVmMerge(id)
            | Request::VmConsole(id) => Some(id),
        }
    }
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
    /// Writes a line of metrics, if there is a file for them.
    FlushMetrics,
}

/// The body of `PATCH /vms/{id}/balloon`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonBody {
    /// How much the guest is to give up.
    pub amount_mib: u32,
}

/// The body of `PATCH /vms/{id}/balloon/statistics`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonStatisticsBody {
    /// How often the guest tells of its memory, in seconds.
    pub stats_polling_interval_s: u16,
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
    /// Highest share of one CPU for the worker, 1 to 100.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub max_cpu_percent: Option<u32>,
    /// Who says how many pages a batch has, as KSM's file of this name.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub advisor_mode: Option<AdvisorMode>,
    /// In this time the advisor has everything visited that is due.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub target_scan_time_ms: Option<u32>,
    /// Fewest pages that the advisor may advise, as KSM's file of this name.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub advisor_min_pages_to_scan: Option<u32>,
    /// Most pages that the advisor may advise, as KSM's file of this name.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub advisor_max_pages_to_scan: Option<u32>,
    /// Memory in bytes that the domain may take; null and 0 are for no budget.
    #[serde(
        skip_serializing_if = "Option::is_none",
        default,
        deserialize_with = "present"
    )]
    pub memory_budget: Option<Option<u64>>,
    /// Sets also a memory budget that VMs are ended for at once.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub force: Option<bool>,
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

impl MergePatch {
    /// The pace that comes of it, `from` the one there is.
    ///
    /// # Errors
    /// For a value that makes no sense, and for `pages_to_scan` where the advisor sets it, which
    /// KSM refuses too.
    pub fn pace(&self, from: Pace) -> Result<Pace, String> {
        let pace = Pace {
            pages_to_scan: self.pages_to_scan.unwrap_or(from.pages_to_scan),
            sleep_millisecs: self.sleep_millisecs.unwrap_or(from.sleep_millisecs),
            max_cpu_percent: self.max_cpu_percent.unwrap_or(from.max_cpu_percent),
            advisor_mode: self.advisor_mode.unwrap_or(from.advisor_mode),
            target_scan_time_ms: self.target_scan_time_ms.unwrap_or(from.target_scan_time_ms),
            advisor_min_pages_to_scan: self
                .advisor_min_pages_to_scan
                .unwrap_or(from.advisor_min_pages_to_scan),
            advisor_max_pages_to_scan: self
                .advisor_max_pages_to_scan
                .unwrap_or(from.advisor_max_pages_to_scan),
        };
        pace.validate().map_err(|error| error.to_string())?;
        match self.pages_to_scan {
            Some(pages) if pace.advisor_mode == AdvisorMode::ScanTime => Err(format!(
                "pages_to_scan {pages}: is set by the advisor while advisor_mode is \"scan-time\""
            )),
            _ => Ok(pace),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn patch(json: &str) -> MergePatch {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn a_patch_changes_what_it_names_and_nothing_else() {
        let before = Pace::default();
        assert_eq!(patch("{}").pace(before), Ok(before));
        let after = patch(r#"{"max_cpu_percent": 7, "advisor_mode": "scan-time"}"#).pace(before);
        let expected = Pace {
            max_cpu_percent: 7,
            advisor_mode: AdvisorMode::ScanTime,
            ..before
        };
        assert_eq!(after, Ok(expected));
    }

    #[test]
    fn pages_of_a_batch_are_the_advisors_while_there_is_one() {
        let advised = Pace {
            advisor_mode: AdvisorMode::ScanTime,
            ..Pace::default()
        };
        let refused = patch(r#"{"pages_to_scan": 9}"#).pace(advised).unwrap_err();
        assert!(refused.starts_with("pages_to_scan 9: "), "{refused}");
        let off = patch(r#"{"pages_to_scan": 9, "advisor_mode": "none"}"#).pace(advised);
        assert_eq!(off.unwrap().pages_to_scan, 9);
    }
}
