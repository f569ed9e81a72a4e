//! From method, path and body to a [`Request`]: pure, and the only place that knows the paths.

use std::borrow::Cow;

use hyper::Method;
use percent_encoding::percent_decode_str;
use serde::de::DeserializeOwned;
use vmm::VmId;
use vmm::config::{BalloonPatch, ConfigPart, Drive, MachinePatch, NetworkInterface, NetworkPatch};

use crate::domain_name::DomainName;
use crate::fault::Fault;
use crate::request::{
    ActionBody, BalloonBody, BalloonStatisticsBody, MergePatch, Request, StateBody,
};

/// Every route, as (methods, path template). The OpenAPI document and the tests are held to it.
pub const ROUTES: &[(&str, &str)] = &[
    ("GET", "/version"),
    ("GET", "/openapi.json"),
    ("GET", "/vms"),
    ("GET, PUT, DELETE", "/vms/{id}"),
    ("PUT", "/vms/{id}/actions"),
    ("GET, PATCH, PUT", "/vms/{id}/balloon"),
    ("GET, PATCH", "/vms/{id}/balloon/statistics"),
    ("PUT", "/vms/{id}/boot-source"),
    ("PUT", "/vms/{id}/drives/{drive_id}"),
    ("PUT", "/vms/{id}/entropy"),
    ("GET, PATCH, PUT", "/vms/{id}/machine-config"),
    ("PUT", "/vms/{id}/logger"),
    ("PUT", "/vms/{id}/metrics"),
    ("PATCH, PUT", "/vms/{id}/network-interfaces/{iface_id}"),
    ("GET", "/vms/{id}/version"),
    ("PATCH", "/vms/{id}/vm"),
    ("PUT", "/vms/{id}/vsock"),
    ("GET", "/vms/{id}/vm/config"),
    ("GET", "/vms/{id}/config"),
    ("GET", "/vms/{id}/merge"),
    ("GET", "/vms/{id}/console"),
    ("GET", "/merge"),
    ("GET, PATCH", "/merge/{domain}"),
];

/// What Firecracker has behind `/vms/{id}/` and Samepage does not: 400, as Firecracker refuses what
/// it does not support, so that its clients understand it. Also `PATCH` of a drive.
const UNSUPPORTED: &[&str] = &[
    "balloon/hinting/start",
    "balloon/hinting/status",
    "balloon/hinting/stop",
    "cpu-config",
    "hotplug/memory",
    "mmds",
    "mmds/config",
    "pmem/{id}",
    "serial",
    "snapshot/create",
    "snapshot/load",
];

/// Reads a request.
///
/// # Errors
/// 404 for an unknown path, 405 for a known path with another method, 400 for a bad id, a body
/// where none belongs, and a body that is not the JSON this route takes.
pub fn route(method: &Method, path: &str, body: &[u8]) -> Result<Request, Fault> {
    // As in Firecracker, one slash at the end makes no difference. Decoded after it was cut into
    // segments: an encoded slash is part of a name, and no name has one (RFC 3986, 2.2).
    let segments: Result<Vec<_>, _> = path
        .split_terminator('/')
        .map(|segment| percent_decode_str(segment).decode_utf8())
        .collect();
    let segments =
        segments.map_err(|error| Fault::bad_request(format!("{path}: not UTF-8: {error}")))?;
    let call = Call { method, path, body };
    if is_unsupported(&segments) {
        return Err(call.unsupported());
    }
    let (template, names) = template_of(&segments)
        .ok_or_else(|| Fault::not_found(format!("{method} {path}: no such path")))?;
    let name = names.first().copied().unwrap_or_default();
    let last = names.last().copied().unwrap_or_default();
    match template {
        "/version" => call.get(Request::Version),
        "/openapi.json" => call.get(Request::OpenApi),
        "/vms" => call.get(Request::ListVms),
        "/merge" => call.get(Request::ListDomains),
        "/merge/{domain}" => domain_request(&call, name),
        "/vms/{id}/network-interfaces/{iface_id}" => network_request(&call, name, last),
        "/vms/{id}/drives/{drive_id}" => drive_request(&call, name, last),
        _ => vm_request(&call, template, name),
    }
    .and_then(|request| request.ok_or_else(|| refuse_method(&call, template)))
}

/// The route's template, and the texts that stand for its `{id}` and the like, in order.
fn template_of<'a>(segments: &'a [Cow<'_, str>]) -> Option<(&'static str, Vec<&'a str>)> {
    ROUTES
        .iter()
        .find_map(|&(_, template)| Some((template, names_in(template, segments)?)))
}

