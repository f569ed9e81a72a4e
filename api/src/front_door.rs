//! Which monitor serves which VM, and what each request does there.
//!
//! One [`Monitor`] per merge domain. A VM whose config names none gets a monitor to itself, so
//! there is nobody it could share a page with. A monitor lives as long as its VMs, or as the
//! server if its domain was declared at the server's start.
//!
//! # Locks
//! `roster` is held to look up and to change who belongs where, never while a monitor works
//! (starting, stopping and unmerging take long). A VM is on the roster before its monitor
//! knows it and until after the monitor forgot it: an id is taken from the first moment, and in
//! between the monitor itself answers that it does not know the VM.
//!
//! `patching` is held while one field of an engine's pace is changed and the others are kept, so
//! that two patches at once are both done; never while anything waits. No other lock of ours is
//! taken under it.

mod roster;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::OwnedSemaphorePermit;
use vmm::config::{ConfigPart, VmConfig};
use vmm::{Console, MergeDomain, Monitor, MonitorError, VmId};

use crate::console_tails::ConsoleTails;
use crate::domain_name::DomainName;
use crate::fault::{Fault, conflict_or, refusal};
use crate::merge_report;
use crate::model::{Domain, Version, VmDescription};
use crate::places::Places;
use crate::reply::Reply;
use crate::request::{ActionType, DesiredState, MergePatch, Request};
use crate::telemetry::{Noted, Telemetry};
use roster::{Residence, Roster};

/// All VMs and merge domains of one server.
#[derive(Debug)]
pub struct FrontDoor {
    roster: Mutex<Roster>,
    patching: Mutex<()>,
    places: Places,
    telemetry: Telemetry,
    settings: dedup::Settings,
    /// The one domain that it serves; `None` for any.
    only: Option<DomainName>,
    /// Where the ends of what consoles show are kept, if they are.
    tails: Option<ConsoleTails>,
}

impl FrontDoor {
    /// An empty house whose domains' engines start with `settings`.
    pub fn new(settings: dedup::Settings) -> FrontDoor {
        FrontDoor {
            roster: Mutex::default(),
            patching: Mutex::default(),
            places: Places::default(),
            telemetry: Telemetry::default(),
            settings,
            only: None,
            tails: None,
        }
    }

    /// One that serves `domain` and no other, and keeps it while it has no VMs.
    ///
    /// # Errors
    /// 500 if its monitor cannot be made.
    pub fn of_one_domain(
        domain: DomainName,
        settings: dedup::Settings,
        tails: Option<ConsoleTails>,
    ) -> Result<FrontDoor, Fault> {
        let mut door = FrontDoor::new(settings);
        door.keep_open(&domain)?;
        door.only = Some(domain);
        door.tails = tails;
        Ok(door)
    }

    /// Opens a merge domain that stays even without VMs.
    ///
    /// # Errors
    /// 500 if its monitor cannot be made.
    pub fn declare(&self, domain: MergeDomain) -> Result<(), Fault> {
        self.keep_open(&DomainName::Named(domain))
    }

    fn keep_open(&self, name: &DomainName) -> Result<(), Fault> {
        let mut roster = self.roster();
        roster.open(name, &self.settings)?;
        if let Some(residence) = roster.domains.get_mut(name) {
            residence.is_declared = true;
        }
        Ok(())
    }

    /// A place among the requests of its domain, to be kept until `request` is done.
    ///
    /// # Errors
    /// 503 if too many are in hand.
    pub async fn place_for(&self, request: &Request) -> Result<OwnedSemaphorePermit, Fault> {
        self.places.take(self.domain_of(request)).await
    }

    /// The domain whose monitor carries `request` out; `None` for those of the whole server.
    fn domain_of(&self, request: &Request) -> Option<DomainName> {
        match request {
            Request::CreateVm(id, config) => Some(DomainName::of_vm(id, config)),
            Request::DescribeDomain(name) | Request::PatchDomain(name, _) => Some(name.clone()),
            _ => self.roster().vms.get(request.vm()?).cloned(),
        }
    }

