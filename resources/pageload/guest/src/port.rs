//! Port reads and writes, from user mode.
//!
//! The I/O privilege level allows them. A hypervisor that honours no such level for its guests raises
//! a protection fault, and then `boot.s` does it. (A software interrupt would be the plain way,
//! but some hypervisors without hardware support cannot deliver one.)

use core::arch::asm;

use pageload_workload::port::{PVPANIC, SLEEP_US};

/// Writes 32 bits to a port.
pub(crate) fn out_32(port: u16, value: u32) {
    // SAFETY:
    // 1. The monitor's devices at these ports do not touch guest memory.
    // 2. A fault leaves all registers as they are, and is handled on a stack of its own.
    unsafe {
        asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack, preserves_flags));
    }
}

/// Writes 8 bits to a port.
pub(crate) fn out_8(port: u16, value: u8) {
    // SAFETY: as in `out_32`.
    unsafe {
        asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags));
    }
}

/// Reads 8 bits from a port.
pub(crate) fn in_8(port: u16) -> u8 {
    let value: u8;
    // SAFETY: as in `out_32`; AL is the only register that changes.
    unsafe {
        asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags));
    }
    value
}

/// Reads 32 bits from a port.
pub(crate) fn in_32(port: u16) -> u32 {
    let value: u32;
    // SAFETY: as in `out_32`; EAX is the only register that changes.
    unsafe {
        asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack, preserves_flags));
    }
    value
}

/// Asks the monitor to hold this vCPU. One that does not know the port goes on at once.
pub(crate) fn sleep_us(us: u32) {
    out_32(SLEEP_US, us);
}

/// Tells the monitor that the guest is over.
pub(crate) fn end(pvpanic_value: u8) -> ! {
    out_8(PVPANIC, pvpanic_value);
    loop {
        sleep_us(1_000_000);
    }
}
