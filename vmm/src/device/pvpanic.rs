//! pvpanic: the port by which a guest says that its kernel panicked or that it powers off
//! (`docs/specs/pvpanic.rst` in QEMU, `drivers/misc/pvpanic` in Linux).

use crate::state::EndReason;

/// The ISA device's port.
pub(crate) const PORT: u16 = 0x505;

const PANICKED: u8 = 1 << 0;
const SHUTDOWN: u8 = 1 << 2;

/// What a read of the port tells the guest: the events understood.
pub(crate) const SUPPORTED: u8 = PANICKED | SHUTDOWN;

/// What a write to the port means for the VM. Panic outweighs shutdown; unknown bits mean nothing.
pub(crate) fn event(value: u8) -> Option<EndReason> {
    if value & PANICKED != 0 {
        Some(EndReason::GuestPanic)
    } else if value & SHUTDOWN != 0 {
        Some(EndReason::GuestShutdown)
    } else {
        None
    }
}
