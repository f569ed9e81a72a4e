//! Firecracker's counters, as far as there is something to count here.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};
use vmm::VmId;
use vmm::config::ConfigPart;
use vmm::virtio::VsockCounts;

use crate::request::{ActionType, DesiredState, Request};

/// Every counter that a line has, by its group: those that Firecracker has too.
const FIELDS: &[(&str, &[&str])] = &[
    (
        "balloon",
        &[
            "deflate_count",
            "event_fails",
            "free_page_report_count",
            "free_page_report_fails",
            "free_page_report_freed",
            "inflate_count",
            "stats_update_fails",
            "stats_updates_count",
        ],
    ),
    (
        "get_api_requests",
        &[
            "instance_info_count",
            "machine_cfg_count",
            "vmm_version_count",
        ],
    ),
    (
        "put_api_requests",
        &[
            "actions_count",
            "actions_fails",
            "boot_source_count",
            "boot_source_fails",
            "drive_count",
            "drive_fails",
            "logger_count",
            "logger_fails",
            "machine_cfg_count",
            "machine_cfg_fails",
            "metrics_count",
            "metrics_fails",
            "network_count",
            "network_fails",
            "vsock_count",
            "vsock_fails",
        ],
    ),
    (
        "patch_api_requests",
        &[
            "machine_cfg_count",
            "machine_cfg_fails",
            "network_count",
            "network_fails",
        ],
    ),
    ("latencies_us", &["pause_vm", "resume_vm"]),
    ("logger", &["missed_log_count", "missed_metrics_count"]),
    ("vsock", &VsockCounts::NAMES),
];

/// What was counted since the last line.
#[derive(Debug, Default)]
pub(super) struct Counts(BTreeMap<(&'static str, String), u64>);

impl Counts {
    /// Counts `more`.
    pub(super) fn add(&mut self, group: &'static str, field: &str, more: u64) {
        *self.0.entry((group, field.to_owned())).or_default() += more;
    }

    /// Notes the last value.
    pub(super) fn set(&mut self, group: &'static str, field: &str, value: u64) {
        self.0.insert((group, field.to_owned()), value);
    }

    /// Begins from zero; the last latencies stay, as in Firecracker.
    pub(super) fn begin_anew(&mut self) {
        self.0.retain(|&(group, _), _| group == "latencies_us");
    }

    /// All of them as a line of JSON.
    pub(super) fn line(&self, id: Option<&VmId>) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now_ms = now.map_or(0, |now| now.as_millis());
        let now_ms = u64::try_from(now_ms).unwrap_or(u64::MAX);
        let mut line = Map::from_iter([("utc_timestamp_ms".to_owned(), json!(now_ms))]);
        if let Some(id) = id {
            line.insert("id".to_owned(), json!(id.as_str()));
        }
        for &(group, fields) in FIELDS {
            let count = |field: &str| self.0.get(&(group, field.to_owned())).copied();
            let counted = fields.iter().map(|&field| {
                let value = json!(count(field).unwrap_or_default());
                (field.to_owned(), value)
            });
            line.insert(group.to_owned(), Value::Object(counted.collect()));
        }
        format!("{}\n", Value::Object(line))
    }
}

/// Group and name of the counter of a request, without `_count` and `_fails`.
pub(super) fn counter_of(request: &Request) -> Option<(&'static str, &'static str)> {
    let (get, put) = ("get_api_requests", "put_api_requests");
    let patch = "patch_api_requests";
    Some(match request {
        Request::DescribeVm(_) => (get, "instance_info"),
        Request::DescribeMachine(_) => (get, "machine_cfg"),
        Request::VmVersion(_) => (get, "vmm_version"),
        Request::ActOnVm(..) => (put, "actions"),
        Request::SetLogger(..) => (put, "logger"),
        Request::SetMetrics(..) => (put, "metrics"),
        Request::LimitNetwork(..) => (patch, "network"),
        Request::ConfigureVm(_, part) => match **part {
            ConfigPart::BootSource(_) => (put, "boot_source"),
            ConfigPart::Drive(_) => (put, "drive"),
            ConfigPart::Machine(_) => (put, "machine_cfg"),
            ConfigPart::MachinePatch(_) => (patch, "machine_cfg"),
            ConfigPart::NetworkInterface(_) => (put, "network"),
            ConfigPart::Vsock(_) => (put, "vsock"),
            // Firecracker counts the device's work, not the request.
            ConfigPart::Balloon(_) | ConfigPart::Entropy(_) => return None,
        },
        _ => return None,
    })
}

/// The latency that a request's time is.
pub(super) fn latency_of(request: &Request) -> Option<&'static str> {
    match request {
        Request::SetVmState(_, DesiredState::Paused) => Some("pause_vm"),
        Request::SetVmState(_, DesiredState::Resumed) => Some("resume_vm"),
        _ => None,
    }
}

