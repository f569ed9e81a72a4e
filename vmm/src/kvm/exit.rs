//! What a vCPU does with the reasons for which KVM leaves the guest.

use std::time::Duration;

use kvm_bindings::{
    KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_vcpu_events,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress};

use super::run_page::{self, InternalError};
use crate::bus::MmioBus;
use crate::device::{Ports, report};
use crate::memory::GuestMemory;
use crate::state::EndReason;

/// What a vCPU thread needs of its VM.
#[derive(Debug)]
pub(crate) struct Platform {
    pub(crate) ports: Ports,
    pub(crate) mmio: MmioBus,
    pub(crate) memory: GuestMemory,
}

/// Longest x86 instruction.
const INSTRUCTION_BYTES_MAX: usize = 15;
/// `int3`.
const OPCODE_INT3: u8 = 0xcc;
/// Vector of #BP.
const VECTOR_BREAKPOINT: u8 = 3;

/// How a run of the guest went on.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Enter the guest again.
    Enter,
    /// A signal: look at what is wanted, then enter again.
    Look,
    /// The guest asked to be held for a while.
    Sleep(Duration),
    /// The VM is over.
    End(EndReason),
}

/// Runs the guest once and serves what it asks for.
pub(crate) fn run_once(vcpu: &mut VcpuFd, platform: &Platform) -> Next {
    let exit = match vcpu.run() {
        Ok(exit) => exit,
        // A kick, or the host was short of something for a moment.
        Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => return Next::Look,
        Err(error) => return Next::End(EndReason::Error(format!("KVM_RUN: {error}"))),
    };
    match exit {
        VcpuExit::IoOut(port, data) => match platform.ports.write(port, data) {
            None => report::sleep_time(port, data).map_or(Next::Enter, Next::Sleep),
            Some(reason) => Next::End(reason),
        },
        VcpuExit::IoIn(port, data) => {
            platform.ports.read(port, data);
            Next::Enter
        }
        VcpuExit::MmioRead(address, data) => {
            platform.mmio.read(address, data);
            Next::Enter
        }
        VcpuExit::MmioWrite(address, data) => {
            platform.mmio.write(address, data);
            Next::Enter
        }
        VcpuExit::Intr => Next::Look,
        VcpuExit::Shutdown => Next::End(EndReason::TripleFault),
        VcpuExit::SystemEvent(kind, _) => Next::End(system_event(kind)),
        VcpuExit::InternalError => internal_error(vcpu, &platform.memory),
        VcpuExit::FailEntry(reason, cpu) => Next::End(EndReason::Error(format!(
            "kvm cannot enter the guest: hardware reason {reason:#x} on cpu {cpu}"
        ))),
        other => {
            let text = format!("unexpected kvm exit {other:?}");
            Next::End(EndReason::Error(text))
        }
    }
}

fn system_event(kind: u32) -> EndReason {
    match kind {
        KVM_SYSTEM_EVENT_SHUTDOWN => EndReason::GuestShutdown,
        KVM_SYSTEM_EVENT_RESET => EndReason::GuestReset,
        KVM_SYSTEM_EVENT_CRASH => EndReason::GuestPanic,
        other => EndReason::Error(format!("unexpected kvm system event {other}")),
    }
}

fn internal_error(vcpu: &mut VcpuFd, memory: &GuestMemory) -> Next {
    match run_page::internal_error(vcpu) {
        InternalError::Other(suberror) => {
            let rip = vcpu.get_regs().map(|regs| regs.rip).unwrap_or_default();
            let text = format!("kvm internal error {suberror} at rip {rip:#x}");
            Next::End(EndReason::Error(text))
        }
        InternalError::Emulation(told) => {
            let rip = match vcpu.get_regs() {
                Ok(regs) => regs.rip,
                Err(error) => return Next::End(EndReason::Error(format!("KVM_GET_REGS: {error}"))),
            };
            let bytes = match told {
                Some(bytes) if !bytes.is_empty() => bytes,
                _ => instruction_at(vcpu, memory, rip),
            };
            if bytes.first() == Some(&OPCODE_INT3) && inject_breakpoint(vcpu).is_ok() {
                return Next::Enter;
            }
            Next::End(EndReason::EmulationFailure { rip, bytes })
        }
    }
}

/// Raises the #BP that the `int3` at RIP would have: KVM's emulator does not know the instruction,
/// though it is plain architecture (Intel SDM volume 2A, INT3: the saved RIP is the next one's).
fn inject_breakpoint(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let mut regs = vcpu.get_regs()?;
    regs.rip = regs.rip.wrapping_add(1);
    let mut events: kvm_vcpu_events = vcpu.get_vcpu_events()?;
    events.exception.injected = 1;
    events.exception.nr = VECTOR_BREAKPOINT;
    events.exception.has_error_code = 0;
    vcpu.set_regs(&regs)?;
    vcpu.set_vcpu_events(&events)
}

/// The bytes at `rip`, as far as the guest's page tables and memory have them.
fn instruction_at(vcpu: &VcpuFd, memory: &GuestMemory, rip: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    // Byte by byte: an instruction may cross into a page that lies elsewhere or nowhere.
    for address in (rip..=u64::MAX).take(INSTRUCTION_BYTES_MAX) {
        let Ok(translation) = vcpu.translate_gva(address) else {
            break;
        };
        if translation.valid == 0 {
            break;
        }
        let Ok(byte) = memory.read_obj(GuestAddress(translation.physical_address)) else {
            break;
        };
        bytes.push(byte);
    }
    bytes
}
