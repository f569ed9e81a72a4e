//! Which VM is in which domain, and what became of the domain's monitor.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::Mutex;
use vmm::VmId;
use vmm::config::VmConfig;

use super::gateway::Answer;
use super::process::MonitorProcess;
use super::state_dir::{DomainDir, Record};
use crate::domain_name::DomainName;
use crate::fault::Fault;
use crate::model::{VERSION, VmDescription};
use crate::reply::Reply;
use crate::request::Request;

/// All VMs and domains of a front door.
#[derive(Debug, Default)]
pub(super) struct Roster {
    pub(super) domains: BTreeMap<DomainName, Arc<Entry>>,
    pub(super) vms: BTreeMap<VmId, VmRecord>,
    pub(super) is_closed: bool,
    /// How many VMs have been on it.
    admitted: u64,
}

/// A domain that has VMs, or was declared.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) name: DomainName,
    pub(super) dir: DomainDir,
    /// Stays when its last VM goes.
    is_declared: AtomicBool,
    /// Its monitor, if there is one that is known. Held while one starts or ends, and while its VMs'
    /// files are written or removed.
    pub(super) monitor: Mutex<Option<Arc<MonitorProcess>>>,
    /// Held while its budget and its cgroup's limit change together.
    pub(super) patching: Mutex<()>,
}

/// What the front door itself knows of a VM.
#[derive(Debug, Clone)]
pub(super) struct VmRecord {
    pub(super) domain: DomainName,
    pub(super) config: VmConfig,
    /// How its monitor ended under it; `None` while it lives.
    pub(super) crashed: Option<String>,
    /// The number of the monitor that it was given to.
    pub(super) monitor: Option<u64>,
    /// Whether its monitor has made it. Until then only its id is taken.
    pub(super) is_created: bool,
    /// Tells it from an earlier VM of its id.
    pub(super) number: u64,
}

impl Roster {
    /// Puts a VM that is to be created on the roster; gives its domain's entry and its own number.
    pub(super) fn admit(
        &mut self,
        id: &VmId,
        config: &VmConfig,
        dir: impl FnOnce(&DomainName) -> DomainDir,
    ) -> Result<(Arc<Entry>, u64), Fault> {
        if self.is_closed {
            return Err(Fault::unavailable("the server is stopping"));
        }
        if self.vms.contains_key(id) {
            return Err(Fault::conflict(format!("vm {id}: already exists")));
        }
        let entry = self.entry(&DomainName::of_vm(id, config), dir);
        let record = Record {
            config: config.clone(),
            crashed: None,
        };
        let number = self.put(id, &entry, record, false);
        Ok((entry, number))
    }

    /// Puts a VM that exists on the roster, unless its id is taken. True if it was put there.
    pub(super) fn take_on(&mut self, id: &VmId, entry: &Entry, record: Record) -> bool {
        let is_free = !self.vms.contains_key(id);
        if is_free {
            self.put(id, entry, record, true);
        }
        is_free
    }

    fn put(&mut self, id: &VmId, entry: &Entry, record: Record, is_created: bool) -> u64 {
        self.admitted += 1;
        let record = VmRecord {
            domain: entry.name.clone(),
            config: record.config,
            crashed: record.crashed,
            monitor: None,
            is_created,
            number: self.admitted,
        };
        self.vms.insert(id.clone(), record);
        self.admitted
    }

    /// The entry of a domain, made if there is none.
    pub(super) fn entry(
        &mut self,
        name: &DomainName,
        dir: impl FnOnce(&DomainName) -> DomainDir,
    ) -> Arc<Entry> {
        let entry = self.domains.entry(name.clone()).or_insert_with(|| {
            Arc::new(Entry {
                name: name.clone(),
                dir: dir(name),
                is_declared: AtomicBool::new(false),
                monitor: Mutex::default(),
                patching: Mutex::default(),
            })
        });
        Arc::clone(entry)
    }

    /// The VM of that id, if it is the one of that number.
    pub(super) fn vm(&mut self, id: &VmId, number: u64) -> Option<&mut VmRecord> {
        self.vms.get_mut(id).filter(|vm| vm.number == number)
    }