/// A request in a few words. Not its values: a configuration may hold secrets in a command line.
pub(super) fn text_of(request: &Request) -> String {
    let part = |part: &ConfigPart| match part {
        ConfigPart::Balloon(_) => "PUT /balloon",
        ConfigPart::BootSource(_) => "PUT /boot-source",
        ConfigPart::Drive(_) => "PUT /drives",
        ConfigPart::Entropy(_) => "PUT /entropy",
        ConfigPart::Machine(_) => "PUT /machine-config",
        ConfigPart::MachinePatch(_) => "PATCH /machine-config",
        ConfigPart::NetworkInterface(_) => "PUT /network-interfaces",
        ConfigPart::Vsock(_) => "PUT /vsock",
    };
    match request {
        Request::ActOnVm(_, action) => format!("PUT /actions {}", action_name(*action)),
        Request::SetVmState(_, state) => format!("PATCH /vm {state:?}"),
        Request::ConfigureVm(_, sent) => part(sent).to_owned(),
        Request::LimitNetwork(..) => "PATCH /network-interfaces".to_owned(),
        Request::DescribeBalloon(_) => "GET /balloon".to_owned(),
        Request::PatchBalloon(..) => "PATCH /balloon".to_owned(),
        Request::BalloonStatistics(_) => "GET /balloon/statistics".to_owned(),
        Request::SetLogger(..) => "PUT /logger".to_owned(),
        Request::SetMetrics(..) => "PUT /metrics".to_owned(),
        Request::CreateVm(..) => "PUT /vms".to_owned(),
        Request::DeleteVm(_) => "DELETE /vms".to_owned(),
        Request::DescribeMachine(_) => "GET /machine-config".to_owned(),
        Request::DescribeVmConfig(_) => "GET /vm/config".to_owned(),
        Request::VmVersion(_) => "GET /version".to_owned(),
        Request::DescribeVmMerge(_) => "GET /merge".to_owned(),
        Request::VmConsole(_) => "GET /console".to_owned(),
        _ => "GET /".to_owned(),
    }
}

fn action_name(action: ActionType) -> String {
    format!("{action:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_every_group_and_counts_since_the_last_one() {
        let mut counts = Counts::default();
        counts.add("put_api_requests", "drive_count", 1);
        counts.add("put_api_requests", "drive_count", 1);
        counts.set("latencies_us", "pause_vm", 7);
        let id = "a".parse().unwrap();
        let line =
            |counts: &Counts| -> Value { serde_json::from_str(&counts.line(Some(&id))).unwrap() };
        let first = line(&counts);
        assert_eq!(first["put_api_requests"]["drive_count"], 2);
        assert_eq!(first["get_api_requests"]["instance_info_count"], 0);
        assert_eq!(first["id"], "a");
        assert!(first["utc_timestamp_ms"].as_u64() > Some(1_600_000_000_000));
        counts.begin_anew();
        let second = line(&counts);
        assert_eq!(second["put_api_requests"]["drive_count"], 0);
        assert_eq!(second["latencies_us"]["pause_vm"], 7);
    }

    #[test]
    fn every_counter_of_a_balloon_is_in_the_line() {
        let counted = vmm::virtio::BalloonCounts::default().take();
        let mut counted: Vec<&str> = counted.iter().map(|&(field, _)| field).collect();
        counted.sort_unstable();
        assert!(FIELDS.contains(&("balloon", &counted)));
    }

    #[test]
    fn every_counter_of_a_request_is_in_the_line() {
        let known = |group: &str, field: &str| {
            FIELDS
                .iter()
                .any(|&(g, fields)| g == group && fields.contains(&field))
        };
        let id: VmId = "a".parse().unwrap();
        for request in [
            Request::DescribeVm(id.clone()),
            Request::DescribeMachine(id.clone()),
            Request::VmVersion(id.clone()),
            Request::ActOnVm(id.clone(), ActionType::InstanceStart),
            Request::SetVmState(id, DesiredState::Paused),
        ] {
            if let Some((group, name)) = counter_of(&request) {
                assert!(known(group, &format!("{name}_count")), "{request:?}");
            }
            if let Some(name) = latency_of(&request) {
                assert!(known("latencies_us", name));
            }
        }
    }
}
