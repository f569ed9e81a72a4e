//! How monitors and VMs come and go.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper::{Method, StatusCode};
use tokio::sync::MutexGuard;
use vmm::VmId;
use vmm::config::VmConfig;

use super::cgroup::DomainCgroup;
use super::gateway::{Answer, Gateway, ask};
use super::lists::{part_of, vms_in};
use super::process::{EXIT_TIME, MonitorProcess, StartError};
use super::proxy::Received;
use super::roster::Entry;
use super::state_dir::Record;
use crate::domain_name::DomainName;
use crate::fault::Fault;
use crate::reply::Reply;

/// An entry's monitor, under its lock.
type Slot = Option<Arc<MonitorProcess>>;

/// How long an earlier monitor may take to end or to be adopted, before a request is refused.
const HELD_TIME: Duration = Duration::from_secs(5);
const HELD_RETRY: Duration = Duration::from_millis(20);

impl Gateway {
    /// The domain's monitor, started now if there is none, and the lock that keeps it.
    pub(super) async fn hold_monitor<'a>(
        self: &Arc<Self>,
        entry: &'a Arc<Entry>,
    ) -> Result<(MutexGuard<'a, Slot>, Arc<MonitorProcess>), Fault> {
        let deadline = Instant::now() + HELD_TIME;
        loop {
            let mut slot = entry.monitor.lock().await;
            if let Some(present) = &*slot
                && !present.has_ended(Duration::ZERO).await
            {
                let present = Arc::clone(present);
                return Ok((slot, present));
            }
            match self.start_monitor(entry).await {
                Ok(started) => {
                    self.watch(entry, &started);
                    *slot = Some(Arc::clone(&started));
                    return Ok((slot, started));
                }
                Err(StartError::Held) if Instant::now() < deadline => {
                    // It ends, or is adopted: for that it needs the lock.
                    drop(slot);
                    tokio::time::sleep(HELD_RETRY).await;
                }
                Err(error) => {
                    let message = format!("merge domain {}: {error}", entry.name);
                    return Err(match error {
                        StartError::Held => Fault::unavailable(message),
                        _ => Fault::internal(message),
                    });
                }
            }
        }
    }

    async fn start_monitor(&self, entry: &Entry) -> Result<Arc<MonitorProcess>, StartError> {
        let spawned = MonitorProcess::spawn(&entry.name, &entry.dir, &self.settings).await?;
        let process = Arc::new(spawned);
        self.remember(&process);
        let ready = process.ready(&entry.name, &entry.dir, &self.settings);
        if let Err(error) = ready.await {
            // It was given no VM.
            process.kill();
            process.ended().await;
            entry.remove_cgroup().await;
            return Err(error);
        }
        Ok(process)
    }

    /// Has the end of a monitor noted when it comes.
    pub(super) fn watch(self: &Arc<Self>, entry: &Arc<Entry>, process: &Arc<MonitorProcess>) {
        let (process, entry, gateway) = (Arc::clone(process), Arc::clone(entry), Arc::clone(self));
        tokio::spawn(async move {
            let how = process.ended().await;
            let mut slot = entry.monitor.lock().await;
            // Whoever ends one takes it away first, and cleans up.
            if slot
                .as_ref()
                .is_some_and(|present| Arc::ptr_eq(present, &process))
            {
                *slot = None;
                entry.remove_cgroup().await;
                if let Err(error) = entry.dir.remove_socket() {
                    log::warn!("merge domain {}: its socket: {error}", entry.name);
                }
            }
            let its = |vm: &super::roster::VmRecord| vm.monitor == Some(process.number);
            let crashed = gateway
                .roster()
                .note_crash(&entry.name, &how.to_string(), its);
            entry.note_all(&crashed);
            drop(slot);
            if !crashed.is_empty() {
                let (name, count, said) = (&entry.name, crashed.len(), entry.dir.last_words());
                log::error!(
                    "merge domain {name}: its monitor ended under {count} vms: {how}: {said}"
                );
            }
            gateway.tidy(&entry).await;
        });
    }

    pub(super) async fn create(
        self: &Arc<Self>,
        id: &VmId,
        config: &VmConfig,
        received: &Received,
    ) -> Answer {
        // Before a monitor is started for it.
        let refused = |error| Fault::bad_request(format!("vm {id}: {error}"));
        config.validate().map_err(refused)?;
        let dir = |name: &DomainName| self.state.domain(name);
        let (entry, number) = self.roster().admit(id, config, dir)?;
        let process = match self.prepare(&entry, id, number).await {
            Ok(process) => process,
            Err(fault) => {
                self.dismiss(&entry, id, number).await;
                return Err(fault);
            }
        };
        let reply = ask(&entry, received).await;
        let is_created = match &reply {
            Ok(reply) => reply.status().is_success(),
            // It may have been made before its monitor fell silent. Then it stays listed.
            Err(_) => !is_undone(&entry, &process, id).await,
        };
        if !is_created {
            self.dismiss(&entry, id, number).await;
        } else if let Some(vm) = self.roster().vm(id, number) {
            vm.is_created = true;
        }
        reply
    }

    /// Gives a VM that is to be created to its domain's monitor.
    async fn prepare(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        id: &VmId,
        number: u64,
    ) -> Result<Arc<MonitorProcess>, Fault> {
        let (_slot, process) = self.hold_monitor(entry).await?;
        let record = self.roster().vm(id, number).map(|vm| {
            vm.monitor = Some(process.number);
            vm.to_record()
        });
        let record = record.ok_or_else(|| Fault::unavailable("the server is stopping"))?;
        let noted = entry.note(id, &record);
        noted.map_err(|error| Fault::internal(format!("vm {id}: its record: {error}")))?;
        Ok(process)
    }

    pub(super) async fn delete(&self, id: &VmId, received: &Received) -> Answer {
        let (record, entry) = self.find(id)?;
        let mut reply = Reply::Empty.into_response();
        if record.crashed.is_none() {
            reply = ask(&entry, received).await?;
            // A monitor that does not know it has no more to say about it.
            if !reply.status().is_success() && reply.status() != StatusCode::NOT_FOUND {
                return Ok(reply);
            }
        }
        self.dismiss(&entry, id, record.number).await;
        Ok(reply)
    }

    /// Takes a VM off the roster, and ends its domain's monitor if that is now of no use.
    pub(super) async fn dismiss(&self, entry: &Entry, id: &VmId, number: u64) {
        // Lock order: monitor -> roster. A later VM of this id writes its files after these are gone.
        let slot = entry.monitor.lock().await;
        let is_this = {
            let mut roster = self.roster();
            let is_this = roster.vm(id, number).is_some();
            if is_this {
                roster.vms.remove(id);
            }
            is_this
        };
        if is_this {
            entry.dir.remove_record(id);
            entry.dir.tails().remove(id);
        }
        drop(slot);
        self.tidy(entry).await;
    }

    /// Ends the monitor of a domain that has no VMs, and forgets a domain that nobody names. A monitor
    /// that says it has some, or does not answer, is left alone.
    pub(super) async fn tidy(&self, entry: &Entry) {
        // Lock order: monitor -> roster. A VM that comes meanwhile waits here for a new monitor.
        let mut slot = entry.monitor.lock().await;
        {
            let roster = self.roster();
            if !roster.is_current(entry) || roster.is_used(entry) {
                return;
            }
        }
        if let Some(process) = &*slot
            && !process.has_ended(Duration::ZERO).await
        {
            if !has_no_vms(entry).await {
                let name = &entry.name;
                log::error!("merge domain {name}: its monitor has unknown vms, and is kept");
                return;
            }
            process.end().await;
        }
        *slot = None;
        if !self.roster().is_named(entry) && entry.clear().await {
            self.roster().forget(entry);
        }
    }

    /// Notes a VM's configuration anew, as its monitor has it.
    pub(super) async fn note_config(&self, entry: &Entry, id: &VmId, number: u64) {
        let config = match config_in(entry, id).await {
            Ok(config) => config,
            Err(why) => return log::warn!("vm {id}: its record is out of date: {why}"),
        };
        let _slot = entry.monitor.lock().await;
        let record = self.roster().vm(id, number).map(|vm| {
            vm.config = config;
            vm.to_record()
        });
        entry.note_all(record.map(|record| (id.clone(), record)).as_slice());
    }

    /// Puts a VM on the roster that its monitor has and the roster has not: a front door was killed
    /// while it was created.
    pub(super) async fn take_on(&self, entry: &Entry, id: &VmId) {
        let slot = entry.monitor.lock().await;
        let (Some(process), false) = (&*slot, self.roster().vms.contains_key(id)) else {
            return;
        };
        // Nobody else can create or remove one of this domain now.
        let Ok(config) = config_in(entry, id).await else {
            return;
        };
        if DomainName::of_vm(id, &config) != entry.name {
            return;
        }
        let record = Record {
            config,
            crashed: None,
        };
        if self.roster().take_on(id, entry, record.clone()) {
            self.roster().give(&entry.name, process.number);
            entry.note_all(&[(id.clone(), record)]);
        }
    }
}