    /// The VMs by id: as their monitors told, by domain, or as they are known here where these were
    /// silent. What a monitor has and nobody knows is added to `unknown`.
    pub(super) fn list(
        &self,
        told: BTreeMap<DomainName, Vec<VmDescription>>,
        unknown: &mut Vec<(Arc<Entry>, VmId)>,
    ) -> Vec<VmDescription> {
        let here = self.vms.iter().filter(|(_, vm)| {
            vm.is_created && (vm.crashed.is_some() || !told.contains_key(&vm.domain))
        });
        let here = here.map(|(id, vm)| (id.clone(), vm.describe(id)));
        let mut listed: BTreeMap<VmId, VmDescription> = here.collect();
        for (name, vms) in told {
            for described in vms {
                let Ok(id) = described.id.parse::<VmId>() else {
                    continue;
                };
                match self.vms.get(&id) {
                    // A monitor tells of its own VMs alone.
                    Some(vm) if vm.domain == name && vm.crashed.is_none() => {
                        listed.insert(id, described);
                    }
                    Some(_) => log::error!("merge domain {name}: its monitor lists vm {id}"),
                    None => {
                        let entry = self.domains.get(&name).cloned();
                        unknown.extend(entry.map(|entry| (entry, id)));
                    }
                }
            }
        }
        listed.into_values().collect()
    }

    /// Gives all of a domain's VMs that have no monitor to the one of `number`.
    pub(super) fn give(&mut self, name: &DomainName, number: u64) {
        let of_domain = self.vms.values_mut().filter(|vm| vm.domain == *name);
        for vm in of_domain.filter(|vm| vm.is_created && vm.monitor.is_none()) {
            vm.monitor = Some(number);
        }
    }

    /// Whether the domain's entry is this one, and was not forgotten.
    pub(super) fn is_current(&self, entry: &Entry) -> bool {
        let current = self.domains.get(&entry.name);
        current.is_some_and(|current| std::ptr::eq(&**current, entry))
    }

    /// Takes a domain off the roster, unless somebody needs it.
    pub(super) fn forget(&mut self, entry: &Entry) {
        if !self.is_named(entry) {
            self.domains.remove(&entry.name);
        }
    }

    /// Whether the domain is to have a monitor.
    pub(super) fn is_used(&self, entry: &Entry) -> bool {
        let mut live = self.vms.values().filter(|vm| vm.crashed.is_none());
        entry.is_declared() || live.any(|vm| vm.domain == entry.name)
    }

    /// Whether somebody needs the domain, crashed VMs included.
    pub(super) fn is_named(&self, entry: &Entry) -> bool {
        entry.is_declared() || self.vms.values().any(|vm| vm.domain == entry.name)
    }

    /// Notes that a domain's monitor ended under those of its VMs that were `its`; what is to be
    /// noted of them.
    pub(super) fn note_crash(
        &mut self,
        name: &DomainName,
        how: &str,
        its: impl Fn(&VmRecord) -> bool,
    ) -> Vec<(VmId, Record)> {
        let vms = self.vms.iter_mut();
        let crashed = vms.filter(|(_, vm)| vm.domain == *name && vm.crashed.is_none() && its(vm));
        let note = |(id, vm): (&VmId, &mut VmRecord)| {
            vm.crashed = Some(how.to_owned());
            (id.clone(), vm.to_record())
        };
        crashed.map(note).collect()
    }
}

impl Entry {
    /// Has it stay when its last VM goes.
    pub(super) fn declare(&self) {
        self.is_declared.store(true, Ordering::Relaxed);
    }

    fn is_declared(&self) -> bool {
        self.is_declared.load(Ordering::Relaxed)
    }
}

impl VmRecord {
    /// What is noted of it on disk.
    pub(super) fn to_record(&self) -> Record {
        Record {
            config: self.config.clone(),
            crashed: self.crashed.clone(),
        }
    }

    /// What becomes of a request to a VM whose monitor ended.
    pub(super) fn answer_for(&self, id: &VmId, request: &Request, dir: &DomainDir) -> Answer {
        let described = self.describe(id);
        match request {
            Request::DescribeVm(_) => Ok(Reply::json(&described)?.into_response()),
            Request::VmConsole(_) => Ok(Reply::Text(dir.tails().read(id)).into_response()),
            Request::DescribeMachine(_) => {
                Ok(Reply::json(&self.config.machine_config)?.into_response())
            }
            Request::DescribeVmConfig(_) => Ok(Reply::json(&self.config)?.into_response()),
            _ => {
                let why = described.end_message.unwrap_or_default();
                Err(Fault::bad_request(format!(
                    "vm {id}: is not running: {why}"
                )))
            }
        }
    }

