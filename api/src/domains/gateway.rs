//! What becomes of each request where every merge domain is a process of its own.
//!
//! # Locks
//! `roster` is held to look up and to change who belongs where, never while anything waits. An
//! entry's `monitor` is held while its monitor starts or ends, and while its VMs' files change;
//! `roster` may be taken under it, never the other way round. `processes` is a leaf, and an entry's
//! `patching` is taken first of all.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::upgrade::OnUpgrade;
use hyper::{Response, StatusCode};
use tokio::task::JoinSet;
use vmm::{MergeDomain, VmId};

use super::process::{MonitorProcess, StartSettings};
use super::proxy::{self, Opened, ProxyError, Received};
use super::roster::{Entry, Roster, VmRecord};
use super::state_dir::StateDir;
use crate::console_stream::ConsoleStreams;
use crate::domain_name::DomainName;
use crate::fault::Fault;
use crate::lock_down;
use crate::model::Version;
use crate::places::Places;
use crate::reply::{self, Reply};
use crate::request::Request;

/// How often it is looked whether a monitor that has not answered yet answers at all, and how long it
/// has for that. A start or an unmerge may take minutes; a monitor that works on one still says its
/// version.
const LOOK_TIME: Duration = Duration::from_secs(5);

/// A reply, or why there is none.
pub(super) type Answer = Result<Response<Full<Bytes>>, Fault>;

/// The front door of domains that are processes.
#[derive(Debug)]
pub struct Gateway {
    roster: Mutex<Roster>,
    places: Places,
    pub(super) state: StateDir,
    pub(super) settings: StartSettings,
    /// What its monitors cannot give up on this host.
    lock_down_missing: Vec<String>,
    /// All monitors that may still live, to be killed at once.
    processes: Mutex<Vec<Weak<MonitorProcess>>>,
}

impl Gateway {
    /// Opens the front door, and adopts the monitors that an earlier one left. Domains that are
    /// `declared` have a monitor also without VMs.
    ///
    /// # Errors
    /// 500 if the state directory cannot be read, or a declared domain's monitor not started.
    pub async fn open(
        state: StateDir,
        settings: StartSettings,
        declared: &[MergeDomain],
    ) -> Result<Arc<Gateway>, Fault> {
        let gateway = Arc::new(Gateway {
            roster: Mutex::default(),
            places: Places::default(),
            state,
            settings,
            lock_down_missing: lock_down::missing_here(),
            processes: Mutex::default(),
        });
        for part in &gateway.lock_down_missing {
            log::warn!("monitors are not fully locked down: {part}");
        }
        // Declared first: a monitor without VMs would not be kept.
        let mut entries = Vec::new();
        for domain in declared {
            let name = DomainName::Named(domain.clone());
            let dir = |name: &DomainName| gateway.state.domain(name);
            let entry = gateway.roster().entry(&name, dir);
            entry.declare();
            entries.push(entry);
        }
        let adopted = gateway.adopt_all().await;
        adopted.map_err(|error| Fault::internal(format!("state directory: {error}")))?;
        for entry in &entries {
            match gateway.hold_monitor(entry).await {
                // One that hangs holds up its own domain alone.
                Err(fault) if fault.status == StatusCode::SERVICE_UNAVAILABLE => {
                    log::warn!("{}", fault.message);
                }
                held => drop(held?),
            }
        }
        Ok(gateway)
    }

    /// Whether VMs go on when the front door ends.
    pub fn leaves_vms(&self) -> bool {
        !self.settings.ends_with_parent
    }

    /// Answers a request.
    ///
    /// # Errors
    /// What the client did wrong, or 500, or 503.
    pub async fn answer(self: &Arc<Self>, request: Request, received: Received) -> Answer {
        // A client that hangs up ends the future of its answer, and must not leave it half done.
        let gateway = Arc::clone(self);
        let answering = tokio::spawn(async move { gateway.carry_out(&request, &received).await });
        answering
            .await
            .map_err(|error| Fault::internal(format!("request failed: {error}")))?
    }

