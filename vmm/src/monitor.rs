//! The monitor: the VMs of one merge domain.

mod balloon;
mod memory;

use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use crate::admission::Claims;
use crate::config::{ConfigPart, HugePages, NetworkPatch, VmConfig};
use crate::console::Console;
use crate::error::MonitorError;
use crate::events::EventLoop;
use crate::guard::gauge;
use crate::guard::room::Resumer;
use crate::guard::{Guard, Watch};
use crate::id::{MergeDomain, VmId};
use crate::info::VmInfo;
use crate::ksm::{Ksm, KsmPlace};
use crate::machine::Host;
use crate::reaper::Reaper;
use crate::roster::Roster;
use crate::start::{self, StartError};
use crate::state::EndReason;
use crate::virtio::{DiscardThread, Discards, VsockCounts};
use crate::vm::{Corpse, Vm};

/// One merge domain: its VMs, its merge engine, its event loop, its reaper, its guard.
///
/// All methods may be called from any thread. Dropping it stops every VM, joins every thread and
/// gives back all memory.
#[derive(Debug)]
pub struct Monitor {
    domain: MergeDomain,
    vms: Arc<Roster>,
    /// Starts under way, and what the domain may promise its VMs.
    claims: Mutex<Claims>,
    overcommit_ratio: Mutex<Option<f64>>,
    /// `None` only while the monitor is being dropped: the guard is the first to go.
    guard: Option<Guard>,
    watch: Arc<Watch>,
    /// `None` only while the monitor is being dropped.
    to_reaper: Option<Sender<Corpse>>,
    reaper: Option<Reaper>,
    // Dropped before the engine in `host`: devices write to guest memory.
    _events: EventLoop,
    host: Host,
    // Behind the last that has something for it.
    _discarding: DiscardThread,
}

