//! What an earlier front door left: its monitors, and what is known of VMs whose monitor is gone.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use vmm::VmId;

use super::gateway::Gateway;
use super::lists::{part_of, vms_in};
use super::process::MonitorProcess;
use super::proxy::Received;
use super::roster::{Entry, VmRecord};

/// How long the front door waits for monitors that are to be adopted, before it opens without them.
const ADOPT_TIME: Duration = Duration::from_secs(2);
/// How often it tries again.
const ADOPT_RETRY: Duration = Duration::from_millis(50);

impl Gateway {
    /// Takes all domains on that are in the state directory. Their VMs' ids are taken when this
    /// returns; a monitor that hangs is adopted once it listens again.
    ///
    /// # Errors
    /// If the directory cannot be read.
    pub(super) async fn adopt_all(self: &Arc<Self>) -> io::Result<()> {
        let mut adopting = JoinSet::new();
        for name in self.state.domains()? {
            let entry = self.roster().entry(&name, |name| self.state.domain(name));
            let mut is_whole = true;
            let is_transient = entry.dir.is_transient();
            for (id, record) in entry.dir.records()?.into_iter().filter(|_| !is_transient) {
                is_whole &= record.is_some_and(|record| self.roster().take_on(&id, &entry, record));
            }
            let gateway = Arc::clone(self);
            adopting.spawn(async move { gateway.adopt(&entry, is_whole).await });
        }
        let all = async { while adopting.join_next().await.is_some() {} };
        if tokio::time::timeout(ADOPT_TIME, all).await.is_err() {
            log::warn!("{} merge domains do not answer yet", adopting.len());
            adopting.detach_all();
        }
        Ok(())
    }

    /// Adopts a domain's monitor, or notes that it is gone. Takes until that is known for certain. A
    /// domain of which not all records are readable (not `is_whole`) keeps its directory.
    async fn adopt(self: &Arc<Self>, entry: &Arc<Entry>, is_whole: bool) {
        let mut is_told = false;
        loop {
            // Lock order: monitor -> roster.
            let mut slot = entry.monitor.lock().await;
            let found = match &*slot {
                // Started by a request: then the earlier one is gone.
                Some(_) => Ok(None),
                None => find_monitor(entry).await,
            };
            match found {
                Ok(Some(process)) => {
                    let process = Arc::new(process);
                    self.remember(&process);
                    self.roster().give(&entry.name, process.number);
                    self.watch(entry, &process);
                    *slot = Some(process);
                    drop(slot);
                    self.reconcile(entry).await;
                    break;
                }
                Ok(None) => {
                    let its = |vm: &VmRecord| vm.is_created && vm.monitor.is_none();
                    let crashed = self.roster().note_crash(&entry.name, "status unknown", its);
                    entry.note_all(&crashed);
                    if slot.is_none() {
                        entry.remove_cgroup().await;
                    }
                    break;
                }
                Err(error) if !is_told => {
                    is_told = true;
                    log::warn!(
                        "merge domain {}: cannot adopt its monitor: {error}",
                        entry.name
                    );
                }
                Err(_) => {}
            }
            drop(slot);
            tokio::time::sleep(ADOPT_RETRY).await;
        }
        if is_whole {
            self.tidy(entry).await;
        }
    }

    /// Brings the roster in line with what a monitor that was adopted says it has. One that says
    /// nothing keeps all that is noted.
    async fn reconcile(self: &Arc<Self>, entry: &Arc<Entry>) {
        let noted: Vec<(VmId, u64)> = {
            let roster = self.roster();
            let of_domain = roster.vms.iter().filter(|(_, vm)| vm.domain == entry.name);
            let live = of_domain.filter(|(_, vm)| vm.is_created && vm.crashed.is_none());
            live.map(|(id, vm)| (id.clone(), vm.number)).collect()
        };
        let part = part_of(entry, &Received::get("/vms")).await;
        let listed = match part.and_then(|body| vms_in(&body)) {
            Ok(vms) => vms,
            Err(why) => return log::warn!("{why}"),
        };
        let listed: BTreeSet<VmId> = listed.iter().filter_map(|vm| vm.id.parse().ok()).collect();
        for (id, number) in noted {
            // It was noted, and then its monitor was not asked any more, refused or removed it.
            if !listed.contains(&id) {
                self.dismiss(entry, &id, number).await;
            }
        }
        for id in &listed {
            self.take_on(entry, id).await;
        }
    }
}

/// The monitor that a domain has; `None` if it has none any more.
///
/// # Errors
/// While that is not known, or it cannot be reached.
async fn find_monitor(entry: &Entry) -> io::Result<Option<MonitorProcess>> {
    if !entry.dir.has_monitor()? {
        return Ok(None);
    }
    if entry.dir.is_transient() {
        return Err(io::Error::other("it ends with an earlier server"));
    }
    let connection = entry.dir.connect().await?;
    MonitorProcess::adopt(&connection).map(Some)
}