    async fn carry_out(self: &Arc<Self>, request: &Request, received: &Received) -> Answer {
        let _place = self.places.take(self.domain_of(request)).await?;
        let reply = match request {
            Request::Version | Request::VmVersion(_) => Reply::json(&Version {
                lock_down_missing: Some(self.lock_down_missing.clone()),
                ..Version::current()
            })?,
            Request::OpenApi => Reply::Json(crate::OPENAPI_JSON.into()),
            Request::ListVms => Reply::json(&self.list_vms().await)?,
            Request::ListDomains => Reply::json(&self.list_domains().await)?,
            Request::CreateVm(id, config) => return self.create(id, config, received).await,
            Request::DeleteVm(id) => return self.delete(id, received).await,
            Request::DescribeDomain(name) => {
                let entry = self.entry(name)?;
                return ask(&entry, received).await;
            }
            Request::PatchDomain(name, patch) => {
                let entry = self.entry(name)?;
                return self.patch(&entry, patch, received).await;
            }
            of_vm => return self.pass_on(of_vm, received).await,
        };
        Ok(reply.into_response())
    }

    /// Passes a request to a VM on to its monitor.
    async fn pass_on(self: &Arc<Self>, request: &Request, received: &Received) -> Answer {
        let no_vm = || Fault::internal(format!("{}: is of no vm", received.path));
        let id = request.vm().ok_or_else(no_vm)?;
        let (record, entry) = self.find(id)?;
        if record.crashed.is_some() {
            return record.answer_for(id, request, &entry.dir);
        }
        let reply = ask(&entry, received).await?;
        let changes_config = matches!(
            request,
            Request::ConfigureVm(..) | Request::LimitNetwork(..) | Request::PatchBalloon(..)
        );
        if changes_config && reply.status().is_success() {
            self.note_config(&entry, id, record.number).await;
        }
        Ok(reply)
    }

    /// Joins a client's connection with the console of a VM.
    ///
    /// # Errors
    /// 404 if there is no such VM, 503 if its monitor does not answer, and what that refuses.
    pub async fn stream(
        &self,
        request: &Request,
        path: &str,
        upgrade: OnUpgrade,
        streams: &ConsoleStreams,
    ) -> Answer {
        let Request::VmConsole(id) = request else {
            return Err(Fault::internal(format!("{path}: is no console")));
        };
        let _place = self.places.take(self.domain_of(request)).await?;
        let (record, entry) = self.find(id)?;
        let place = streams.place()?;
        if record.crashed.is_some() {
            let tail = entry.dir.tails().read(id);
            tokio::spawn(async move {
                proxy::show(upgrade, &tail).await;
                drop(place);
            });
            return Ok(reply::switch_to_console());
        }
        let opening = async { proxy::open_stream(entry.dir.connect().await?, path).await };
        match heard(&entry, opening).await? {
            Opened::Refused(reply) => Ok(reply),
            Opened::Stream(monitor, early) => {
                tokio::spawn(async move {
                    proxy::join(upgrade, monitor, early).await;
                    drop(place);
                });
                Ok(reply::switch_to_console())
            }
        }
    }

    /// Refuses new VMs; ends all there are, if they are to end with us.
    pub async fn close(&self) {
        let domains = {
            let mut roster = self.roster();
            roster.is_closed = true;
            if self.leaves_vms() {
                return;
            }
            roster.vms.clear();
            std::mem::take(&mut roster.domains)
        };
        let mut ending = JoinSet::new();
        for entry in domains.into_values() {
            ending.spawn(async move {
                let mut monitor = entry.monitor.lock().await;
                if let Some(monitor) = monitor.take() {
                    monitor.end().await;
                }
                entry.clear().await;
            });
        }
        while ending.join_next().await.is_some() {}
    }

