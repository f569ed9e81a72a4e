//! vCPUs: their set-up and the threads that run them.
//!
//! One thread per vCPU. It spends its time in KVM_RUN, where a halted guest CPU sleeps in the
//! kernel, or at the [`Gate`], where a paused one does: there is no loop that polls. To get a vCPU
//! out of the guest, another thread sets the gate's order, then the `immediate_exit` flag (for a
//! vCPU that is about to enter), then sends a signal (for one that is inside).

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;

use kvm_bindings::CpuId;
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler, unblock_signal};

use super::KvmError;
use super::cpuid::{Topology, for_vcpu};
use super::exit::{Next, Platform, run_once};
use super::gate::{Gate, Order, Pass};
use super::registers;
use super::run_page::Kick;
use crate::panics;
use crate::state::EndReason;

/// Called once by the vCPU thread that found the VM's end. Must not wait for vCPU threads.
pub(crate) type OnEnd = Arc<dyn Fn(EndReason) + Send + Sync>;

/// Errors of starting vCPU threads.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VcpuError {
    /// KVM refused something.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The signal that stops vCPUs cannot be handled.
    #[error("cannot handle signal {signal}: {error}")]
    Signal {
        /// Its number.
        signal: i32,
        /// The host's answer.
        #[source]
        error: vmm_sys_util::errno::Error,
    },
    /// The thread could not be started.
    #[error("cannot start the thread of vcpu {index}: {error}")]
    Spawn {
        /// The vCPU.
        index: u8,
        /// The host's answer.
        #[source]
        error: std::io::Error,
    },
}

/// Creates and sets up all vCPUs; the first starts at `entry`, the others wait for the guest's
/// start-up interrupt.
pub(crate) fn create(
    vm: &VmFd,
    supported: &CpuId,
    topology: Topology,
    entry: u64,
) -> Result<Vec<VcpuFd>, KvmError> {
    let mut vcpus = Vec::new();
    for index in 0..topology.vcpus {
        let vcpu = vm
            .create_vcpu(u64::from(index))
            .map_err(KvmError::of("KVM_CREATE_VCPU"))?;
        let cpuid = for_vcpu(supported, index, topology);
        vcpu.set_cpuid2(&cpuid)
            .map_err(KvmError::of("KVM_SET_CPUID2"))?;
        registers::set_msrs(&vcpu)?;
        registers::set_fpu(&vcpu)?;
        registers::set_lint(&vcpu)?;
        if index == 0 {
            registers::set_sregs(&vcpu)?;
            registers::set_regs(&vcpu, entry)?;
        }
        vcpus.push(vcpu);
    }
    Ok(vcpus)
}

/// The frequency of the vCPUs' time-stamp counter in kHz; `None` where KVM does not know it, as on
/// a host whose counter is not stable.
pub(crate) fn tsc_khz(vcpus: &[VcpuFd]) -> Option<u32> {
    let tsc_khz = vcpus.first()?.get_tsc_khz();
    tsc_khz.ok().filter(|&tsc_khz| tsc_khz > 0)
}

/// Waits for the vCPUs of a VM without what keeps the VM: that may end meanwhile.
#[derive(Debug)]
pub(crate) struct Stillness(Arc<Gate>);

impl Stillness {
    /// Waits until all vCPUs stand still or have left, or are told something else than to pause.
    pub(crate) fn wait(self) {
        self.0.wait_still();
    }
}

/// The vCPU threads of one VM. They stand still until [`VcpuThreads::set`] says otherwise.
#[derive(Debug)]
pub(crate) struct VcpuThreads {
    gate: Arc<Gate>,
    threads: Vec<(JoinHandle<()>, Arc<Kick>)>,
}

impl VcpuThreads {
    /// Starts one thread for each of `vcpus`, named after `name`.
    pub(crate) fn spawn(
        vcpus: Vec<VcpuFd>,
        name: &str,
        platform: &Arc<Platform>,
        on_end: &OnEnd,
    ) -> Result<VcpuThreads, VcpuError> {
        handle_kick_signal()?;
        let gate = Arc::new(Gate::new(vcpus.len()));
        let mut threads = VcpuThreads {
            gate: gate.clone(),
            threads: Vec::new(),
        };
        for (index, vcpu) in (0..).zip(vcpus) {
            let kick = Arc::new(Kick::default());
            let (gate, platform, on_end) = (gate.clone(), platform.clone(), on_end.clone());
            let kicked = kick.clone();
            // On failure the threads started so far are told to leave and joined by `Drop`.
            let thread = std::thread::Builder::new()
                .name(format!("v{index}:{name}"))
                .spawn(move || thread_main(vcpu, &gate, &kicked, &platform, &on_end))
                .map_err(|error| VcpuError::Spawn { index, error })?;
            threads.threads.push((thread, kick));
        }
        Ok(threads)
    }

    /// Tells all vCPUs what to do and gets them out of the guest to see it. Does not wait.
    pub(crate) fn set(&self, order: Order) {
        self.gate.set(order);
        if order != Order::Run {
            self.kick();
        }
    }

    /// Stands all vCPUs still until it is taken back, whatever they are told. Does not wait.
    pub(crate) fn set_held(&self, held: bool) {
        self.gate.set_held(held);
        if held {
            self.kick();
        }
    }

    fn kick(&self) {
        for (thread, kick) in &self.threads {
            kick.request();
            // A thread that is over already needs no signal.
            if let Err(error) = thread.kill(SIGRTMIN()) {
                log::debug!("no signal to vcpu thread: {error}");
            }
        }
    }

    /// What waits until all vCPUs stand still, after `set(Order::Pause)`.
    pub(crate) fn stillness(&self) -> Stillness {
        Stillness(self.gate.clone())
    }

