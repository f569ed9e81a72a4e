use hyper::StatusCode;

use super::*;
use crate::request::{ActionType, DesiredState};

const CONFIG: &str = r#"{"boot-source": {"kernel_image_path": "builtin:pageload"}}"#;
const METHODS: [Method; 7] = [
    Method::GET,
    Method::PUT,
    Method::PATCH,
    Method::POST,
    Method::DELETE,
    Method::HEAD,
    Method::OPTIONS,
];

fn routed(method: &Method, path: &str, body: &str) -> Result<Request, Fault> {
    route(method, path, body.as_bytes())
}

fn fault(method: &Method, path: &str, body: &str) -> Fault {
    routed(method, path, body).expect_err("should be refused")
}

/// A body that fits the route.
fn body_for(method: &Method, template: &str) -> &'static str {
    match (method, template) {
        (&Method::PUT, "/vms/{id}") => CONFIG,
        (&Method::PUT, "/vms/{id}/actions") => r#"{"action_type": "InstanceStart"}"#,
        (&Method::PUT, "/vms/{id}/boot-source") => r#"{"kernel_image_path": "k"}"#,
        (&Method::PUT, "/vms/{id}/drives/{drive_id}") => {
            r#"{"drive_id": "root", "path_on_host": "d", "is_root_device": true}"#
        }
        (&Method::PUT, "/vms/{id}/balloon") => r#"{"amount_mib": 0, "deflate_on_oom": true}"#,
        (&Method::PATCH, "/vms/{id}/balloon") => r#"{"amount_mib": 7}"#,
        (&Method::PATCH, "/vms/{id}/balloon/statistics") => r#"{"stats_polling_interval_s": 1}"#,
        (&Method::PUT, "/vms/{id}/vsock") => r#"{"guest_cid": 3, "uds_path": "v"}"#,
        (&Method::PUT, "/vms/{id}/logger") => r#"{"log_path": "log", "level": "Warn"}"#,
        (&Method::PUT, "/vms/{id}/metrics") => r#"{"metrics_path": "metrics"}"#,
        (&Method::PUT, "/vms/{id}/machine-config") => r#"{"vcpu_count": 1, "mem_size_mib": 9}"#,
        (&Method::PATCH, "/vms/{id}/machine-config") => r#"{"mem_size_mib": 9}"#,
        (&Method::PUT, "/vms/{id}/entropy") => r#"{"rate_limiter": null}"#,
        (&Method::PUT, "/vms/{id}/network-interfaces/{iface_id}") => {
            r#"{"iface_id": "eth0", "host_dev_name": "tap0"}"#
        }
        (&Method::PATCH, "/vms/{id}/network-interfaces/{iface_id}") => r#"{"iface_id": "eth0"}"#,
        (&Method::PATCH, "/vms/{id}/vm") => r#"{"state": "Paused"}"#,
        (&Method::PATCH, "/merge/{domain}") => r#"{"run": "merge"}"#,
        _ => "",
    }
}

#[test]
fn every_route_takes_its_methods_and_no_other() {
    for (methods, template) in ROUTES {
        let path = template.replace("{id}", "a-1").replace("{domain}", "ci");
        let path = path.replace("{iface_id}", "eth0");
        let path = path.replace("{drive_id}", "root");
        for method in METHODS {
            let answer = routed(&method, &path, body_for(&method, template));
            if methods.split(", ").any(|known| known == method.as_str()) {
                answer.unwrap_or_else(|fault| panic!("{method} {path}: {fault:?}"));
            } else {
                let fault = answer.expect_err("method should be refused");
                if fault.message.contains("not supported yet") {
                    continue;
                }
                assert_eq!(
                    fault.status,
                    StatusCode::METHOD_NOT_ALLOWED,
                    "{method} {path}"
                );
                assert_eq!(fault.allow, Some(*methods));
            }
        }
    }
}

#[test]
fn unknown_paths_are_404() {
    for path in [
        "/",
        "",
        "//",
        "/vm",
        "/vms/a/b",
        "/vms/a/vm/x",
        "/merge/a/b",
        "/metrics",
        "x",
    ] {
        let fault = fault(&Method::GET, path, "");
        assert_eq!(fault.status, StatusCode::NOT_FOUND, "{path}");
        assert!(fault.message.contains(path), "{}", fault.message);
    }
}

#[test]
fn slash_at_the_end_makes_no_difference() {
    assert!(matches!(
        routed(&Method::GET, "/vms/", ""),
        Ok(Request::ListVms)
    ));
    assert!(matches!(
        routed(&Method::GET, "/vms/a/", ""),
        Ok(Request::DescribeVm(_))
    ));
}

#[test]
fn bad_names_are_refused_and_named() {
    let too_long = "x".repeat(65);
    for id in ["a.b", "a%2Eb", "a%00", "a b", "ü", "..", &too_long] {
        let fault = fault(&Method::GET, &format!("/vms/{id}"), "");
        assert_eq!(fault.status, StatusCode::BAD_REQUEST, "{id}");
        assert!(fault.message.starts_with("vm id "), "{}", fault.message);
        let fault = self::fault(&Method::GET, &format!("/merge/{id}"), "");
        assert_eq!(fault.status, StatusCode::BAD_REQUEST, "{id}");
    }
    assert_eq!(
        fault(&Method::GET, "/vms//merge", "").status,
        StatusCode::BAD_REQUEST
    );
}