    /// Does what `request` asks for. May take long: not for an async thread.
    ///
    /// # Errors
    /// What the client did wrong, or 500.
    pub fn handle(&self, request: Request) -> Result<Reply, Fault> {
        let noted = Noted::of(&request);
        let reply = self.carry_out(request);
        if let Some((id, noted)) = noted {
            let refused = reply.as_ref().err().map(|fault| fault.message.as_str());
            self.telemetry.note(&id, &noted, refused);
        }
        reply
    }

    fn carry_out(&self, request: Request) -> Result<Reply, Fault> {
        match request {
            Request::Version | Request::VmVersion(_) => Reply::json(&Version::current()),
            Request::OpenApi => Ok(Reply::Json(crate::OPENAPI_JSON.into())),
            Request::ListVms => Reply::json(&self.list_vms()),
            Request::CreateVm(id, config) => self.create(&id, *config),
            Request::DescribeVm(id) => self.describe_vm(&id),
            Request::DeleteVm(id) => self.delete(&id),
            Request::ActOnVm(id, action) => self.act(&id, action),
            Request::ConfigureVm(id, part) => {
                let monitor = self.monitor_of(&id)?;
                self.refuse_vsock(matches!(*part, ConfigPart::Vsock(_)))?;
                monitor.configure(&id, &part).map_err(|e| refusal(&e))?;
                Ok(Reply::Empty)
            }
            Request::LimitNetwork(id, patch) => {
                let limited = self.monitor_of(&id)?.limit_network(&id, &patch);
                limited.map_err(|e| refusal(&e))?;
                Ok(Reply::Empty)
            }
            Request::DescribeBalloon(id) => {
                let monitor = self.monitor_of(&id)?;
                Reply::json(&monitor.balloon(&id).map_err(|e| refusal(&e))?)
            }
            Request::PatchBalloon(id, patch) => {
                let patched = self.monitor_of(&id)?.patch_balloon(&id, patch);
                patched.map_err(|e| refusal(&e))?;
                Ok(Reply::Empty)
            }
            Request::BalloonStatistics(id) => {
                let monitor = self.monitor_of(&id)?;
                Reply::json(&monitor.balloon_statistics(&id).map_err(|e| refusal(&e))?)
            }
            Request::SetVmState(id, state) => self.set_state(&id, state),
            Request::DescribeVmConfig(id) => {
                let monitor = self.monitor_of(&id)?;
                Reply::json(&monitor.config(&id).map_err(|e| refusal(&e))?)
            }
            Request::DescribeMachine(id) => {
                let config = self.monitor_of(&id)?.config(&id).map_err(|e| refusal(&e))?;
                Reply::json(&config.machine_config)
            }
            Request::SetLogger(id, config) => {
                self.telemetry.set_logger(&id, config)?;
                Ok(Reply::Empty)
            }
            Request::SetMetrics(id, config) => {
                self.telemetry.set_metrics(&id, &config)?;
                Ok(Reply::Empty)
            }
            Request::DescribeVmMerge(id) => {
                let monitor = self.monitor_of(&id)?;
                Reply::json(&merge_report::vm(&monitor, &id).map_err(|e| refusal(&e))?)
            }
            Request::VmConsole(id) => Ok(Reply::Text(self.console(&id)?.history())),
            Request::ListDomains => Reply::json(&self.list_domains()),
            Request::DescribeDomain(name) => {
                Reply::json(&merge_report::domain(&*self.monitor_for(&name)?))
            }
            Request::PatchDomain(name, patch) => self.patch_domain(&name, &patch),
        }
    }

    /// The console of a VM, for its history or as a stream.
    ///
    /// # Errors
    /// 404 if there is no such VM.
    pub fn console(&self, id: &VmId) -> Result<Console, Fault> {
        self.monitor_of(id)?.console(id).map_err(|e| refusal(&e))
    }

    /// The VMs there are.
    pub fn vm_ids(&self) -> BTreeSet<VmId> {
        self.roster().vms.keys().cloned().collect()
    }

