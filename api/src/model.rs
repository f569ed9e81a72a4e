//! The JSON bodies of the API's replies, for the server and its clients alike.
//!
//! Counters go over the wire as they are defined: the merge engine's [`Stats`] and [`RegionStats`],
//! and [`KsmProcess`].

use std::collections::BTreeMap;

use dedup::{Pace, RegionStats, Run, Stats};
use serde::{Deserialize, Serialize};
use vmm::config::MergeMode;
use vmm::{KsmProcess, MemoryInfo, VmInfo, VmState, WriteProbe};

use crate::fault::FaultBody;

/// Reply of `GET /version`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// Samepage's version; Firecracker's name for the field.
    pub firecracker_version: String,
    /// What the monitors of this server cannot give up on this host; absent where merge domains are no
    /// processes of their own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lock_down_missing: Option<Vec<String>>,
}

/// Reply of `GET /vms/{id}`, and an item of `GET /vms`: Firecracker's `InstanceInfo` and more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmDescription {
    /// The VM's id.
    pub id: String,
    /// Always `Samepage`.
    pub app_name: String,
    /// Samepage's version.
    pub vmm_version: String,
    /// `Not started`, `Running`, `Paused` (Firecracker's words), `Ended`, or `Unknown` while its
    /// monitor does not answer.
    pub state: String,
    /// Why it ended, by name: `guest_shutdown`, `guest_panic`, ..., or `crashed` if its monitor ended
    /// under it; null before.
    pub end_reason: Option<String>,
    /// The same for a human, with details, or why its state is unknown; null before.
    pub end_message: Option<String>,
    /// The merge domain its config names; null if it shares with nobody.
    pub merge_domain: Option<String>,
    /// Who merges its memory.
    pub merge: MergeMode,
    /// Guest memory.
    pub mem_size_bytes: u64,
    /// Number of vCPUs.
    pub vcpu_count: u64,
    /// When memory runs out, the VM with the lowest is stopped first.
    pub oom_priority: i32,
    /// What a pageload guest says of itself; null for any other guest.
    pub report: Option<Report>,
}

/// The registers of a pageload guest's report port.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// 1 filling, 2 filled and verifying, 3 finished, 4 failed.
    pub phase: u64,
    /// Complete passes over all pages it owns.
    pub verify_passes: u64,
    /// Pages that did not hold what was written there.
    pub verify_errors: u64,
    /// Pages it has written.
    pub pages_written: u64,
    /// Pages it has verified, over all passes.
    pub verified_pages: u64,
    /// How long single writes took; null if the guest times none.
    pub probe: Option<WriteProbe>,
}

/// A value of `GET /merge`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum DomainReply {
    /// The domain.
    Told(Box<Domain>),
    /// Its monitor does not answer, and why.
    Silent(FaultBody),
}

/// Reply of `GET /merge/{domain}`, and a value of `GET /merge`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Domain {
    /// What the worker does.
    pub run: Run,
    /// How fast it does it.
    #[serde(flatten)]
    pub pace: Pace,
    /// The engine's counters over all VMs of the domain.
    #[serde(flatten)]
    pub stats: Stats,
    /// Its memory: limits, use, and what it could come to.
    pub memory: MemoryInfo,
    /// What kernel KSM tells of it; null if that merges no VM of it now.
    pub ksm: Option<DomainKsm>,
    /// Each VM's part, by id.
    pub vms: BTreeMap<String, VmMerge>,
}

/// What kernel KSM tells of a domain.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainKsm {
    /// What it does for all of the host, `/sys/kernel/mm/ksm/run`; null if that cannot be told.
    pub run: Option<Run>,
    /// Pages of the domain's VMs that are mapped to a page of KSM; null if the kernel does not tell.
    pub pages_merging: Option<u64>,
    /// Its figures for the server: all of its domains together.
    pub process: Option<KsmProcess>,
}

/// Reply of `GET /vms/{id}/merge`, and of each VM in a [`Domain`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmMerge {
    /// The engine's counters.
    #[serde(flatten)]
    pub stats: RegionStats,
    /// What kernel KSM tells of it; null if that does not merge it now.
    pub ksm: Option<VmKsm>,
}

/// What kernel KSM tells of a VM.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmKsm {
    /// What it does for all of the host, `/sys/kernel/mm/ksm/run`; null if that cannot be told.
    pub run: Option<Run>,
    /// Pages of the VM that are mapped to a page of KSM; null if the kernel does not tell.
    pub pages_merging: Option<u64>,
}

/// Samepage's version, as every reply that carries one says it.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