    /// What can be told of it without its monitor.
    pub(super) fn describe(&self, id: &VmId) -> VmDescription {
        let samepage = &self.config.samepage;
        let domain = &self.domain;
        let (state, end_reason, message) = match &self.crashed {
            Some(how) => ("Ended", Some("crashed".to_owned()), format!("ended: {how}")),
            None => ("Unknown", None, "does not answer".to_owned()),
        };
        VmDescription {
            id: id.to_string(),
            app_name: "Samepage".to_owned(),
            vmm_version: VERSION.to_owned(),
            state: state.to_owned(),
            end_reason,
            end_message: Some(format!("the monitor of merge domain {domain} {message}")),
            merge_domain: samepage.merge_domain.as_ref().map(ToString::to_string),
            merge: samepage.merge,
            mem_size_bytes: self.config.mem_size_bytes(),
            vcpu_count: u64::from(self.config.machine_config.vcpu_count),
            oom_priority: samepage.oom_priority,
            report: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domains::state_dir::StateDir;

    fn config(domain: &str) -> VmConfig {
        let mut config = VmConfig::new("builtin:pageload");
        config.samepage.merge_domain = Some(domain.parse().unwrap());
        config
    }

    fn id(text: &str) -> VmId {
        text.parse().unwrap()
    }

    fn state() -> (tempfile::TempDir, StateDir) {
        let root = tempfile::tempdir().unwrap();
        let state = StateDir::open(root.path()).unwrap();
        (root, state)
    }

    #[test]
    fn id_is_taken_in_all_domains_at_once() {
        let (_root, state) = state();
        let mut roster = Roster::default();
        let admit = |roster: &mut Roster, domain| {
            roster.admit(&id("a"), &config(domain), |name| state.domain(name))
        };
        let (entry, number) = admit(&mut roster, "ci").unwrap();
        let refused = admit(&mut roster, "web").unwrap_err();
        assert_eq!(refused.status, hyper::StatusCode::CONFLICT);
        assert_eq!(roster.domains.len(), 1);
        let record = roster.vms[&id("a")].to_record();
        assert!(!roster.take_on(&id("a"), &entry, record));
        // One that goes and one that comes by the same id are two.
        roster.vms.remove(&id("a"));
        admit(&mut roster, "ci").unwrap();
        assert!(roster.vm(&id("a"), number).is_none());
    }

    #[test]
    fn a_monitor_tells_of_its_own_vms_alone() {
        let (_root, state) = state();
        let mut roster = Roster::default();
        for (vm, domain) in [("a", "ci"), ("b", "web"), ("new", "ci")] {
            let admitted = roster.admit(&id(vm), &config(domain), |name| state.domain(name));
            let (_, number) = admitted.unwrap();
            roster.vm(&id(vm), number).unwrap().is_created = vm != "new";
        }
        let told = |vm: &str| VmDescription {
            state: "told".to_owned(),
            ..roster.vms[&id("a")].describe(&id(vm))
        };
        let ci = vec![told("a"), told("b"), told("stray")];
        let mut unknown = Vec::new();
        let listed = roster.list([("ci".parse().unwrap(), ci)].into(), &mut unknown);
        let listed: Vec<(&str, &str)> = listed
            .iter()
            .map(|vm| (vm.id.as_str(), vm.state.as_str()))
            .collect();
        assert_eq!(listed, [("a", "told"), ("b", "Unknown")]);
        let unknown: Vec<&VmId> = unknown.iter().map(|(_, id)| id).collect();
        assert_eq!(unknown, [&id("stray")]);
    }

    #[test]
    fn a_crash_is_that_of_the_vms_that_the_monitor_was_given() {
        let (_root, state) = state();
        let mut roster = Roster::default();
        let mut entries = Vec::new();
        for (vm, monitor) in [("a", Some(1)), ("b", Some(2)), ("new", None)] {
            let admitted = roster.admit(&id(vm), &config("ci"), |name| state.domain(name));
            let (entry, number) = admitted.unwrap();
            roster.vm(&id(vm), number).unwrap().monitor = monitor;
            entries.push(entry);
        }
        let entry = &entries[0];
        let mut crash = |number| {
            let its = |vm: &VmRecord| vm.monitor == Some(number);
            let crashed = roster.note_crash(&entry.name, "signal: 9 (SIGKILL)", its);
            crashed.into_iter().map(|(id, _)| id).collect::<Vec<_>>()
        };
        assert_eq!(crash(1), [id("a")]);
        // Noted once.
        assert!(crash(1).is_empty());
        let told = roster.vms[&id("a")].describe(&id("a"));
        assert_eq!(told.state, "Ended");
        assert_eq!(told.end_reason.as_deref(), Some("crashed"));
        assert!(told.end_message.unwrap().contains("SIGKILL"));

        assert!(roster.is_used(entry));
        for gone in ["b", "new"] {
            roster.vms.remove(&id(gone));
        }
        // What is left of a crash needs no monitor, but keeps its domain.
        assert!(!roster.is_used(entry));
        assert!(roster.is_named(entry));
        roster.vms.remove(&id("a"));
        assert!(!roster.is_named(entry));
    }
}