/// The texts that stand for the names in `template`, if `segments` fit it.
fn names_in<'a>(template: &str, segments: &'a [Cow<'_, str>]) -> Option<Vec<&'a str>> {
    let wanted: Vec<&str> = template.split('/').collect();
    let mut names: Vec<&str> = Vec::new();
    let fits = wanted.len() == segments.len()
        && wanted.iter().zip(segments).all(|(&want, have)| {
            if want.starts_with('{') {
                names.push(have);
                return true;
            }
            want == have
        });
    fits.then_some(names)
}

fn is_unsupported(segments: &[Cow<'_, str>]) -> bool {
    let ["", "vms", _, of_vm @ ..] = &segments.iter().map(AsRef::as_ref).collect::<Vec<_>>()[..]
    else {
        return false;
    };
    let of_vm: Vec<Cow<'_, str>> = of_vm.iter().map(|&segment| segment.into()).collect();
    let mut unsupported = UNSUPPORTED.iter();
    unsupported.any(|template| names_in(template, &of_vm).is_some())
}

fn refuse_method(call: &Call<'_>, template: &str) -> Fault {
    let allow = ROUTES
        .iter()
        .find(|&&(_, known)| known == template)
        .map_or("", |&(methods, _)| methods);
    let Call { method, path, .. } = call;
    Fault::method_not_allowed(
        format!("{method} {path}: method not allowed here, only {allow}"),
        allow,
    )
}

fn domain_request(call: &Call<'_>, name: &str) -> Result<Option<Request>, Fault> {
    let domain: DomainName = name.parse().map_err(Fault::bad_request)?;
    match *call.method {
        Method::GET => call.get(Request::DescribeDomain(domain)),
        Method::PATCH => {
            let patch: MergePatch = call.json()?;
            if patch.pages_to_scan == Some(0) {
                return Err(Fault::bad_request(
                    "pages_to_scan 0: must be at least 1 (use run \"stop\" to rest)",
                ));
            }
            if let Some(Some(ratio)) = patch.overcommit_ratio
                && ratio < 0.0
            {
                return Err(Fault::bad_request(format!(
                    "overcommit_ratio {ratio}: is negative"
                )));
            }
            Ok(Some(Request::PatchDomain(domain, patch)))
        }
        _ => Ok(None),
    }
}

fn vm_id(name: &str) -> Result<VmId, Fault> {
    name.parse()
        .map_err(|error| Fault::bad_request(format!("vm id {name:?}: {error}")))
}

/// Refuses a name in a body that is not the one of the path.
fn same(field: &str, sent: &str, in_path: &str) -> Result<(), Fault> {
    if sent == in_path {
        return Ok(());
    }
    let message = format!("{field} {sent:?}: the path has {in_path:?}");
    Err(Fault::bad_request(message))
}

fn drive_request(call: &Call<'_>, name: &str, drive_id: &str) -> Result<Option<Request>, Fault> {
    let id = vm_id(name)?;
    match *call.method {
        Method::PUT => {
            let drive: Drive = call.json()?;
            same("drive_id", &drive.drive_id, drive_id)?;
            let part = Box::new(ConfigPart::Drive(drive));
            Ok(Some(Request::ConfigureVm(id, part)))
        }
        Method::PATCH => Err(call.unsupported()),
        _ => Ok(None),
    }
}

fn machine_request(call: &Call<'_>, id: VmId) -> Result<Option<Request>, Fault> {
    let part = match *call.method {
        Method::PUT => ConfigPart::Machine(call.json()?),
        Method::PATCH => {
            let patch: MachinePatch = call.json()?;
            if patch == MachinePatch::default() {
                let Call { method, path, .. } = call;
                return Err(Fault::bad_request(format!(
                    "{method} {path}: changes nothing"
                )));
            }
            ConfigPart::MachinePatch(patch)
        }
        _ => return call.get(Request::DescribeMachine(id)),
    };
    Ok(Some(Request::ConfigureVm(id, Box::new(part))))
}

fn balloon_request(call: &Call<'_>, id: VmId) -> Result<Option<Request>, Fault> {
    match *call.method {
        Method::PUT => {
            let part = Box::new(ConfigPart::Balloon(call.json()?));
            Ok(Some(Request::ConfigureVm(id, part)))
        }
        Method::PATCH => {
            let BalloonBody { amount_mib } = call.json()?;
            let patch = BalloonPatch::Amount(amount_mib);
            Ok(Some(Request::PatchBalloon(id, patch)))
        }
        _ => call.get(Request::DescribeBalloon(id)),
    }
}

fn statistics_request(call: &Call<'_>, id: VmId) -> Result<Option<Request>, Fault> {
    if *call.method != Method::PATCH {
        return call.get(Request::BalloonStatistics(id));
    }
    let body: BalloonStatisticsBody = call.json()?;
    let patch = BalloonPatch::Interval(body.stats_polling_interval_s);
    Ok(Some(Request::PatchBalloon(id, patch)))
}

fn network_request(call: &Call<'_>, name: &str, iface_id: &str) -> Result<Option<Request>, Fault> {
    let id = vm_id(name)?;
    let same = |sent: &str| same("iface_id", sent, iface_id);
    match *call.method {
        Method::PUT => {
            let interface: NetworkInterface = call.json()?;
            same(&interface.iface_id)?;
            let part = Box::new(ConfigPart::NetworkInterface(interface));
            Ok(Some(Request::ConfigureVm(id, part)))
        }
        Method::PATCH => {
            let patch: NetworkPatch = call.json()?;
            same(&patch.iface_id)?;
            Ok(Some(Request::LimitNetwork(id, Box::new(patch))))
        }
        _ => Ok(None),
    }
}

fn vm_request(call: &Call<'_>, template: &str, name: &str) -> Result<Option<Request>, Fault> {
    let id = vm_id(name)?;
    match (template, call.method) {
        ("/vms/{id}", &Method::PUT) => {
            let config = Box::new(call.json()?);
            Ok(Some(Request::CreateVm(id, config)))
        }
        ("/vms/{id}", &Method::DELETE) => {
            call.refuse_body()?;
            Ok(Some(Request::DeleteVm(id)))
        }
        ("/vms/{id}/actions", &Method::PUT) => {
            let ActionBody { action_type } = call.json()?;
            Ok(Some(Request::ActOnVm(id, action_type)))
        }
        ("/vms/{id}/boot-source", &Method::PUT) => {
            let part = Box::new(ConfigPart::BootSource(call.json()?));
            Ok(Some(Request::ConfigureVm(id, part)))
        }
        ("/vms/{id}/logger", &Method::PUT) => Ok(Some(Request::SetLogger(id, call.json()?))),
        ("/vms/{id}/metrics", &Method::PUT) => Ok(Some(Request::SetMetrics(id, call.json()?))),
        ("/vms/{id}/machine-config", _) => machine_request(call, id),
        ("/vms/{id}/balloon", _) => balloon_request(call, id),
        ("/vms/{id}/balloon/statistics", _) => statistics_request(call, id),
        ("/vms/{id}/entropy", &Method::PUT) => {
            let part = Box::new(ConfigPart::Entropy(call.json()?));
            Ok(Some(Request::ConfigureVm(id, part)))
        }
        ("/vms/{id}/vsock", &Method::PUT) => {
            let part = Box::new(ConfigPart::Vsock(call.json()?));
            Ok(Some(Request::ConfigureVm(id, part)))
        }
        ("/vms/{id}/vm", &Method::PATCH) => {
            let StateBody { state } = call.json()?;
            Ok(Some(Request::SetVmState(id, state)))
        }
        ("/vms/{id}", _) => call.get(Request::DescribeVm(id)),
        ("/vms/{id}/config" | "/vms/{id}/vm/config", _) => call.get(Request::DescribeVmConfig(id)),
        ("/vms/{id}/version", _) => call.get(Request::VmVersion(id)),
        ("/vms/{id}/merge", _) => call.get(Request::DescribeVmMerge(id)),
        ("/vms/{id}/console", _) => call.get(Request::VmConsole(id)),
        _ => Ok(None),
    }
}

struct Call<'a> {
    method: &'a Method,
    path: &'a str,
    body: &'a [u8],
}

impl Call<'_> {
    /// `request` if the method is GET, `None` if it is another.
    fn get(&self, request: Request) -> Result<Option<Request>, Fault> {
        if *self.method != Method::GET {
            return Ok(None);
        }
        self.refuse_body()?;
        Ok(Some(request))
    }

    fn unsupported(&self) -> Fault {
        let Call { method, path, .. } = self;
        Fault::bad_request(format!("{method} {path}: not supported yet"))
    }

    fn refuse_body(&self) -> Result<(), Fault> {
        if self.body.is_empty() {
            return Ok(());
        }
        let Call { method, path, .. } = self;
        Err(Fault::bad_request(format!(
            "{method} {path}: takes no body"
        )))
    }

    /// The body as JSON, whatever its content type: Firecracker does not look at it either.
    fn json<T: DeserializeOwned>(&self) -> Result<T, Fault> {
        let Call { method, path, body } = self;
        if body.is_empty() {
            return Err(Fault::bad_request(format!(
                "{method} {path}: needs a JSON body"
            )));
        }
        serde_json::from_slice(body).map_err(|error| {
            let what = if error.is_data() {
                "body"
            } else {
                "malformed JSON"
            };
            Fault::bad_request(format!("{method} {path}: {what}: {error}"))
        })
    }
}

#[cfg(test)]
#[path = "route_tests.rs"]
mod tests;