    /// Refuses new VMs, ends all there are, and closes every domain.
    pub fn close(&self) {
        let domains = {
            let mut roster = self.roster();
            roster.is_closed = true;
            roster.vms.clear();
            std::mem::take(&mut roster.domains)
        };
        for (name, Residence { monitor, .. }) in domains {
            for info in monitor.list() {
                if info.state.is_alive()
                    && let Err(error) = monitor.stop(&info.id)
                {
                    log::warn!("vm {} in domain {name}: cannot stop: {error}", info.id);
                }
            }
        }
    }

    fn roster(&self) -> MutexGuard<'_, Roster> {
        // Its maps are changed by single inserts and removes: whole after any panic.
        self.roster.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn monitor_of(&self, id: &VmId) -> Result<Arc<Monitor>, Fault> {
        let roster = self.roster();
        let residence = roster.vms.get(id).and_then(|name| roster.domains.get(name));
        residence
            .map(|residence| Arc::clone(&residence.monitor))
            .ok_or_else(|| Fault::not_found(format!("vm {id}: no such vm")))
    }

    fn monitor_for(&self, name: &DomainName) -> Result<Arc<Monitor>, Fault> {
        let roster = self.roster();
        roster
            .domains
            .get(name)
            .map(|residence| Arc::clone(&residence.monitor))
            .ok_or_else(|| Fault::not_found(format!("merge domain {name}: no such domain")))
    }

    fn monitors(&self) -> Vec<(DomainName, Arc<Monitor>)> {
        let roster = self.roster();
        let domains = roster.domains.iter();
        domains
            .map(|(name, residence)| (name.clone(), Arc::clone(&residence.monitor)))
            .collect()
    }

    fn create(&self, id: &VmId, config: VmConfig) -> Result<Reply, Fault> {
        // Before a monitor is made for it, which takes threads, descriptors and mappings.
        let refused = |error| Fault::bad_request(format!("vm {id}: {error}"));
        config.validate().map_err(refused)?;
        let name = DomainName::of_vm(id, &config);
        if let Some(only) = self.only.as_ref().filter(|only| **only != name) {
            let message = format!("vm {id}: merge domain {name}: this monitor serves only {only}");
            return Err(Fault::bad_request(message));
        }
        self.refuse_vsock(config.vsock.is_some())?;
        let monitor = self.roster().admit(id, &name, &self.settings)?;
        if let Err(error) = monitor.create(id.clone(), config) {
            let emptied = self.roster().dismiss(id);
            drop(emptied);
            return Err(conflict_or(&error));
        }
        let balloon = monitor.balloon_counts(id).map_err(|e| refusal(&e))?;
        let vsock = monitor.vsock_counts(id).map_err(|e| refusal(&e))?;
        self.telemetry.admit(id, balloon, vsock);
        if let (Some(tails), Ok(console)) = (&self.tails, monitor.console(id)) {
            tails.keep(id, &console);
        }
        Ok(Reply::Empty)
    }

    /// A monitor of one domain is locked down: it can make no socket.
    fn refuse_vsock(&self, is_asked_for: bool) -> Result<(), Fault> {
        if is_asked_for && self.only.is_some() {
            return Err(Fault::bad_request("vsock: not supported with --state-dir"));
        }
        Ok(())
    }

    fn delete(&self, id: &VmId) -> Result<Reply, Fault> {
        let monitor = self.monitor_of(id)?;
        monitor.delete(id).map_err(|e| conflict_or(&e))?;
        self.telemetry.dismiss(id);
        let emptied = self.roster().dismiss(id);
        // A monitor's end joins its threads: after the roster's lock.
        drop((emptied, monitor));
        Ok(Reply::Empty)
    }

    fn list_vms(&self) -> Vec<VmDescription> {
        let mut vms: Vec<VmDescription> = self
            .monitors()
            .iter()
            .flat_map(|(_, monitor)| monitor.list())
            .map(|info| VmDescription::from(&info))
            .collect();
        vms.sort_by(|a, b| a.id.cmp(&b.id));
        vms
    }

