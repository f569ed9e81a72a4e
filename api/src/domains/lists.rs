//! Lists that all monitors have a part of. One that does not answer is named, and holds up nobody.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::BodyExt;
use hyper::StatusCode;
use serde_json::Value;
use tokio::task::JoinSet;

use super::gateway::{Gateway, ask};
use super::proxy::Received;
use super::roster::Entry;
use crate::domain_name::DomainName;
use crate::fault::FaultBody;
use crate::model::{DomainReply, VmDescription};

/// How long a monitor has for its part of a list.
const LIST_TIME: Duration = Duration::from_secs(1);

/// How many VMs that nobody knew are taken on for a list.
const TAKEN_ON_MAX: usize = 64;

/// What a monitor said, or why it said nothing.
type Part = Result<Vec<u8>, String>;

impl Gateway {
    /// All VMs. Those of a silent monitor are as the front door knows them.
    pub(super) async fn list_vms(self: &Arc<Self>) -> Vec<VmDescription> {
        let parts = self.ask_all("/vms").await;
        let told: BTreeMap<DomainName, Vec<VmDescription>> = parts
            .into_iter()
            .filter_map(|(name, part)| Some((name, vms_in(&part.ok()?).ok()?)))
            .collect();
        let mut unknown = Vec::new();
        let vms = self.roster().list(told, &mut unknown);
        let gateway = Arc::clone(self);
        tokio::spawn(async move {
            for (entry, id) in unknown.into_iter().take(TAKEN_ON_MAX) {
                gateway.take_on(&entry, &id).await;
            }
        });
        vms
    }

    /// All domains by name. Of a silent one there is a `fault_message` alone.
    pub(super) async fn list_domains(&self) -> BTreeMap<String, Value> {
        // Asked for as a list of one: for that a monitor keeps a place, also when all its others are
        // taken by requests that hang.
        let parts = self.ask_all("/merge").await;
        let value = |name: &str, part: Part| {
            let own = part.and_then(|body| {
                let listed: Result<BTreeMap<String, Value>, _> = serde_json::from_slice(&body);
                let own = listed.map_err(|error| error.to_string())?.remove(name);
                own.ok_or_else(|| format!("merge domain {name}: its monitor does not know it"))
            });
            own.unwrap_or_else(|fault_message| {
                let silent = DomainReply::Silent(FaultBody { fault_message });
                // A map of one string cannot fail to serialize.
                serde_json::to_value(silent).unwrap_or_default()
            })
        };
        let named = parts.into_iter().map(|(name, part)| {
            let name = name.to_string();
            let told = value(&name, part);
            (name, told)
        });
        named.collect()
    }

    async fn ask_all(&self, path: &str) -> BTreeMap<DomainName, Part> {
        let entries: Vec<Arc<Entry>> = self.roster().domains.values().cloned().collect();
        let mut asking = JoinSet::new();
        for entry in entries {
            let received = Received::get(path);
            asking.spawn(async move { (entry.name.clone(), part_of(&entry, &received).await) });
        }
        let mut parts = BTreeMap::new();
        while let Some(asked) = asking.join_next().await {
            // A part whose task panicked is left out; the log has the panic.
            parts.extend(asked.ok());
        }
        parts
    }
}

/// What a domain's monitor says to `received`, within the time of a list.
pub(super) async fn part_of(entry: &Entry, received: &Received) -> Part {
    match tokio::time::timeout(LIST_TIME, ask(entry, received)).await {
        Ok(Ok(reply)) if reply.status() == StatusCode::OK => {
            let body = reply.into_body().collect().await;
            // The body is there already, so it cannot fail to come.
            Ok(body
                .map(|body| body.to_bytes().to_vec())
                .unwrap_or_default())
        }
        Ok(Ok(reply)) => Err(format!(
            "merge domain {}: its monitor says {}",
            entry.name,
            reply.status()
        )),
        Ok(Err(fault)) => Err(fault.message),
        Err(_) => Err(format!(
            "merge domain {}: its monitor did not answer within {LIST_TIME:?}",
            entry.name
        )),
    }
}

/// The VMs of a reply to `GET /vms`.
pub(super) fn vms_in(body: &[u8]) -> Result<Vec<VmDescription>, String> {
    serde_json::from_slice(body).map_err(|error| format!("a monitor's list of vms: {error}"))
}
