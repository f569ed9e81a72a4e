//! The record of one VM: its configuration, its state, and its machine while it has one.
//!
//! Every change of state goes through [`Vm`]'s one lock, judged by [`VmState::after`]. Who finds
//! the VM's end (a vCPU thread, a device, the API) takes the machine out of the record, so that it
//! is taken exactly once, and sends it to the reaper; `Ended` is published when the reaper is done.

mod balloon;
mod ending;
mod guarded;

use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};

use dedup::{MergedNow, RegionStats};

use crate::config::{ConfigError, ConfigPart, MergeMode, NetworkPatch, VmConfig};
use crate::console::Console;
use crate::device::report::ReportPort;
use crate::error::MonitorError;
use crate::guard::room::VmAllowance;
use crate::id::VmId;
use crate::info::VmInfo;
use crate::ksm::KsmPlace;
use crate::machine::{Host, Machine, Outside};
use crate::start;
use crate::state::{EndReason, Step, VmState};
use crate::virtio::{BalloonCounts, VsockCounts};

/// A machine whose VM is over, on its way to the reaper.
pub(crate) struct Corpse {
    pub(crate) vm: Arc<Vm>,
    pub(crate) machine: Machine,
    pub(crate) reason: EndReason,
}

/// One VM of a monitor.
pub(crate) struct Vm {
    id: VmId,
    /// Replaced as a whole. After the start its limits alone change.
    config: Mutex<Arc<VmConfig>>,
    console: Console,
    report: Arc<ReportPort>,
    balloon_counts: Arc<BalloonCounts>,
    vsock_counts: Arc<VsockCounts>,
    reaper: Sender<Corpse>,
    cell: Mutex<Cell>,
    changed: Condvar,
}

struct Cell {
    /// What the outside sees.
    state: VmState,
    /// There exactly while `state` is alive and the end was not found yet.
    machine: Option<Machine>,
    /// A start is under way, with this leave to take memory; the record is `NotStarted` until it
    /// succeeded.
    starting: Option<Arc<VmAllowance>>,
    /// Guards that stand the VM still, a machine that it gets meanwhile included.
    holders: u32,
    /// Pauses and resumes that were asked for: a pause that waits sees whether it is the last.
    orders: u64,
    /// The monitor forgot it: a request that found it before comes too late to start it.
    is_forgotten: bool,
}