    fn describe_vm(&self, id: &VmId) -> Result<Reply, Fault> {
        let info = self.monitor_of(id)?.info(id).map_err(|e| refusal(&e))?;
        Reply::json(&VmDescription::from(&info))
    }

    fn act(&self, id: &VmId, action: ActionType) -> Result<Reply, Fault> {
        let monitor = self.monitor_of(id)?;
        if action == ActionType::FlushMetrics {
            self.telemetry.flush(id)?;
        }
        if action == ActionType::MergeNow {
            return Reply::json(&monitor.merge_now(id).map_err(|e| refusal(&e))?);
        }
        match action {
            ActionType::InstanceStart => monitor.start(id),
            ActionType::SendCtrlAltDel => monitor.send_ctrl_alt_del(id),
            ActionType::InstanceStop => monitor.stop(id),
            ActionType::FlushMetrics | ActionType::MergeNow => Ok(()),
        }
        .map_err(|e| refusal(&e))?;
        Ok(Reply::Empty)
    }

    fn set_state(&self, id: &VmId, state: DesiredState) -> Result<Reply, Fault> {
        let monitor = self.monitor_of(id)?;
        match state {
            DesiredState::Paused => monitor.pause(id),
            DesiredState::Resumed => monitor.resume(id),
        }
        .map_err(|e| refusal(&e))?;
        Ok(Reply::Empty)
    }

    fn list_domains(&self) -> BTreeMap<String, Domain> {
        let monitors = self.monitors();
        merge_report::domains(monitors.iter().map(|(name, monitor)| (name, &**monitor)))
    }

    fn patch_domain(&self, name: &DomainName, patch: &MergePatch) -> Result<Reply, Fault> {
        let monitor = self.monitor_for(name)?;
        let engine = monitor.engine();
        let refused = |error: MonitorError| {
            let fault = conflict_or(&error);
            let message = format!("merge domain {name}: {}", fault.message);
            Fault { message, ..fault }
        };
        // All that can be refused is checked before anything is changed, an unmerge apart.
        patch.pace(engine.pace()).map_err(Fault::bad_request)?;
        if let Some(bytes) = patch.memory_budget {
            let bytes = bytes.filter(|&bytes| bytes > 0);
            if patch.force == Some(true) {
                monitor.set_memory_budget(bytes);
            } else {
                monitor.try_set_memory_budget(bytes).map_err(refused)?;
            }
        }
        self.patch_pace(engine, patch)?;
        if let Some(ratio) = patch.overcommit_ratio {
            monitor.set_overcommit_ratio(ratio.filter(|&ratio| ratio > 0.0));
        }
        if let Some(allowed) = patch.unmerge_victims {
            monitor.set_unmerge_victims(allowed);
        }
        if let Some(run) = patch.run {
            monitor.set_run(run).map_err(refused)?;
        }
        Ok(Reply::Empty)
    }

    fn patch_pace(&self, engine: &dedup::Engine, patch: &MergePatch) -> Result<(), Fault> {
        // It guards no data that a panic could leave half done.
        let _patching = self.patching.lock().unwrap_or_else(PoisonError::into_inner);
        let before = engine.pace();
        let pace = patch.pace(before).map_err(Fault::bad_request)?;
        if pace != before {
            engine.set_pace(pace);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use hyper::StatusCode;

    use super::*;

    #[test]
    fn config_that_is_no_good_is_refused_before_a_monitor_is_wanted() {
        let door = FrontDoor::new(dedup::Settings::default());
        // From now on it makes none.
        door.close();
        let refused = |config: &VmConfig| {
            let id = "a".parse().unwrap();
            let request = Request::CreateVm(id, Box::new(config.clone()));
            door.handle(request).unwrap_err().status
        };
        let mut config = VmConfig::new("builtin:pageload");
        assert_eq!(refused(&config), StatusCode::SERVICE_UNAVAILABLE);
        config.machine_config.vcpu_count = 0;
        assert_eq!(refused(&config), StatusCode::BAD_REQUEST);
    }
}
