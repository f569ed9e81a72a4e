//! A VM's running part: memory, KVM, devices, vCPU threads; how it is put together and taken down.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use dedup::{Engine, ProcessMemory, RegionStats};
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Kvm, VmFd};

use crate::admission::GivenUp;
use crate::bus::MmioBus;
use crate::config::{MergeMode, NetworkPatch, VmConfig};
use crate::console::Console;
use crate::device::Ports;
use crate::device::cmos::Cmos;
use crate::device::i8042::{self, I8042, NobodyListens};
use crate::device::irq::IrqLine;
use crate::device::report::ReportPort;
use crate::device::serial::{self, SerialPort};
use crate::drives::Closings;
use crate::events::EventRemote;
use crate::guard::Watch;
use crate::guard::room::VmAllowance;
use crate::id::VmId;
use crate::ksm::{self, Ksm};
use crate::kvm::cpuid::Topology;
use crate::kvm::exit::Platform;
use crate::kvm::gate::Order;
use crate::kvm::vcpu::{self, OnEnd, Stillness, VcpuThreads};
use crate::kvm::{KvmError, vm};
use crate::memory::ram::{Merger, Ram};
use crate::plug::{self, Subscribers};
use crate::start::{self, StartError};
use crate::virtio::{BalloonCounts, BalloonHandle, Discards, VsockCounts};

/// What a machine takes from its monitor.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) kvm: Kvm,
    pub(crate) supported_cpuid: CpuId,
    pub(crate) engine: Arc<Engine>,
    pub(crate) events: EventRemote,
    /// Tells what the domain's VMs may take.
    pub(crate) watch: Arc<Watch>,
    /// Where what guests give back is given up.
    pub(crate) discards: Discards,
}

impl Host {
    /// Opens `/dev/kvm` and asks what its CPUs can do.
    pub(crate) fn open_kvm() -> Result<(Kvm, CpuId), KvmError> {
        let kvm = Kvm::new().map_err(KvmError::of("open /dev/kvm"))?;
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(KvmError::of("KVM_GET_SUPPORTED_CPUID"))?;
        Ok((kvm, supported))
    }
}

/// What a machine shares with its VM's record, which outlives it.
#[derive(Clone)]
pub(crate) struct Outside {
    pub(crate) id: VmId,
    pub(crate) console: Console,
    pub(crate) report: Arc<ReportPort>,
    /// What the start and the devices take memory by.
    pub(crate) allowance: Arc<VmAllowance>,
    /// Its drives, to be waited for when they are closed.
    pub(crate) closings: Arc<Closings>,
    pub(crate) balloon_counts: Arc<BalloonCounts>,
    pub(crate) vsock_counts: Arc<VsockCounts>,
    pub(crate) on_end: OnEnd,
}

/// A running VM.
///
/// Fields are declared in the order of [`Machine::tear_down`], so that dropping one in the middle
/// of its assembly keeps the same order.
#[derive(Debug)]
pub(crate) struct Machine {
    vcpus: VcpuThreads,
    subscribers: Subscribers,
    platform: Arc<Platform>,
    vm: Arc<VmFd>,
    ram: Ram,
    allowance: Arc<VmAllowance>,
    closings: Arc<Closings>,
}

impl Machine {
    /// Maps and fills memory, makes the VM, its devices and its vCPUs, which stand still yet.
    ///
    /// On an error everything made so far is gone again.
    pub(crate) fn assemble(
        host: &Host,
        config: &VmConfig,
        outside: &Outside,
    ) -> Result<Machine, StartError> {
        let merger = match config.samepage.merge {
            MergeMode::On => Merger::Engine(&host.engine),
            MergeMode::Off => Merger::Nobody,
            MergeMode::Ksm => {
                ksm::warn_if_stopped(&Ksm::default(), &outside.id);
                Merger::Kernel
            }
        };
        let huge_pages = config.machine_config.huge_pages;
        let ram = Ram::with_pages(config.mem_size_bytes(), huge_pages, merger)?;
        match assemble_over(host, config, outside, &ram) {
            Ok((vcpus, subscribers, platform, vm)) => {
                ram.log_dirty(&vm);
                Ok(Machine {
                    vcpus,
                    subscribers,
                    platform,
                    vm,
                    ram,
                    allowance: outside.allowance.clone(),
                    closings: outside.closings.clone(),
                })
            }
            Err(error) => {
                if let Err(leak) = ram.release() {
                    log::error!("vm {}: {leak}", outside.id);
                }
                outside.closings.wait(&outside.id);
                Err(error)
            }
        }
    }

    /// Tells the vCPUs to run.
    pub(crate) fn run(&self) {
        self.vcpus.set(Order::Run);
    }

    /// Tells the vCPUs to stand still. Returns what waits until they do.
    pub(crate) fn pause(&self) -> Stillness {
        self.vcpus.set(Order::Pause);
        self.vcpus.stillness()
    }

