//! The monitor: the VMs of one merge domain.

use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::admission::{Claims, Promise};
use crate::config::VmConfig;
use crate::console::Console;
use crate::error::MonitorError;
use crate::events::EventLoop;
use crate::guard::{Guard, Watch};
use crate::id::{MergeDomain, VmId};
use crate::info::{MemoryInfo, VmInfo};
use crate::machine::Host;
use crate::reaper::Reaper;
use crate::roster::Roster;
use crate::start::{self, StartError};
use crate::state::{EndReason, Step, VmState};
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

impl Monitor {
    /// Opens `/dev/kvm` and starts the threads of the monitor: merge worker, event loop, reaper.
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
        let (reaper, to_reaper) = Reaper::spawn().map_err(host_error("reaper thread"))?;
        let watch = Watch::new(engine.clone(), vms.clone());
        let guard = Guard::spawn(&watch).map_err(host_error("guard thread"))?;
        Ok(Monitor {
            domain,
            vms,
            claims: Mutex::default(),
            overcommit_ratio: Mutex::default(),
            guard: Some(guard),
            watch,
            to_reaper: Some(to_reaper),
            reaper: Some(reaper),
            host: Host {
                kvm,
                supported_cpuid,
                engine,
                events: events.remote(),
            },
            _events: events,
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
    /// [`MonitorError::Start`] (a file).
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
        start::check_files(&config).map_err(|error: StartError| MonitorError::Start {
            id: id.clone(),
            error,
        })?;
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

    /// Claims a VM's memory for its start, against the domain's overcommit ratio.
    fn claim(&self, vm: &Arc<Vm>) -> Result<Claim<'_>, MonitorError> {
        let mut claim = Claim {
            claims: &self.claims,
            id: None,
        };
        // A second start is refused as such.
        if vm.state() != VmState::NotStarted {
            return Ok(claim);
        }
        let promise = self.promise();
        let vms = self.vms.all();
        let started = vms
            .iter()
            .filter_map(|vm| Some((vm.id().clone(), vm.nominal_bytes()?)));
        let wanted_bytes = vm.config().mem_size_bytes();
        let mut claims = self.claims.lock().unwrap_or_else(PoisonError::into_inner);
        let claimed = claims.claim(vm.id(), wanted_bytes, started, promise);
        drop(claims);
        let id = vm.id().clone();
        match claimed {
            Ok(is_ours) => claim.id = is_ours.then_some(id),
            Err(error) => return Err(MonitorError::NoRoom { id, error }),
        }
        Ok(claim)
    }

    fn promise(&self) -> Option<Promise> {
        let budget_bytes = self.host.engine.memory_budget_bytes();
        Some(Promise {
            overcommit_ratio: self.overcommit_ratio()?,
            budget_bytes: self.watch.gauge.limit_bytes(budget_bytes)?,
        })
    }

    /// Changes the memory that the domain may take; `None` for no budget of its own. VMs are ended
    /// if they hold more.
    pub fn set_memory_budget(&self, budget_bytes: Option<u64>) {
        self.host.engine.set_memory_budget(budget_bytes);
        self.watch.ring();
    }

    /// Changes how many times the domain's limit may be promised to VMs; `None` for as often as one
    /// likes. Counts for starts from now on.
    pub fn set_overcommit_ratio(&self, ratio: Option<f64>) {
        *self.ratio() = ratio;
    }

    /// How many times the domain's limit may be promised to VMs.
    pub fn overcommit_ratio(&self) -> Option<f64> {
        *self.ratio()
    }

    fn ratio(&self) -> MutexGuard<'_, Option<f64>> {
        let ratio = self.overcommit_ratio.lock();
        ratio.unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes whether VMs are ended so that an unmerge fits (at first they are not).
    pub fn set_unmerge_victims(&self, allowed: bool) {
        self.watch.set_unmerge_victims(allowed);
    }

    /// The domain's memory: limits, use, and what it could come to.
    pub fn memory(&self) -> MemoryInfo {
        let (watch, engine) = (&self.watch, &self.host.engine);
        let budget_bytes = engine.memory_budget_bytes();
        if watch.gauge.wants_count() {
            watch.count();
        }
        let nearest = watch.gauge.nearest(budget_bytes);
        let use_bytes = match nearest {
            Some((_, filled)) => filled.use_bytes,
            None => watch.gauge.use_bytes(),
        };
        let stats = engine.stats();
        let shared_pages = stats.pages_shared + stats.pages_sharing + stats.pages_zero;
        let vms = self.vms.all();
        MemoryInfo {
            budget_bytes,
            limit_bytes: nearest.map(|(_, filled)| filled.limit_bytes),
            limited_by: nearest.map(|(limit, _)| limit),
            use_bytes,
            headroom_bytes: nearest.map(|(_, filled)| filled.headroom_bytes()),
            worst_case_bytes: use_bytes + shared_pages * dedup::PAGE_SIZE_BYTES as u64,
            pressure_percent: watch.gauge.pressure_percent(),
            nominal_bytes: vms.iter().filter_map(|vm| vm.nominal_bytes()).sum(),
            overcommit_ratio: self.overcommit_ratio(),
            unmerge_victims: watch.unmerge_victims(),
            oom_victims: watch.victims(),
        }
    }

    /// Stands a VM's vCPUs still; returns when they do.
    ///
    /// # Errors
    /// [`MonitorError::IllegalStep`] or [`MonitorError::Ending`].
    pub fn pause(&self, id: &VmId) -> Result<(), MonitorError> {
        self.find(id)?.pause_or_resume(Step::Pause)
    }

    /// Lets a VM's vCPUs run again.
    ///
    /// # Errors
    /// [`MonitorError::IllegalStep`] or [`MonitorError::Ending`].
    pub fn resume(&self, id: &VmId) -> Result<(), MonitorError> {
        self.find(id)?.pause_or_resume(Step::Resume)
    }

    /// Stops a VM at once; returns when its memory was handed over. A VM that ended by itself
    /// keeps its own reason.
    ///
    /// # Errors
    /// [`MonitorError::NotRunning`] when it was never started.
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
        Ok(self.find(id)?.config().clone())
    }

    /// A VM's merge counters; zeros when it is not merged, not started or ended.
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
    /// itself, [`MonitorError::MergeNow`] when it ends meanwhile or the engine does not merge.
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

/// A start under way; settled when dropped, however it went.
struct Claim<'a> {
    claims: &'a Mutex<Claims>,
    id: Option<VmId>,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        if let Some(id) = &self.id {
            let mut claims = self.claims.lock().unwrap_or_else(PoisonError::into_inner);
            claims.settle(id);
        }
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