impl Vm {
    /// A VM that was never started.
    pub(crate) fn new(id: VmId, config: VmConfig, reaper: Sender<Corpse>) -> Vm {
        let cell = Cell {
            state: VmState::NotStarted,
            machine: None,
            starting: None,
            holders: 0,
            orders: 0,
            is_forgotten: false,
        };
        Vm {
            id,
            config: Mutex::new(Arc::new(config)),
            console: Console::new(),
            report: Arc::default(),
            balloon_counts: Arc::default(),
            vsock_counts: Arc::default(),
            reaper,
            cell: Mutex::new(cell),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Cell> {
        // Every change of the cell is one assignment: a panic leaves none half done.
        self.cell.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn id(&self) -> &VmId {
        &self.id
    }

    pub(crate) fn config(&self) -> Arc<VmConfig> {
        self.lock_config().clone()
    }

    fn lock_config(&self) -> MutexGuard<'_, Arc<VmConfig>> {
        // Replaced by one assignment: whole after any panic.
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets a part of the configuration of a VM that was not started, if the whole is valid then.
    pub(crate) fn configure(&self, part: &ConfigPart) -> Result<(), MonitorError> {
        let id = || self.id.clone();
        part.validate()
            .map_err(|error| MonitorError::Config { id: id(), error })?;
        // Without the lock: the host may take its time.
        start::check_part(part).map_err(|error| MonitorError::Start { id: id(), error })?;
        let cell = self.lock();
        if cell.is_forgotten {
            return Err(MonitorError::NotFound(id()));
        }
        if cell.state != VmState::NotStarted || cell.starting.is_some() {
            let state = cell.state.clone();
            return Err(MonitorError::AlreadyStarted { id: id(), state });
        }
        // Lock order: cell -> configuration.
        let mut current = self.lock_config();
        let mut config = VmConfig::clone(&current);
        config.set(part);
        config
            .validate()
            .map_err(|error| MonitorError::Config { id: id(), error })?;
        *current = Arc::new(config);
        Ok(())
    }

    pub(crate) fn console(&self) -> &Console {
        &self.console
    }

    pub(crate) fn state(&self) -> VmState {
        self.lock().state.clone()
    }

    pub(crate) fn vsock_counts(&self) -> Arc<VsockCounts> {
        self.vsock_counts.clone()
    }

    /// Changes the limits of a network interface of a VM that runs.
    pub(crate) fn limit_network(&self, patch: &NetworkPatch) -> Result<(), MonitorError> {
        let id = || self.id.clone();
        patch
            .validate()
            .map_err(|error| MonitorError::Config { id: id(), error })?;
        let cell = self.lock();
        let Some(machine) = cell.machine.as_ref() else {
            let state = cell.state.clone();
            return Err(MonitorError::NotRunning { id: id(), state });
        };
        if !machine.limit_network(patch) {
            let iface_id = patch.iface_id.clone();
            return Err(MonitorError::NoInterface { id: id(), iface_id });
        }
        // Lock order: cell -> configuration.
        let mut current = self.lock_config();
        let mut config = VmConfig::clone(&current);
        let mut interfaces = config.network_interfaces.iter_mut();
        if let Some(interface) = interfaces.find(|known| known.iface_id == patch.iface_id) {
            interface.update(patch);
        }
        *current = Arc::new(config);
        Ok(())
    }

    pub(crate) fn info(&self) -> VmInfo {
        let config = self.config();
        VmInfo {
            id: self.id.clone(),
            state: self.state(),
            merge_domain: config.samepage.merge_domain.clone(),
            merge: config.samepage.merge,
            mem_size_bytes: config.mem_size_bytes(),
            vcpu_count: config.machine_config.vcpu_count,
            oom_priority: config.samepage.oom_priority,
            report: self.report.report(),
        }
    }

    pub(crate) fn merge_stats(&self) -> RegionStats {
        self.lock()
            .machine
            .as_ref()
            .map(Machine::merge_stats)
            .unwrap_or_default()
    }

    /// Where kernel KSM merges its memory; `None` when that does not, or it does not run.
    pub(crate) fn ksm_place(&self) -> Option<KsmPlace> {
        let addresses = self.lock().machine.as_ref()?.mergeable()?;
        Some(KsmPlace::new(self.id.clone(), addresses))
    }

    /// Merges its memory now, on the caller's thread.
    pub(crate) fn merge_now(&self) -> Result<MergedNow, MonitorError> {
        let merger = {
            let cell = self.lock();
            let Some(machine) = cell.machine.as_ref() else {
                let (id, state) = (self.id.clone(), cell.state.clone());
                return Err(MonitorError::NotRunning { id, state });
            };
            machine.merger()
        };
        let id = self.id.clone();
        // Without the lock: it takes as long as reading all of the memory.
        let merged = merger.map(|merger| merger.merge_now());
        merged
            .ok_or_else(|| match self.config().samepage.merge {
                MergeMode::Ksm => MonitorError::MergedByKernel(id.clone()),
                MergeMode::On | MergeMode::Off => MonitorError::NotMerged(id.clone()),
            })?
            .map_err(|error| MonitorError::MergeNow { id, error })
    }

    /// Assembles the machine and lets it run. On failure the VM is as before.
    pub(crate) fn start(self: &Arc<Vm>, host: &Host) -> Result<(), MonitorError> {
        let page_bytes = self.config().page_bytes();
        let allowance = Arc::new(VmAllowance::new(&host.watch, page_bytes));
        let running = self.begin_start(&allowance)?;
        // Without the lock: loading a kernel takes a while, and `list` should not wait for it.
        let _starting = Starting(self);
        // Nothing of it but limits changes from here on: the start is under way.
        let config = self.config();
        let outside = Outside {
            id: self.id.clone(),
            console: self.console.clone(),
            report: self.report.clone(),
            allowance: allowance.clone(),
            closings: Arc::default(),
            balloon_counts: self.balloon_counts.clone(),
            vsock_counts: self.vsock_counts.clone(),
            on_end: self.on_end(),
        };
        let failed = |error| MonitorError::Start {
            id: self.id.clone(),
            error,
        };
        if config.boot_source.is_absent() {
            return Err(failed(ConfigError::NoBootSource.into()));
        }
        let machine = Machine::assemble(host, &config, &outside).map_err(failed)?;
        let mut cell = self.lock();
        if let Some(why) = allowance.over() {
            drop(cell);
            machine.tear_down(&self.id);
            return Err(failed(why.into()));
        }
        // With the machine it is to be ended by that, and no more by giving up its start.
        cell.starting = None;
        // Lock order: cell -> gate.
        machine.set_held(cell.holders > 0);
        // A vCPU that ends at once waits for this lock, and then finds the machine.
        machine.run();
        cell.machine = Some(machine);
        cell.state = running;
        drop(cell);
        allowance.settle();
        Ok(())
    }

    /// Marks a start as under way. Returns the state after it.
    fn begin_start(&self, allowance: &Arc<VmAllowance>) -> Result<VmState, MonitorError> {
        let mut cell = self.lock();
        if cell.is_forgotten {
            return Err(MonitorError::NotFound(self.id.clone()));
        }
        let running = cell.state.after(Step::Start);
        let running = running
            .ok()
            .filter(|_| cell.starting.is_none())
            .ok_or_else(|| MonitorError::AlreadyStarted {
                id: self.id.clone(),
                state: cell.state.clone(),
            })?;
        cell.starting = Some(allowance.clone());
        Ok(running)
    }

    /// What vCPU threads and devices call. Weak: a VM must not keep itself alive by its threads.
    fn on_end(self: &Arc<Vm>) -> Arc<dyn Fn(EndReason) + Send + Sync> {
        let weak: Weak<Vm> = Arc::downgrade(self);
        Arc::new(move |reason| {
            if let Some(vm) = weak.upgrade() {
                vm.end(reason);
            }
        })
    }

    /// Stands the vCPUs still; returns when they do.
    ///
    /// Without the lock meanwhile: a vCPU may be in the kernel for long, and whoever
    /// asks for the VM's state, or ends it, must not wait for that too.
    pub(crate) fn pause(&self) -> Result<(), MonitorError> {
        let (stillness, order) = {
            let mut cell = self.lock();
            self.step(&cell, Step::Pause)?;
            // Lock order: cell -> gate.
            let stillness = self.machine_of(&cell)?.pause();
            cell.orders += 1;
            (stillness, cell.orders)
        };
        stillness.wait();
        let mut cell = self.lock();
        if cell.orders != order {
            return Err(MonitorError::Superseded(self.id.clone()));
        }
        let paused = self.step(&cell, Step::Pause)?;
        self.machine_of(&cell)?;
        cell.state = paused;
        Ok(())
    }

    /// Lets the vCPUs run again, also those that are still on their way to stand still.
    pub(crate) fn resume(&self) -> Result<(), MonitorError> {
        let mut cell = self.lock();
        let next = self.step(&cell, Step::Resume)?;
        // Lock order: cell -> gate.
        self.machine_of(&cell)?.run();
        cell.orders += 1;
        cell.state = next;
        Ok(())
    }

    fn step(&self, cell: &Cell, step: Step) -> Result<VmState, MonitorError> {
        let next = cell.state.after(step);
        next.map_err(|step| MonitorError::IllegalStep {
            id: self.id.clone(),
            step,
        })
    }

    fn machine_of<'a>(&self, cell: &'a Cell) -> Result<&'a Machine, MonitorError> {
        let machine = cell.machine.as_ref();
        machine.ok_or_else(|| MonitorError::Ending(self.id.clone()))
    }

    /// Presses ctrl-alt-del.
    pub(crate) fn press_ctrl_alt_del(&self) -> Result<(), MonitorError> {
        let cell = self.lock();
        let Some(machine) = cell.machine.as_ref() else {
            let (id, state) = (self.id.clone(), cell.state.clone());
            return Err(MonitorError::NotRunning { id, state });
        };
        machine
            .press_ctrl_alt_del()
            .map_err(|_| MonitorError::NoKeyboard(self.id.clone()))
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // A monitor that goes has VMs that were never started, too.
        self.console.end();
    }
}

/// A start under way; over when dropped, however it went.
struct Starting<'a>(&'a Arc<Vm>);

