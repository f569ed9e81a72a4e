//! The counters shown to the monitor.

use pageload_workload::port::{Phase, REPORT_HIGH, REPORT_INDEX, REPORT_LOW, Register};

use crate::port::out_32;

/// Sets a register of the report.
pub(crate) fn write(register: Register, value: u64) {
    out_32(REPORT_INDEX, register as u32);
    out_32(REPORT_LOW, (value & 0xffff_ffff) as u32);
    out_32(REPORT_HIGH, (value >> 32) as u32);
}

/// Sets the phase.
pub(crate) fn write_phase(phase: Phase) {
    write(Register::Phase, phase as u64);
}