    /// Stands the vCPUs still until it is taken back, paused or not, without waiting.
    pub(crate) fn set_held(&self, held: bool) {
        self.vcpus.set_held(held);
    }

    /// Memory that nobody shares with it; see [`Ram::private_bytes`].
    pub(crate) fn private_bytes(&self, process: &ProcessMemory) -> std::io::Result<u64> {
        self.ram.private_bytes(process)
    }

    /// Tells the vCPUs to leave and the device queues to take nothing any more, without waiting.
    pub(crate) fn begin_exit(&self) {
        self.allowance.close(GivenUp::Stopped);
        self.subscribers.close();
        self.vcpus.set(Order::Exit);
    }

    /// Presses ctrl-alt-del.
    pub(crate) fn press_ctrl_alt_del(&self) -> Result<(), NobodyListens> {
        let i8042 = &self.platform.ports.i8042;
        i8042
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .press_ctrl_alt_del()
    }

    /// Changes the limits of a network interface. False if there is none of its id.
    pub(crate) fn limit_network(&self, patch: &NetworkPatch) -> bool {
        let limits = self.subscribers.network_limits(&patch.iface_id);
        limits.inspect(|limits| limits.update(patch)).is_some()
    }

    /// Its balloon, if it has one.
    pub(crate) fn balloon(&self) -> Option<&BalloonHandle> {
        self.subscribers.balloon()
    }

    /// Counters of the merge engine.
    pub(crate) fn merge_stats(&self) -> RegionStats {
        self.ram.merge_stats()
    }

    /// Where kernel KSM merges its memory; `None` when that does not.
    pub(crate) fn mergeable(&self) -> Option<Range<usize>> {
        self.ram.mergeable()
    }

    /// What merges its memory on demand; `None` when the engine does not merge it.
    pub(crate) fn merger(&self) -> Option<dedup::RegionAccess> {
        self.ram.merger()
    }

    /// Takes the VM down. Nothing of it is left when this returns, and its memory was handed over.
    ///
    /// The order is ARCHITECTURE.md, section 6, step 0: vCPUs, then device queues, then every view of the memory,
    /// then the memory itself.
    pub(crate) fn tear_down(self, id: &VmId) {
        let Machine {
            vcpus,
            subscribers,
            platform,
            vm,
            ram,
            allowance,
            closings,
        } = self;
        allowance.close(GivenUp::Stopped);
        subscribers.close();
        drop(vcpus);
        drop(subscribers);
        drop(platform);
        drop(vm);
        if let Err(leak) = ram.release() {
            log::error!("vm {id}: {leak}");
        }
        // Last: it may wait, and the memory is what others wait for.
        closings.wait(id);
    }
}

type Assembled = (VcpuThreads, Subscribers, Arc<Platform>, Arc<VmFd>);

fn assemble_over(
    host: &Host,
    config: &VmConfig,
    outside: &Outside,
    ram: &Ram,
) -> Result<Assembled, StartError> {
    let memory = ram.memory();
    let entry = start::load(memory, config, &outside.allowance)?;
    let vm = Arc::new(vm::create(&host.kvm, memory, ram.wants_dirty_log())?);
    let ports = make_ports(&vm, config, outside)?;
    let mut mmio = MmioBus::new();
    let subscribers = plug::attach(host, config, outside, (&vm, ram, &mut mmio))?;
    let platform = Arc::new(Platform {
        ports,
        mmio,
        memory: memory.clone(),
    });
    let machine = &config.machine_config;
    let topology = Topology {
        vcpus: machine.vcpu_count,
        smt: machine.smt,
    };
    let vcpus = vcpu::create(&vm, &host.supported_cpuid, topology, entry)?;
    outside.report.set_tsc_khz(vcpu::tsc_khz(&vcpus));
    let name = outside.id.as_str();
    let vcpus = VcpuThreads::spawn(vcpus, name, &platform, &outside.on_end)?;
    Ok((vcpus, subscribers, platform, vm))
}

fn make_ports(vm: &VmFd, config: &VmConfig, outside: &Outside) -> Result<Ports, StartError> {
    let line = || IrqLine::new().map_err(StartError::EventFd);
    let connect = |line: &IrqLine, gsi| {
        vm.register_irqfd(line.event(), gsi)
            .map_err(KvmError::of("KVM_IRQFD"))
    };
    let serial = SerialPort::new(line()?, &outside.console);
    serial.with_irq(|line| connect(line, serial::IRQ))?;
    let i8042 = I8042::new(line()?);
    connect(i8042.irq(), i8042::IRQ)?;
    Ok(Ports {
        serial,
        i8042: Mutex::new(i8042),
        cmos: Mutex::new(Cmos::new(config.mem_size_bytes())),
        report: outside.report.clone(),
    })
}