fn host_error<E>(what: &'static str) -> impl Fn(E) -> MonitorError
where
    E: std::error::Error + Send + Sync + 'static,
{
    move |error| MonitorError::Host {
        what,
        error: Box::new(error),
    }
}

/// Has the guard keep the reserve that guests with huge pages need.
fn note_huge_pages(config: &VmConfig) {
    if config.machine_config.huge_pages == HugePages::Transparent {
        gauge::expect_huge_pages();
    }
}

impl Monitor {
    /// Opens `/dev/kvm` and starts the threads of the monitor.
    ///
    /// # Errors
    /// [`MonitorError::Host`] when KVM or a thread is not to be had.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "settings belong to the monitor: what else it keeps of them is no caller's concern"
    )]
    pub fn new(domain: MergeDomain, settings: dedup::Settings) -> Result<Monitor, MonitorError> {
        let (kvm, supported_cpuid) = Host::open_kvm().map_err(host_error("kvm"))?;
        let engine = dedup::Engine::new(&settings).map_err(host_error("merge engine"))?;
        let (engine, vms) = (Arc::new(engine), Arc::new(Roster::default()));
        let events = EventLoop::new().map_err(host_error("event loop"))?;
        let (discards, discarding) = Discards::start().map_err(host_error("discard thread"))?;
        let (reaper, to_reaper) = Reaper::spawn().map_err(host_error("reaper thread"))?;
        let watch =
            Watch::new(engine.clone(), vms.clone()).map_err(host_error("eventfd of the guard"))?;
        let added = events.remote().add(
            Box::new(Resumer(watch.clone())),
            Box::new(|text| log::error!("waking device queues panicked: {text}")),
        );
        added.map_err(host_error("event loop"))?;
        let guard = Guard::spawn(&watch).map_err(host_error("guard thread"))?;
        Ok(Monitor {
            domain,
            vms,
            claims: Mutex::default(),
            overcommit_ratio: Mutex::default(),
            guard: Some(guard),
            watch: watch.clone(),
            to_reaper: Some(to_reaper),
            reaper: Some(reaper),
            host: Host {
                kvm,
                supported_cpuid,
                engine,
                events: events.remote(),
                watch,
                discards,
            },
            _events: events,
            _discarding: discarding,
        })
    }

    /// The domain.
    pub fn domain(&self) -> &MergeDomain {
        &self.domain
    }

    /// The merge engine.
    pub fn engine(&self) -> &dedup::Engine {
        &self.host.engine
    }

    /// The VM's record. The list's lock is not held over what is done with it.
    fn find(&self, id: &VmId) -> Result<Arc<Vm>, MonitorError> {
        self.vms
            .lock()
            .get(id)
            .cloned()
            .ok_or_else(|| MonitorError::NotFound(id.clone()))
    }

    /// Adds a VM, not started: checks its configuration and that the files it names are there.
    ///
    /// # Errors
    /// [`MonitorError::DuplicateId`], [`MonitorError::WrongDomain`], [`MonitorError::Config`] or
    /// [`MonitorError::Start`] (a file, or no KSM in the kernel).
    pub fn create(&self, id: VmId, config: VmConfig) -> Result<(), MonitorError> {
        config.validate().map_err(|error| MonitorError::Config {
            id: id.clone(),
            error,
        })?;
        if let Some(wanted) = config
            .samepage
            .merge_domain
            .as_ref()
            .filter(|d| **d != self.domain)
        {
            let (wanted, domain) = (wanted.to_string(), self.domain.to_string());
            return Err(MonitorError::WrongDomain { id, wanted, domain });
        }
        let refused = |error: StartError| MonitorError::Start {
            id: id.clone(),
            error,
        };
        start::check_files(&config).map_err(refused)?;
        start::check_kernel(&config, &Ksm::default()).map_err(refused)?;
        note_huge_pages(&config);
        let Some(to_reaper) = self.to_reaper.clone() else {
            return Err(MonitorError::NotFound(id));
        };
        let mut vms = self.vms.lock();
        if vms.contains_key(&id) {
            return Err(MonitorError::DuplicateId(id));
        }
        vms.insert(id.clone(), Arc::new(Vm::new(id, config, to_reaper)));
        Ok(())
    }

    /// Sets a part of the configuration of a VM that was not started yet.
    ///
    /// # Errors
    /// [`MonitorError::AlreadyStarted`]; [`MonitorError::Config`] when the configuration makes no
    /// sense with it, [`MonitorError::Start`] when a file or tap device of it cannot be opened. The configuration
    /// is as before then.
    pub fn configure(&self, id: &VmId, part: &ConfigPart) -> Result<(), MonitorError> {
        let vm = self.find(id)?;
        vm.configure(part)?;
        note_huge_pages(&vm.config());
        Ok(())
    }

    /// Changes the limits of a network interface of a VM that runs.
    ///
    /// # Errors
    /// [`MonitorError::NotRunning`], [`MonitorError::NoInterface`], [`MonitorError::Config`] for a
    /// limit that makes no sense.
    pub fn limit_network(&self, id: &VmId, patch: &NetworkPatch) -> Result<(), MonitorError> {
        self.find(id)?.limit_network(patch)
    }

    /// What a VM's vsock device counts; it stays at zero where there is none.
    ///
    /// # Errors
    /// [`MonitorError::NotFound`].
    pub fn vsock_counts(&self, id: &VmId) -> Result<Arc<VsockCounts>, MonitorError> {
        Ok(self.find(id)?.vsock_counts())
    }

    /// Loads a VM's kernel and runs it. On failure the VM stays not started and nothing is left.
    ///
    /// # Errors
    /// [`MonitorError::AlreadyStarted`], [`MonitorError::NoRoom`] or [`MonitorError::Start`].
    pub fn start(&self, id: &VmId) -> Result<(), MonitorError> {
        let vm = self.find(id)?;
        let _claim = self.claim(&vm)?;
        let started = vm.start(&self.host);
        // Memory that was far off a moment ago may be near now.
        self.watch.ring();
        started
    }

    /// Stands a VM's vCPUs still; returns when they do. Nobody else waits for that: the VM can be
    /// asked, resumed and stopped meanwhile.
    ///
    /// # Errors
    /// [`MonitorError::IllegalStep`], [`MonitorError::Ending`], or [`MonitorError::Superseded`] by an
    /// order that came meanwhile.
    pub fn pause(&self, id: &VmId) -> Result<(), MonitorError> {
        self.find(id)?.pause()
    }

    /// Lets a VM's vCPUs run again.
    ///
    /// # Errors
    /// [`MonitorError::IllegalStep`] or [`MonitorError::Ending`].
    pub fn resume(&self, id: &VmId) -> Result<(), MonitorError> {
        self.find(id)?.resume()
    }

    /// Stops a VM at once; returns when its memory was handed over. A VM that ended by itself
    /// keeps its own reason. A start that is under way is given up: the VM is not started then.
    ///
    /// # Errors
    /// [`MonitorError::NotRunning`] when it was never started, [`MonitorError::Ending`] when a start
    /// is given up and goes on all the same, as one does whose storage does not answer.
    pub fn stop(&self, id: &VmId) -> Result<(), MonitorError> {
        self.find(id)?.stop()
    }

    /// Presses ctrl-alt-del on a VM's keyboard.
    ///
    /// # Errors
    /// [`MonitorError::NoKeyboard`] when the guest does not listen to its keyboard controller,
    /// [`MonitorError::NotRunning`].
    pub fn send_ctrl_alt_del(&self, id: &VmId) -> Result<(), MonitorError> {
        self.find(id)?.press_ctrl_alt_del()
    }

    /// Forgets a VM that does not run. Its console, if somebody still has it, is at its end.
    ///
    /// # Errors
    /// [`MonitorError::StillRunning`].
    pub fn delete(&self, id: &VmId) -> Result<(), MonitorError> {
        let mut vms = self.vms.lock();
        let vm = vms
            .get(id)
            .ok_or_else(|| MonitorError::NotFound(id.clone()))?;
        // Lock order: list of VMs -> cell.
        if !vm.forget() {
            return Err(MonitorError::StillRunning(id.clone()));
        }
        vms.remove(id);
        Ok(())
    }

    /// All VMs, ordered by id.
    pub fn list(&self) -> Vec<VmInfo> {
        let vms: Vec<Arc<Vm>> = self.vms.all();
        vms.iter().map(|vm| vm.info()).collect()
    }

    /// One VM.
    ///
    /// # Errors
    /// [`MonitorError::NotFound`].
    pub fn info(&self, id: &VmId) -> Result<VmInfo, MonitorError> {
        Ok(self.find(id)?.info())
    }

    /// A VM's configuration, as it was given.
    ///
    /// # Errors
    /// [`MonitorError::NotFound`].
    pub fn config(&self, id: &VmId) -> Result<VmConfig, MonitorError> {
        Ok(VmConfig::clone(&*self.find(id)?.config()))
    }

    /// Where kernel KSM merges memory of this monitor's VMs, for [`KsmStats::read`].
    ///
    /// [`KsmStats::read`]: crate::KsmStats::read
    pub fn ksm_places(&self) -> Vec<KsmPlace> {
        let vms = self.vms.all();
        vms.iter().filter_map(|vm| vm.ksm_place()).collect()
    }

    /// The same of one VM; `None` when kernel KSM does not merge it, or it does not run.
    ///
    /// # Errors
    /// [`MonitorError::NotFound`].
    pub fn ksm_place(&self, id: &VmId) -> Result<Option<KsmPlace>, MonitorError> {
        Ok(self.find(id)?.ksm_place())
    }

    /// A VM's counters of the merge engine; zeros when that does not merge it, and when it is not
    /// started or ended.
    ///
    /// # Errors
    /// [`MonitorError::NotFound`].
    pub fn merge_stats(&self, id: &VmId) -> Result<dedup::RegionStats, MonitorError> {
        Ok(self.find(id)?.merge_stats())
    }

    /// Merges a VM's memory now, on the caller's thread, and returns when that is done.
    ///
    /// # Errors
    /// [`MonitorError::NotRunning`], [`MonitorError::NotMerged`] when the VM keeps its memory to
    /// itself, [`MonitorError::MergedByKernel`], [`MonitorError::MergeNow`] when it ends meanwhile
    /// or the engine does not merge.
    pub fn merge_now(&self, id: &VmId) -> Result<dedup::MergedNow, MonitorError> {
        self.find(id)?.merge_now()
    }

    /// A VM's console. It stays readable after the VM was deleted.
    ///
    /// # Errors
    /// [`MonitorError::NotFound`].
    pub fn console(&self, id: &VmId) -> Result<Console, MonitorError> {
        Ok(self.find(id)?.console().clone())
    }

    /// Waits for a VM's end; `None` when it has not ended by `deadline` or there is no such VM.
    pub fn wait_ended(&self, id: &VmId, deadline: Instant) -> Option<EndReason> {
        self.find(id).ok()?.wait_ended(deadline)
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        drop(self.guard.take());
        let vms = std::mem::take(&mut *self.vms.lock());
        // All first, so that they go at the same time; then one after the other.
        vms.values().for_each(|vm| vm.end(EndReason::Stopped));
        for (id, vm) in vms {
            if vm.state().is_alive()
                && let Err(error) = vm.stop()
            {
                log::error!("vm {id}: {error}");
            }
        }
        // The records above held the other senders.
        drop(self.to_reaper.take());
        if let Some(reaper) = self.reaper.take() {
            reaper.join();
        }
    }
}