impl Version {
    /// Of this build.
    pub fn current() -> Version {
        Version {
            firecracker_version: VERSION.to_owned(),
            lock_down_missing: None,
        }
    }
}

/// The state in Firecracker's words.
fn state_name(state: &VmState) -> &'static str {
    match state {
        VmState::NotStarted => "Not started",
        VmState::Running => "Running",
        VmState::Paused => "Paused",
        VmState::Ended(_) => "Ended",
    }
}

impl From<&VmInfo> for VmDescription {
    fn from(info: &VmInfo) -> VmDescription {
        let reason = match &info.state {
            VmState::Ended(reason) => Some(reason),
            _ => None,
        };
        VmDescription {
            id: info.id.to_string(),
            app_name: "Samepage".to_owned(),
            vmm_version: VERSION.to_owned(),
            state: state_name(&info.state).to_owned(),
            end_reason: reason.map(|reason| reason.name().to_owned()),
            end_message: reason.map(ToString::to_string),
            merge_domain: info.merge_domain.as_ref().map(ToString::to_string),
            merge: info.merge,
            mem_size_bytes: info.mem_size_bytes,
            vcpu_count: u64::from(info.vcpu_count),
            oom_priority: info.oom_priority,
            report: info.report.as_ref().map(|report| Report {
                phase: report.phase,
                verify_passes: report.verify_passes,
                verify_errors: report.verify_errors,
                pages_written: report.pages_written,
                verified_pages: report.verified_pages,
                probe: report.probe,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use vmm::virtio::BalloonStatistics;

    use super::*;

    fn keys(value: &serde_json::Value) -> Vec<String> {
        let mut keys: Vec<_> = value.as_object().unwrap().keys().cloned().collect();
        keys.sort();
        keys
    }

    fn full_version() -> Version {
        Version {
            lock_down_missing: Some(Vec::new()),
            ..Version::current()
        }
    }

    fn full_statistics() -> BalloonStatistics {
        BalloonStatistics {
            guest: BalloonStatistics::NAMES.map(|name| (name, 1)).into(),
            ..BalloonStatistics::default()
        }
    }

    #[test]
    fn openapi_document_has_every_field_and_no_other() {
        let info = VmInfo {
            id: "a".parse().unwrap(),
            state: VmState::NotStarted,
            merge_domain: None,
            merge: MergeMode::On,
            mem_size_bytes: 1 << 20,
            vcpu_count: 1,
            oom_priority: 0,
            report: None,
        };
        let domain = Domain {
            run: Run::Merge,
            pace: Pace::default(),
            stats: Stats::default(),
            memory: MemoryInfo::default(),
            ksm: Some(DomainKsm::default()),
            vms: BTreeMap::from([("a".to_owned(), VmMerge::default())]),
        };
        let document: serde_json::Value = serde_json::from_str(crate::OPENAPI_JSON).unwrap();
        let schemas = &document["components"]["schemas"];
        for (schema, reply) in [
            (
                "Vm",
                serde_json::to_value(VmDescription::from(&info)).unwrap(),
            ),
            ("Report", serde_json::to_value(Report::default()).unwrap()),
            (
                "WriteProbe",
                serde_json::to_value(WriteProbe::default()).unwrap(),
            ),
            (
                "WriteLatency",
                serde_json::to_value(WriteProbe::default().shared).unwrap(),
            ),
            (
                "Memory",
                serde_json::to_value(MemoryInfo::default()).unwrap(),
            ),
            ("Domain", serde_json::to_value(&domain).unwrap()),
            ("VmMerge", serde_json::to_value(VmMerge::default()).unwrap()),
            ("VmKsm", serde_json::to_value(VmKsm::default()).unwrap()),
            (
                "DomainKsm",
                serde_json::to_value(DomainKsm::default()).unwrap(),
            ),
            (
                "KsmProcess",
                serde_json::to_value(KsmProcess::default()).unwrap(),
            ),
            (
                "MergedNow",
                serde_json::to_value(dedup::MergedNow::default()).unwrap(),
            ),
            ("Version", serde_json::to_value(full_version()).unwrap()),
            (
                "BalloonStatistics",
                serde_json::to_value(full_statistics()).unwrap(),
            ),
        ] {
            assert_eq!(
                keys(&schemas[schema]["properties"]),
                keys(&reply),
                "{schema}"
            );
        }
        let round_trip: Domain =
            serde_json::from_value(serde_json::to_value(&domain).unwrap()).unwrap();
        assert_eq!(round_trip, domain);
    }
}