impl Drop for Starting<'_> {
    fn drop(&mut self) {
        let allowance = self.0.lock().starting.take();
        self.0.changed.notify_all();
        if let Some(allowance) = allowance {
            allowance.settle();
        }
    }
}

impl std::fmt::Debug for Vm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vm")
            .field("id", &self.id)
            .field("state", &self.state())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::console::ConsoleRead;
    use crate::events::EventLoop;
    use crate::guard::Watch;
    use crate::virtio::Discards;

    const LONG: Duration = Duration::from_secs(120);

    fn never_started() -> Arc<Vm> {
        let config = VmConfig::new("builtin:pageload");
        let (reaper, _) = mpsc::channel();
        Arc::new(Vm::new("a".parse().unwrap(), config, reaper))
    }

    #[test]
    fn readers_and_waiters_of_a_vm_that_was_never_started_are_told_when_it_is_forgotten() {
        let vm = never_started();
        let mut reader = vm.console().subscribe();
        let waiting = vm.clone();
        let waiter = std::thread::spawn(move || waiting.wait_ended(Instant::now() + 2 * LONG));
        assert!(vm.forget());
        assert_eq!(reader.read(LONG), ConsoleRead::Ended);
        let deadline = Instant::now() + LONG;
        assert_eq!(waiter.join().unwrap(), None);
        assert!(Instant::now() < deadline);
    }

    #[test]
    fn a_start_that_found_the_vm_before_it_was_forgotten_comes_too_late() {
        if std::env::var("SAMEPAGE_SKIP_KVM").is_ok_and(|value| value == "1") {
            return;
        }
        let (kvm, supported_cpuid) =
            Host::open_kvm().expect("this test needs /dev/kvm; SAMEPAGE_SKIP_KVM=1 skips it");
        let events = EventLoop::new().unwrap();
        let engine = Arc::new(dedup::Engine::new(&dedup::Settings::default()).unwrap());
        let host = Host {
            kvm,
            supported_cpuid,
            watch: Watch::new(engine.clone(), Arc::default()).unwrap(),
            engine,
            events: events.remote(),
            discards: Discards::at_once(),
        };
        let vm = never_started();
        assert!(vm.forget());
        let late = vm.start(&host).unwrap_err();
        assert!(matches!(late, MonitorError::NotFound(_)), "{late}");
        assert_eq!(vm.state(), VmState::NotStarted);
    }

    #[test]
    fn readers_of_a_vm_that_was_never_started_are_told_when_its_monitor_goes() {
        let vm = never_started();
        let mut reader = vm.console().subscribe();
        drop(vm);
        assert_eq!(reader.read(LONG), ConsoleRead::Ended);
    }

    #[test]
    fn a_vm_whose_start_panicked_can_be_forgotten_and_its_readers_are_told() {
        let vm = never_started();
        let mut reader = vm.console().subscribe();
        let starting = vm.clone();
        let start = std::thread::spawn(move || {
            let engine = dedup::Engine::new(&dedup::Settings::default()).unwrap();
            let watch = Watch::new(Arc::new(engine), Arc::default()).unwrap();
            starting.lock().starting = Some(Arc::new(VmAllowance::new(&watch, 4096)));
            let _starting = Starting(&starting);
            panic!("as this test wants it");
        });
        start.join().unwrap_err();
        assert!(vm.forget());
        assert_eq!(reader.read(LONG), ConsoleRead::Ended);
    }
}
