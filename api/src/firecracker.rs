//! Requests and replies of a VM's own socket, exactly as Firecracker has them.
//!
//! Clients check them strictly: a field that Firecracker does not have, or another status than its
//! own, is an error to some. So what Samepage adds under `/vms/{id}` is taken off again here.

use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::header::ALLOW;
use hyper::{Method, Response, StatusCode};
use serde_json::Value;
use vmm::VmId;

use crate::fault::Fault;
use crate::reply::Reply;
use crate::request::Request;

/// Fields of Firecracker's `InstanceInfo`.
const INSTANCE_FIELDS: [&str; 4] = ["app_name", "id", "state", "vmm_version"];

/// The path under `/vms/{id}` of a path on the VM's own socket.
///
/// # Errors
/// 400 for what makes or removes VMs, which Firecracker has no requests for.
pub fn path_of(id: &VmId, method: &Method, path: &str) -> Result<String, Fault> {
    let path = path.trim_end_matches('/');
    if path.is_empty() && method != Method::GET {
        return Err(Fault::bad_request(format!(
            "Invalid request method and/or path: {method} /."
        )));
    }
    Ok(format!("/vms/{id}{path}"))
}

/// The reply to what was `asked` for, as Firecracker gives it.
///
/// # Errors
/// 400 for a description of a VM that has ended: Firecracker is gone then, and has no word for it.
pub async fn adapt(
    asked: Asked,
    response: Response<Full<Bytes>>,
) -> Result<Response<Full<Bytes>>, Fault> {
    if response.status() != StatusCode::OK || asked == Asked::Other {
        return Ok(response);
    }
    // A body of one piece has no error.
    let body = match response.into_body().collect().await {
        Ok(body) => body.to_bytes(),
        Err(never) => match never {},
    };
    let mut json: Value = serde_json::from_slice(&body)
        .map_err(|error| Fault::internal(format!("a reply is no JSON: {error}")))?;
    match asked {
        Asked::Description => only_instance(&mut json)?,
        Asked::Config => without_ours(&mut json),
        Asked::Version => retain(&mut json, &["firecracker_version"]),
        Asked::Other => {}
    }
    Ok(Reply::json(&json)?.into_response())
}

/// What of Firecracker's was asked for, as far as its reply differs from ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// `GET /`
    Description,
    /// `GET /vm/config`
    Config,
    /// `GET /version`
    Version,
    /// Anything else.
    Other,
}

impl Asked {
    /// What `request` asks for.
    pub fn of(request: &Request) -> Asked {
        match request {
            Request::DescribeVm(_) => Asked::Description,
            Request::DescribeVmConfig(_) => Asked::Config,
            Request::VmVersion(_) => Asked::Version,
            _ => Asked::Other,
        }
    }
}

/// Firecracker says 400 where Samepage tells kinds of refusals apart.
pub fn refuse_alike(mut response: Response<Full<Bytes>>) -> Response<Full<Bytes>> {
    let ours = [
        StatusCode::NOT_FOUND,
        StatusCode::METHOD_NOT_ALLOWED,
        StatusCode::CONFLICT,
    ];
    if ours.contains(&response.status()) {
        *response.status_mut() = StatusCode::BAD_REQUEST;
        response.headers_mut().remove(ALLOW);
    }
    response
}

fn only_instance(description: &mut Value) -> Result<(), Fault> {
    if !matches!(
        description["state"].as_str(),
        Some("Not started" | "Running" | "Paused")
    ) {
        let text = |field: &str| description[field].as_str().unwrap_or_default().to_owned();
        let (id, state, why) = (text("id"), text("state"), text("end_message"));
        return Err(Fault::bad_request(format!("vm {id}: {state}: {why}")));
    }
    retain(description, &INSTANCE_FIELDS);
    Ok(())
}

fn retain(json: &mut Value, fields: &[&str]) {
    if let Some(object) = json.as_object_mut() {
        object.retain(|field, _| fields.contains(&field.as_str()));
    }
}

/// Takes the key `samepage` off a configuration and its drives.
fn without_ours(config: &mut Value) {
    let Some(config) = config.as_object_mut() else {
        return;
    };
    config.remove("samepage");
    let drives = config.get_mut("drives").and_then(Value::as_array_mut);
    for drive in drives.into_iter().flatten() {
        if let Some(drive) = drive.as_object_mut() {
            drive.remove("samepage");
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    async fn adapted(asked: Asked, reply: Value) -> Result<Value, Fault> {
        let response = Reply::json(&reply).unwrap().into_response();
        let response = adapt(asked, response).await?;
        let body = response.into_body().collect().await.unwrap().to_bytes();
        Ok(serde_json::from_slice(&body).unwrap())
    }

    #[tokio::test]
    async fn replies_have_firecrackers_fields_alone() {
        let described = json!({
            "app_name": "Samepage", "id": "a", "state": "Paused", "vmm_version": "1", "merge": true,
        });
        let expected =
            json!({"app_name": "Samepage", "id": "a", "state": "Paused", "vmm_version": "1"});
        assert_eq!(adapted(Asked::Description, described).await, Ok(expected));
        let config = json!({"samepage": {}, "drives": [{"drive_id": "a", "samepage": {}}]});
        let expected = json!({"drives": [{"drive_id": "a"}]});
        assert_eq!(adapted(Asked::Config, config).await, Ok(expected));
        let version = json!({"firecracker_version": "1", "lock_down_missing": []});
        let expected = json!({"firecracker_version": "1"});
        assert_eq!(adapted(Asked::Version, version).await, Ok(expected));
    }

    #[tokio::test]
    async fn a_vm_that_has_ended_is_described_by_a_fault() {
        let described = json!({"id": "a", "state": "Ended", "end_message": "the guest shut down"});
        let fault = adapted(Asked::Description, described).await.unwrap_err();
        assert_eq!(fault.status, StatusCode::BAD_REQUEST);
        assert_eq!(fault.message, "vm a: Ended: the guest shut down");
    }

    #[test]
    fn refusals_are_400() {
        for fault in [
            Fault::not_found("x"),
            Fault::conflict("x"),
            Fault::method_not_allowed("x", "GET"),
        ] {
            let response = refuse_alike(fault.into_response());
            assert_eq!(response.status(), StatusCode::BAD_REQUEST);
            assert!(!response.headers().contains_key(ALLOW));
        }
    }

    #[test]
    fn a_vm_cannot_be_removed_through_its_own_socket() {
        let id = "a".parse().unwrap();
        for method in [Method::DELETE, Method::PUT] {
            path_of(&id, &method, "/").unwrap_err();
        }
        assert_eq!(path_of(&id, &Method::GET, "/"), Ok("/vms/a".to_owned()));
        let path = path_of(&id, &Method::PUT, "/actions");
        assert_eq!(path, Ok("/vms/a/actions".to_owned()));
    }
}