    /// Waits until all threads are over, after `set(Order::Exit)`.
    fn join(&mut self) {
        for (thread, _) in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("a vcpu thread panicked outside of its guard");
            }
        }
    }
}

impl Drop for VcpuThreads {
    fn drop(&mut self) {
        self.set(Order::Exit);
        self.join();
    }
}

/// The signal's only purpose is to interrupt KVM_RUN, so its handler does nothing.
fn handle_kick_signal() -> Result<(), VcpuError> {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    let signal = SIGRTMIN();
    register_signal_handler(signal, nothing).map_err(|error| VcpuError::Signal { signal, error })
}

fn thread_main(vcpu: VcpuFd, gate: &Gate, kick: &Arc<Kick>, platform: &Platform, on_end: &OnEnd) {
    // The mask is inherited from whoever started the VM.
    if let Err(error) = unblock_signal(SIGRTMIN()) {
        log::error!("vcpu thread: cannot unblock the signal that stops it: {error}");
    }
    // A panic (of a device, most likely) ends this VM and no other.
    let ended = catch_unwind(AssertUnwindSafe(|| run(vcpu, gate, kick, platform)));
    gate.leave();
    match ended {
        Ok(None) => {}
        Ok(Some(reason)) => on_end(reason),
        Err(payload) => {
            let text = panics::text(&*payload);
            on_end(EndReason::Error(format!("vcpu thread panicked: {text}")));
        }
    }
}

/// Runs the guest until its end (a reason) or until the gate says so (`None`).
fn run(mut vcpu: VcpuFd, gate: &Gate, kick: &Arc<Kick>, platform: &Platform) -> Option<EndReason> {
    // Declared after, hence dropped before the vCPU.
    let armed = kick.arm(&mut vcpu);
    loop {
        // Named after the thread, `v0:ID`, so that a test can choose whose panics.
        #[cfg(feature = "failpoints")]
        fail::fail_point!(std::thread::current().name().unwrap_or_default());
        match gate.pass() {
            Pass::Run => {}
            // Spares the guest a false alarm of its lockup detector. Guests without kvm-clock do
            // not need it and make it fail.
            Pass::RunAfterPause => drop(vcpu.kvmclock_ctrl()),
            Pass::Leave => return None,
        }
        match run_once(&mut vcpu, platform) {
            Next::Enter => {}
            // Before the gate is looked at: a request that comes later is then not lost.
            Next::Look => armed.clear(),
            Next::Sleep(time) => gate.hold(time),
            Next::End(reason) => return Some(reason),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::tables;
    use crate::bus::{MmioBus, MmioDevice};
    use crate::console::Console;
    use crate::device::irq::IrqLine;
    use crate::device::{Ports, cmos::Cmos, i8042::I8042, serial::SerialPort};
    use crate::machine::Host;
    use crate::memory::ram::{Merger, Ram};
    use std::sync::{Mutex, mpsc};
    use std::time::Duration;
    use vm_memory::{Bytes, GuestAddress};

    struct Broken;

    impl MmioDevice for Broken {
        fn read(&mut self, _offset: u64, _data: &mut [u8]) {
            panic!("device broke");
        }

        fn write(&mut self, _offset: u64, _data: &[u8]) {}
    }

    fn platform_with_broken_device(ram: &Ram) -> Arc<Platform> {
        let mut mmio = MmioBus::new();
        mmio.insert(0xd000_0000, 0x1000, Arc::new(Mutex::new(Broken)))
            .unwrap();
        let ports = Ports {
            serial: SerialPort::new(IrqLine::new().unwrap(), &Console::new()),
            i8042: Mutex::new(I8042::new(IrqLine::new().unwrap())),
            cmos: Mutex::new(Cmos::new(0)),
            report: Arc::default(),
        };
        Arc::new(Platform {
            ports,
            mmio,
            memory: ram.memory().clone(),
        })
    }

    #[test]
    fn a_panic_in_a_vcpu_thread_ends_the_vm_with_its_text() {
        if std::env::var("SAMEPAGE_SKIP_KVM").is_ok_and(|value| value == "1") {
            return;
        }
        let (kvm, cpuid) =
            Host::open_kvm().expect("this test needs /dev/kvm; SAMEPAGE_SKIP_KVM=1 skips it");
        let ram = Ram::new(2 << 20, Merger::Nobody).unwrap();
        tables::write_page_tables(ram.memory()).unwrap();
        tables::write_gdt(ram.memory()).unwrap();
        // mov $0xd0000000, %edi; mov (%rdi), %eax
        let code = [0xbf, 0x00, 0x00, 0x00, 0xd0, 0x8b, 0x07];
        ram.memory()
            .write_slice(&code, GuestAddress(0x10_0000))
            .unwrap();
        let vm = super::super::vm::create(&kvm, ram.memory(), false).unwrap();
        let topology = Topology {
            vcpus: 2,
            smt: false,
        };
        let vcpus = create(&vm, &cpuid, topology, 0x10_0000).unwrap();
        let platform = platform_with_broken_device(&ram);
        let (ended, reasons) = mpsc::channel();
        let on_end: OnEnd = Arc::new(move |reason| ended.send(reason).unwrap());
        let threads = VcpuThreads::spawn(vcpus, "test", &platform, &on_end).unwrap();
        threads.set(Order::Run);
        match reasons.recv_timeout(Duration::from_secs(120)) {
            Ok(EndReason::Error(text)) => assert!(text.contains("device broke"), "{text}"),
            other => panic!("{other:?}"),
        }
        drop((threads, platform, vm));
        ram.release().unwrap();
    }
}