#[test]
fn values_of_the_bodies_arrive() {
    let request = routed(&Method::PUT, "/vms/a", CONFIG).unwrap();
    let Request::CreateVm(id, config) = request else {
        panic!("{request:?}")
    };
    assert_eq!(id.to_string(), "a");
    assert_eq!(config.machine_config.mem_size_mib, 128);

    for (name, action) in [
        ("InstanceStart", ActionType::InstanceStart),
        ("SendCtrlAltDel", ActionType::SendCtrlAltDel),
        ("InstanceStop", ActionType::InstanceStop),
        ("FlushMetrics", ActionType::FlushMetrics),
        ("MergeNow", ActionType::MergeNow),
    ] {
        let body = format!(r#"{{"action_type": "{name}"}}"#);
        let request = routed(&Method::PUT, "/vms/a/actions", &body).unwrap();
        assert!(
            matches!(request, Request::ActOnVm(_, a) if a == action),
            "{request:?}"
        );
    }
    let request = routed(&Method::PATCH, "/vms/a/vm", r#"{"state": "Resumed"}"#).unwrap();
    assert!(matches!(
        request,
        Request::SetVmState(_, DesiredState::Resumed)
    ));

    let body = r#"{"run": "unmerge", "pages_to_scan": 7, "sleep_millisecs": 0}"#;
    let request = routed(&Method::PATCH, "/merge/vm:a", body).unwrap();
    let Request::PatchDomain(domain, patch) = request else {
        panic!("{request:?}")
    };
    assert_eq!(domain.to_string(), "vm:a");
    let expected = MergePatch {
        run: Some(dedup::Run::Unmerge),
        pages_to_scan: Some(7),
        sleep_millisecs: Some(0),
        ..MergePatch::default()
    };
    assert_eq!(patch, expected);
}

#[test]
fn a_budget_that_is_null_is_told_from_one_that_is_absent() {
    let patch = |body: &str| match routed(&Method::PATCH, "/merge/ci", body).unwrap() {
        Request::PatchDomain(_, patch) => (patch.memory_budget, patch.overcommit_ratio),
        other => panic!("{other:?}"),
    };
    assert_eq!(patch("{}"), (None, None));
    let none = patch(r#"{"memory_budget": null, "overcommit_ratio": null}"#);
    assert_eq!(none, (Some(None), Some(None)));
    let some = patch(r#"{"memory_budget": 1048576, "overcommit_ratio": 2.5}"#);
    assert_eq!(some, (Some(Some(1 << 20)), Some(Some(2.5))));
    for body in [
        r#"{"memory_budget": -1}"#,
        r#"{"memory_budget": 1.5}"#,
        r#"{"overcommit_ratio": -0.5}"#,
        r#"{"overcommit_ratio": "2"}"#,
    ] {
        assert_eq!(
            fault(&Method::PATCH, "/merge/ci", body).status,
            StatusCode::BAD_REQUEST,
            "{body}"
        );
    }
}

#[test]
fn malformed_json_is_400() {
    for body in ["{", "nonsense", "{}x", "\u{0}", "{\"action_type\":"] {
        let fault = fault(&Method::PUT, "/vms/a/actions", body);
        assert_eq!(fault.status, StatusCode::BAD_REQUEST, "{body}");
    }
    let fault = fault(&Method::PUT, "/vms/a", "");
    assert_eq!(fault.message, "PUT /vms/a: needs a JSON body");
}

#[test]
fn unknown_fields_and_values_are_400_and_named() {
    let cases = [
        (
            Method::PUT,
            "/vms/a",
            r#"{"boot-source": {"kernel_image_path": "k"}, "colour": 1}"#,
        ),
        (
            Method::PUT,
            "/vms/a",
            r#"{"boot-source": {"kernel_image_path": "k", "colour": 1}}"#,
        ),
        (
            Method::PUT,
            "/vms/a/actions",
            r#"{"action_type": "InstanceStart", "colour": 1}"#,
        ),
        (
            Method::PUT,
            "/vms/a/actions",
            r#"{"action_type": "colour"}"#,
        ),
        (Method::PATCH, "/vms/a/vm", r#"{"state": "colour"}"#),
        (
            Method::PATCH,
            "/vms/a/balloon",
            r#"{"amount_mib": 1, "colour": 1}"#,
        ),
        (Method::PATCH, "/merge/ci", r#"{"run": "colour"}"#),
        (Method::PATCH, "/merge/ci", r#"{"colour": 1}"#),
    ];
    for (method, path, body) in cases {
        let fault = fault(&method, path, body);
        assert_eq!(fault.status, StatusCode::BAD_REQUEST, "{body}");
        assert!(fault.message.contains("colour"), "{}", fault.message);
    }
}

#[test]
fn body_where_none_belongs_is_400() {
    assert_eq!(
        fault(&Method::GET, "/vms", "{}").message,
        "GET /vms: takes no body"
    );
    let fault = fault(&Method::DELETE, "/vms/a", "{}");
    assert_eq!(fault.status, StatusCode::BAD_REQUEST);
}

#[test]
fn openapi_document_has_every_route_and_no_other() {
    let document: serde_json::Value = serde_json::from_str(crate::OPENAPI_JSON).unwrap();
    let paths = document["paths"].as_object().unwrap();
    let mut documented: Vec<(String, String)> = Vec::new();
    for (template, operations) in paths {
        let mut methods: Vec<String> = operations
            .as_object()
            .unwrap()
            .keys()
            .filter(|key| *key != "parameters")
            .map(|key| key.to_uppercase())
            .collect();
        methods.sort();
        documented.push((template.clone(), methods.join(", ")));
    }
    let mut expected: Vec<(String, String)> = ROUTES
        .iter()
        .map(|(methods, template)| {
            let mut methods: Vec<&str> = methods.split(", ").collect();
            methods.sort_unstable();
            ((*template).to_owned(), methods.join(", "))
        })
        .collect();
    documented.sort();
    expected.sort();
    assert_eq!(documented, expected);
}

#[test]
fn names_are_decoded_before_they_are_judged() {
    let request = routed(&Method::GET, "/merge/vm%3Aone", "").unwrap();
    assert!(
        matches!(&request, Request::DescribeDomain(DomainName::Private(id)) if id.as_str() == "one"),
        "{request:?}"
    );
    let request = routed(&Method::GET, "/%76ms/a%2D1", "").unwrap();
    assert!(
        matches!(&request, Request::DescribeVm(id) if id.as_str() == "a-1"),
        "{request:?}"
    );
    // A slash that is part of a name makes no new segment.
    let refused = fault(&Method::GET, "/vms/a%2Fmerge", "");
    assert_eq!(refused.status, StatusCode::BAD_REQUEST);
    assert!(refused.message.contains("a/merge"), "{refused:?}");
    let refused = fault(&Method::GET, "/vms/%ff", "");
    assert_eq!(refused.status, StatusCode::BAD_REQUEST);
}

#[test]
fn an_interface_has_the_same_name_in_path_and_body() {
    let body = r#"{"iface_id": "eth0", "host_dev_name": "tap0"}"#;
    let path = "/vms/a/network-interfaces";
    let taken = routed(&Method::PUT, &format!("{path}/eth0"), body);
    assert!(matches!(taken, Ok(Request::ConfigureVm(..))));
    let fault = fault(&Method::PUT, &format!("{path}/eth1"), body);
    assert_eq!(fault.message, r#"iface_id "eth0": the path has "eth1""#);
}

#[test]
fn a_drive_has_the_same_name_in_path_and_body() {
    let body = r#"{"drive_id": "a", "path_on_host": "d", "is_root_device": false}"#;
    let fault = fault(&Method::PUT, "/vms/a/drives/b", body);
    assert_eq!(fault.message, r#"drive_id "a": the path has "b""#);
}

#[test]
fn what_firecracker_has_and_samepage_does_not_is_400() {
    for (method, path) in [
        (Method::PUT, "serial"),
        (Method::GET, "balloon/hinting/status"),
        (Method::PATCH, "balloon/hinting/start"),
        (Method::PUT, "pmem/p0"),
        (Method::PUT, "mmds/config"),
        (Method::PUT, "snapshot/load"),
        (Method::PATCH, "drives/root"),
        (Method::PATCH, "hotplug/memory"),
    ] {
        let path = format!("/vms/a/{path}");
        let fault = fault(&method, &path, "{}");
        assert_eq!(fault.status, StatusCode::BAD_REQUEST, "{path}");
        assert_eq!(fault.message, format!("{method} {path}: not supported yet"));
    }
}

#[test]
fn what_is_patched_of_a_balloon_is_told_by_the_path() {
    let patched = |path: &str, body: &str| {
        let path = format!("/vms/a/balloon{path}");
        match routed(&Method::PATCH, &path, body) {
            Ok(Request::PatchBalloon(_, patch)) => Some(patch),
            _ => None,
        }
    };
    let (amount, interval) = (r#"{"amount_mib": 9}"#, r#"{"stats_polling_interval_s": 9}"#);
    assert_eq!(patched("", amount), Some(BalloonPatch::Amount(9)));
    assert_eq!(
        patched("/statistics", interval),
        Some(BalloonPatch::Interval(9))
    );
    assert_eq!(patched("", interval), None);
    assert_eq!(patched("/statistics", amount), None);
    assert_eq!(patched("", r#"{"amount_mib": -1}"#), None);
    assert_eq!(
        patched("/statistics", r#"{"stats_polling_interval_s": 65536}"#),
        None
    );
}

#[test]
fn a_machine_patch_that_changes_nothing_is_refused() {
    let fault = fault(&Method::PATCH, "/vms/a/machine-config", "{}");
    assert_eq!(fault.status, StatusCode::BAD_REQUEST);
    assert!(
        fault.message.ends_with("changes nothing"),
        "{}",
        fault.message
    );
}
