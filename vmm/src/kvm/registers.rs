//! Registers of a vCPU at its start: 64-bit mode, paging on, at the kernel's entry point.

use kvm_bindings::{
    Msrs, kvm_fpu, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs,
};
use kvm_ioctls::VcpuFd;

use super::KvmError;
use crate::boot::tables::{CODE_SELECTOR, DATA_SELECTOR, GDT_LIMIT};
use crate::memory::layout::{
    BOOT_STACK_POINTER, GDT_ADDRESS, IDT_ADDRESS, PAGE_TABLES_ADDRESS, ZERO_PAGE_ADDRESS,
};

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_NW: u64 = 1 << 29;
const CR0_CD: u64 = 1 << 30;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 is always set.
const RFLAGS_RESERVED: u64 = 1 << 1;

/// General registers at `entry`, by the 64-bit boot protocol of Linux: RSI is the zero page.
pub(crate) fn set_regs(vcpu: &VcpuFd, entry: u64) -> Result<(), KvmError> {
    let regs = kvm_regs {
        rip: entry,
        rsi: ZERO_PAGE_ADDRESS,
        rsp: BOOT_STACK_POINTER,
        rbp: BOOT_STACK_POINTER,
        rflags: RFLAGS_RESERVED,
        ..kvm_regs::default()
    };
    vcpu.set_regs(&regs).map_err(KvmError::of("KVM_SET_REGS"))
}

/// Segments, control registers and page tables for 64-bit mode.
pub(crate) fn set_sregs(vcpu: &VcpuFd) -> Result<(), KvmError> {
    let mut sregs = vcpu.get_sregs().map_err(KvmError::of("KVM_GET_SREGS"))?;
    enter_long_mode(&mut sregs);
    vcpu.set_sregs(&sregs)
        .map_err(KvmError::of("KVM_SET_SREGS"))
}

fn enter_long_mode(sregs: &mut kvm_sregs) {
    const TYPE_CODE: u8 = 0xb;
    const TYPE_DATA: u8 = 0x3;
    const TYPE_TSS_BUSY: u8 = 0xb;
    let flat = |selector, type_, is_code: bool| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!is_code),
        s: 1,
        l: u8::from(is_code),
        g: 1,
        ..kvm_segment::default()
    };
    sregs.cs = flat(CODE_SELECTOR, TYPE_CODE, true);
    let data = flat(DATA_SELECTOR, TYPE_DATA, false);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    // The CPU insists on a busy TSS; nothing is ever read from it before the guest loads its own.
    sregs.tr = kvm_segment {
        limit: 0x67,
        type_: TYPE_TSS_BUSY,
        present: 1,
        ..kvm_segment::default()
    };
    sregs.gdt.base = GDT_ADDRESS;
    sregs.gdt.limit = GDT_LIMIT;
    sregs.idt.base = IDT_ADDRESS;
    sregs.idt.limit = 7;
    sregs.cr3 = PAGE_TABLES_ADDRESS;
    sregs.cr4 |= CR4_PAE;
    // Caches on: a reset leaves them off, firmware does not.
    sregs.cr0 &= !(CR0_NW | CR0_CD);
    sregs.cr0 |= CR0_PE | CR0_ET | CR0_PG;
    sregs.efer |= EFER_LME | EFER_LMA;
}

/// x87 and SSE control words as after FNINIT.
pub(crate) fn set_fpu(vcpu: &VcpuFd) -> Result<(), KvmError> {
    let fpu = kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..kvm_fpu::default()
    };
    vcpu.set_fpu(&fpu).map_err(KvmError::of("KVM_SET_FPU"))
}

/// Model-specific registers whose reset value is not what firmware would leave.
pub(crate) fn set_msrs(vcpu: &VcpuFd) -> Result<(), KvmError> {
    const IA32_MISC_ENABLE: u32 = 0x1a0;
    const FAST_STRING: u64 = 1;
    const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
    const MTRR_ENABLE_WRITE_BACK: u64 = 1 << 11 | 6;
    for (index, data) in [
        (IA32_MISC_ENABLE, FAST_STRING),
        (IA32_MTRR_DEF_TYPE, MTRR_ENABLE_WRITE_BACK),
    ] {
        let entry = kvm_msr_entry {
            index,
            data,
            ..kvm_msr_entry::default()
        };
        let Ok(msrs) = Msrs::from_entries(&[entry]) else {
            continue;
        };
        let done = vcpu.set_msrs(&msrs).map_err(KvmError::of("KVM_SET_MSRS"))?;
        if done == 0 {
            // Neither is essential and not every KVM has both.
            log::debug!("kvm does not take msr {index:#x}");
        }
    }
    Ok(())
}

/// Connects the PIC and NMIs to the LAPIC, as firmware does and the MP table promises.
pub(crate) fn set_lint(vcpu: &VcpuFd) -> Result<(), KvmError> {
    const LVT_LINT0: usize = 0x350;
    const LVT_LINT1: usize = 0x360;
    const DELIVERY_NMI: u32 = 4 << 8;
    const DELIVERY_EXTINT: u32 = 7 << 8;
    let mut lapic = vcpu.get_lapic().map_err(KvmError::of("KVM_GET_LAPIC"))?;
    set_delivery(&mut lapic, LVT_LINT0, DELIVERY_EXTINT);
    set_delivery(&mut lapic, LVT_LINT1, DELIVERY_NMI);
    vcpu.set_lapic(&lapic)
        .map_err(KvmError::of("KVM_SET_LAPIC"))
}

fn set_delivery(lapic: &mut kvm_lapic_state, register: usize, delivery: u32) {
    const DELIVERY_MASK: u32 = 7 << 8;
    let field = &mut lapic.regs[register..register + 4];
    let mut value = u32::from_le_bytes([0, 1, 2, 3].map(|i| field[i].to_le_bytes()[0]));
    value = value & !DELIVERY_MASK | delivery;
    for (to, from) in field.iter_mut().zip(value.to_le_bytes()) {
        *to = i8::from_le_bytes([from]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn setting_the_delivery_mode_keeps_the_other_bits() {
        let mut lapic = kvm_lapic_state::default();
        lapic.regs[0x350] = i8::from_le_bytes([0xff]);
        lapic.regs[0x352] = 1;
        set_delivery(&mut lapic, 0x350, 7 << 8);
        assert_eq!(lapic.regs[0x350..0x354], [-1, 7, 1, 0]);
    }

    #[test]
    fn the_first_instruction_runs_in_64_bit_mode_with_paging() {
        let mut sregs = kvm_sregs::default();
        enter_long_mode(&mut sregs);
        assert_eq!((sregs.cs.l, sregs.cs.db, sregs.ss.db), (1, 0, 1));
        assert_eq!(sregs.cr0 & (CR0_PE | CR0_PG), CR0_PE | CR0_PG);
        assert_eq!(sregs.efer, EFER_LME | EFER_LMA);
        assert_eq!(sregs.cr3, PAGE_TABLES_ADDRESS);
    }
}
