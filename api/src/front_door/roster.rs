//! Which VM is in which merge domain of this process.

use std::collections::BTreeMap;
use std::sync::Arc;

use hyper::StatusCode;
use vmm::{Monitor, VmId};

use crate::domain_name::DomainName;
use crate::fault::Fault;

#[derive(Debug, Default)]
pub(super) struct Roster {
    pub(super) domains: BTreeMap<DomainName, Residence>,
    pub(super) vms: BTreeMap<VmId, DomainName>,
    pub(super) is_closed: bool,
}

#[derive(Debug)]
pub(super) struct Residence {
    pub(super) monitor: Arc<Monitor>,
    /// Stays when its last VM goes.
    pub(super) is_declared: bool,
}

impl Roster {
    /// Puts `id` on the roster and gives the monitor that is to create it.
    pub(super) fn admit(
        &mut self,
        id: &VmId,
        name: &DomainName,
        settings: &dedup::Settings,
    ) -> Result<Arc<Monitor>, Fault> {
        if self.vms.contains_key(id) {
            return Err(Fault::conflict(format!("vm {id}: already exists")));
        }
        let monitor = self.open(name, settings)?;
        self.vms.insert(id.clone(), name.clone());
        Ok(monitor)
    }

    /// Takes `id` off the roster; gives its domain's monitor if that is now of no use.
    pub(super) fn dismiss(&mut self, id: &VmId) -> Option<Arc<Monitor>> {
        let name = self.vms.remove(id)?;
        let is_used = self.vms.values().any(|used| *used == name)
            || self
                .domains
                .get(&name)
                .is_none_or(|residence| residence.is_declared);
        if is_used {
            return None;
        }
        self.domains
            .remove(&name)
            .map(|residence| residence.monitor)
    }

    /// The domain's monitor, made now if there is none.
    pub(super) fn open(
        &mut self,
        name: &DomainName,
        settings: &dedup::Settings,
    ) -> Result<Arc<Monitor>, Fault> {
        if self.is_closed {
            return Err(Fault {
                status: StatusCode::SERVICE_UNAVAILABLE,
                ..Fault::internal("the server is stopping")
            });
        }
        if let Some(residence) = self.domains.get(name) {
            return Ok(Arc::clone(&residence.monitor));
        }
        let label = name.to_label().map_err(Fault::internal)?;
        let monitor = Monitor::new(label, settings.clone())
            .map_err(|error| Fault::internal(format!("merge domain {name}: {error}")))?;
        let monitor = Arc::new(monitor);
        let residence = Residence {
            monitor: Arc::clone(&monitor),
            is_declared: false,
        };
        self.domains.insert(name.clone(), residence);
        Ok(monitor)
    }
}
