//! The I/O ports by which the guest talks to its monitor, and the registers of its report.
//!
//! A report is three 32-bit writes: the register's index, the low half, the high half. The last one
//! makes the value count, so that a reader never sees half of it.

/// 32-bit: index of the register that the next value is for.
pub const REPORT_INDEX: u16 = 0x680;
/// 32-bit: low half of the value.
pub const REPORT_LOW: u16 = 0x684;
/// 32-bit: high half of the value; commits it.
pub const REPORT_HIGH: u16 = 0x688;
/// 32-bit: the monitor holds the vCPU for this many microseconds.
pub const SLEEP_US: u16 = 0x68c;
/// 32-bit, read: the frequency of the vCPU's time-stamp counter in kHz; all ones if it is not known.
pub const TSC_KHZ: u16 = 0x690;
/// 8-bit: the first serial port's data register.
pub const COM1: u16 = 0x3f8;
/// 8-bit: its line status register.
pub const COM1_STATUS: u16 = 0x3fd;
/// Bit of the line status register: a byte of input waits.
pub const COM1_STATUS_INPUT: u8 = 1;
/// 8-bit: the pvpanic device (Linux `uapi/misc/pvpanic.h`).
pub const PVPANIC: u16 = 0x505;
/// Value for [`PVPANIC`]: the guest failed (`PVPANIC_PANICKED`).
pub const PVPANIC_PANICKED: u8 = 1;
/// Value for [`PVPANIC`]: the guest is done (`PVPANIC_SHUTDOWN`).
pub const PVPANIC_SHUTDOWN: u8 = 4;

/// A register of the report; the number is its index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Register {
    /// A [`Phase`].
    Phase = 0,
    /// Whole passes over all pages.
    VerifyPasses = 1,
    /// Pages found with a content they should not have.
    VerifyErrors = 2,
    /// Pages written since they were filled.
    PagesWritten = 3,
    /// Index + 1 of the first page that was wrong.
    FirstBadPage = 4,
    /// Vector + 1 of the exception that stopped the guest.
    Exception = 5,
    /// Pages verified.
    VerifiedPages = 6,
    /// Timed writes to pages with shared content.
    SharedCount = 7,
    /// Their median in nanoseconds; all quantiles are a [`Histogram`](crate::Histogram)'s.
    SharedP50 = 8,
    /// Their 99th percentile.
    SharedP99 = 9,
    /// Their 99.9th percentile.
    SharedP99_9 = 10,
    /// The longest of them.
    SharedMax = 11,
    /// Timed writes to a page that was written the moment before: what a write costs that cannot
    /// meet the merge engine.
    ControlCount = 12,
    /// Their median in nanoseconds.
    ControlP50 = 13,
    /// Their 99th percentile.
    ControlP99 = 14,
    /// Their 99.9th percentile.
    ControlP99_9 = 15,
    /// The longest of them.
    ControlMax = 16,
    /// Timed exits: reads of a port, which the monitor serves. One takes about as long as a page fault
    /// of the host, and can lose its CPU as well, but meets no merge engine.
    ExitCount = 17,
    /// Their median in nanoseconds.
    ExitP50 = 18,
    /// Their 99th percentile.
    ExitP99 = 19,
    /// Their 99.9th percentile.
    ExitP99_9 = 20,
    /// The longest of them.
    ExitMax = 21,
    /// Windows of timed writes begun so far; commits registers 7 to 21 as the figures of this one,
    /// so that a reader never sees those of two moments.
    ProbeWindow = 22,
}

/// How far the guest is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Phase {
    /// Writes every page for the first time.
    Filling = 1,
    /// All pages are filled; verifies.
    Verifying = 2,
    /// All passes are done and no page was wrong.
    Finished = 3,
    /// A page was wrong, the command line was wrong, or an exception occurred.
    Failed = 4,
}