    /// Kills all monitors, if they are to end with us.
    pub fn kill_all(&self) {
        if !self.leaves_vms() {
            self.processes()
                .iter()
                .filter_map(Weak::upgrade)
                .for_each(|process| process.kill());
        }
    }

    /// The VMs there are.
    pub fn vm_ids(&self) -> BTreeSet<VmId> {
        let roster = self.roster();
        let created = roster.vms.iter().filter(|(_, vm)| vm.is_created);
        created.map(|(id, _)| id.clone()).collect()
    }

    pub(super) fn roster(&self) -> MutexGuard<'_, Roster> {
        // Its maps are changed by single inserts and removes: whole after any panic.
        self.roster.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps `process` in mind for [`Gateway::kill_all`].
    pub(super) fn remember(&self, process: &Arc<MonitorProcess>) {
        let mut processes = self.processes();
        processes.retain(|process| process.strong_count() > 0);
        processes.push(Arc::downgrade(process));
    }

    fn processes(&self) -> MutexGuard<'_, Vec<Weak<MonitorProcess>>> {
        // As above.
        let processes = self.processes.lock();
        processes.unwrap_or_else(PoisonError::into_inner)
    }

    fn domain_of(&self, request: &Request) -> Option<DomainName> {
        match request {
            Request::CreateVm(id, config) => Some(DomainName::of_vm(id, config)),
            Request::DescribeDomain(name) | Request::PatchDomain(name, _) => Some(name.clone()),
            _ => {
                let roster = self.roster();
                let vm = roster.vms.get(request.vm()?)?;
                Some(vm.domain.clone())
            }
        }
    }

    fn entry(&self, name: &DomainName) -> Result<Arc<Entry>, Fault> {
        let entry = self.roster().domains.get(name).cloned();
        entry.ok_or_else(|| Fault::not_found(format!("merge domain {name}: no such domain")))
    }

    /// A VM's record, and its domain. One that is not created yet is not found.
    pub(super) fn find(&self, id: &VmId) -> Result<(VmRecord, Arc<Entry>), Fault> {
        let record = self.roster().vms.get(id).cloned();
        let record = record.filter(|record| record.is_created);
        let record = record.ok_or_else(|| Fault::not_found(format!("vm {id}: no such vm")))?;
        let entry = self.entry(&record.domain)?;
        Ok((record, entry))
    }
}

/// Passes a request on to a domain's monitor.
pub(super) async fn ask(entry: &Entry, received: &Received) -> Answer {
    let asking = async { proxy::forward(entry.dir.connect().await?, received).await };
    heard(entry, asking).await
}

/// What a monitor says, for as long as it says anything at all.
async fn heard<T>(
    entry: &Entry,
    asking: impl Future<Output = Result<T, ProxyError>>,
) -> Result<T, Fault> {
    tokio::select! {
        told = asking => told.map_err(|error| silent(entry, &error.to_string())),
        () = hangs(entry) => Err(silent(entry, &format!("not within {LOOK_TIME:?}"))),
    }
}

/// Returns once the domain's monitor does not say its version in time.
async fn hangs(entry: &Entry) {
    let version = Received::get("/version");
    loop {
        tokio::time::sleep(LOOK_TIME).await;
        let asking = async { proxy::forward(entry.dir.connect().await?, &version).await };
        if !matches!(tokio::time::timeout(LOOK_TIME, asking).await, Ok(Ok(_))) {
            return;
        }
    }
}

/// 503 for a monitor that gives no answer. It names the process: it is the operator's to kill, for its
/// VMs may be well.
fn silent(entry: &Entry, why: &str) -> Fault {
    let monitor = entry.monitor.try_lock().ok();
    let pid = monitor.and_then(|monitor| Some(monitor.as_ref()?.pid()));
    let which = pid.map_or_else(String::new, |pid| format!(" (process {pid})"));
    let name = &entry.name;
    Fault::unavailable(format!(
        "merge domain {name}: its monitor{which} does not answer: {why}"
    ))
}