impl Entry {
    /// Notes a VM on disk, unless nothing of the domain outlives the front door.
    fn note(&self, id: &VmId, record: &Record) -> std::io::Result<()> {
        if self.dir.is_transient() {
            return Ok(());
        }
        self.dir.write_record(id, record)
    }

    pub(super) fn note_all(&self, records: &[(VmId, Record)]) {
        for (id, record) in records {
            if let Err(error) = self.note(id, record) {
                log::error!("vm {id}: its record: {error}");
            }
        }
    }

    /// The domain's cgroup, if it has one.
    pub(super) fn cgroup(&self) -> Option<DomainCgroup> {
        self.dir.cgroup().map(DomainCgroup::at)
    }

    pub(super) async fn remove_cgroup(&self) {
        if let Some(cgroup) = self.cgroup() {
            cgroup.remove().await;
        }
    }

    /// Removes what a domain without a monitor left; false if it has one after all.
    pub(super) async fn clear(&self) -> bool {
        match self.dir.has_monitor() {
            Ok(false) => {
                self.remove_cgroup().await;
                self.dir.remove();
                true
            }
            has => {
                let name = &self.name;
                log::error!("merge domain {name}: is kept, for its monitor may live: {has:?}");
                false
            }
        }
    }
}

/// Whether a VM whose creation got no answer does not exist.
async fn is_undone(entry: &Entry, process: &MonitorProcess, id: &VmId) -> bool {
    let undo = Received {
        method: Method::DELETE,
        ..Received::get(format!("/vms/{id}"))
    };
    match ask(entry, &undo).await {
        Ok(reply) => reply.status().is_success() || reply.status() == StatusCode::NOT_FOUND,
        Err(_) => process.has_ended(EXIT_TIME).await,
    }
}

/// Whether a domain's monitor says that it has no VMs.
async fn has_no_vms(entry: &Entry) -> bool {
    let part = part_of(entry, &Received::get("/vms")).await;
    part.is_ok_and(|body| vms_in(&body).is_ok_and(|vms| vms.is_empty()))
}

/// A VM's configuration, as its monitor has it.
async fn config_in(entry: &Entry, id: &VmId) -> Result<VmConfig, String> {
    let part = part_of(entry, &Received::get(format!("/vms/{id}/config"))).await?;
    serde_json::from_slice(&part).map_err(|error| error.to_string())
}
