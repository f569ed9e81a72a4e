//! Port-mapped devices of the PC platform, and which of them answers at a port.
//!
//! | ports | device | module |
//! |---|---|---|
//! | 0x3f8 to 0x3ff | serial port COM1, interrupt 4 | [`serial`] |
//! | 0x60, 0x64 | keyboard controller, interrupt 1; reset | [`i8042`] |
//! | 0x70, 0x71 | CMOS and real-time clock | [`cmos`] |
//! | 0x505 | pvpanic | [`pvpanic`] |
//! | 0x680, 0x684, 0x688, 0x68c, 0x690 | report, sleep and clock of the pageload guest | [`report`] |
//!
//! PIC, PIT (with port 0x61), LAPIC and IOAPIC live in KVM. A port without a device reads all ones.

pub(crate) mod cmos;
pub(crate) mod i8042;
pub(crate) mod irq;
pub(crate) mod pvpanic;
pub(crate) mod report;
pub(crate) mod serial;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::state::EndReason;
use cmos::Cmos;
use i8042::I8042;
use report::ReportPort;
use serial::SerialPort;

/// The port-mapped devices of one VM, as its vCPU threads reach them.
#[derive(Debug)]
pub(crate) struct Ports {
    pub(crate) serial: Arc<SerialPort>,
    pub(crate) i8042: Mutex<I8042>,
    pub(crate) cmos: Mutex<Cmos>,
    pub(crate) report: Arc<ReportPort>,
}

fn lock<T>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    // A device that panicked has ended its VM: its state no longer matters.
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Ports {
    /// Serves an IN. `data` is one access, or several to the same port (a string instruction);
    /// the byte-wide devices see the latter as that many accesses.
    pub(crate) fn read(&self, port: u16, data: &mut [u8]) {
        match port {
            serial::BASE..=serial::LAST => {
                data.iter_mut()
                    .for_each(|byte| *byte = self.serial.read(port - serial::BASE));
            }
            i8042::PORT_DATA => {
                data.iter_mut()
                    .for_each(|byte| *byte = lock(&self.i8042).read_data());
            }
            i8042::PORT_COMMAND => data.fill(lock(&self.i8042).read_status()),
            cmos::PORT_INDEX | cmos::PORT_DATA => data.fill(lock(&self.cmos).read(port)),
            pvpanic::PORT => data.fill(pvpanic::SUPPORTED),
            report::PORT_TSC_KHZ => self.report.read(data),
            _ => data.fill(0xff),
        }
    }

    /// Serves an OUT. Returns a reason when the guest ended itself with it.
    pub(crate) fn write(&self, port: u16, data: &[u8]) -> Option<EndReason> {
        match port {
            serial::BASE..=serial::LAST => {
                data.iter()
                    .for_each(|byte| self.serial.write(port - serial::BASE, *byte));
            }
            i8042::PORT_DATA => {
                data.iter()
                    .for_each(|byte| lock(&self.i8042).write_data(*byte));
            }
            i8042::PORT_COMMAND => {
                return data
                    .iter()
                    .find_map(|byte| lock(&self.i8042).write_command(*byte));
            }
            cmos::PORT_INDEX | cmos::PORT_DATA => {
                data.iter()
                    .for_each(|byte| lock(&self.cmos).write(port, *byte));
            }
            pvpanic::PORT => return data.iter().find_map(|byte| pvpanic::event(*byte)),
            report::PORT_INDEX | report::PORT_LOW | report::PORT_HIGH => {
                self.report.write(port, data);
            }
            _ => {}
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::console::Console;
    use irq::IrqLine;

    fn ports() -> Ports {
        Ports {
            serial: SerialPort::new(IrqLine::new().unwrap(), &Console::new()),
            i8042: Mutex::new(I8042::new(IrqLine::new().unwrap())),
            cmos: Mutex::new(Cmos::new(128 << 20)),
            report: Arc::default(),
        }
    }

    #[test]
    fn ports_without_a_device_read_all_ones_and_swallow_writes() {
        let ports = ports();
        let mut data = [0; 4];
        ports.read(0xcfc, &mut data);
        assert_eq!(data, [0xff; 4]);
        assert_eq!(ports.write(0x80, &[1]), None);
    }

    #[test]
    fn a_string_of_bytes_to_the_serial_port_is_printed_in_order() {
        let ports = ports();
        ports.write(0x3f8, b"hello");
        assert_eq!(ports.serial.console().history(), b"hello");
    }

    #[test]
    fn reset_panic_and_shutdown_end_the_vm() {
        let ports = ports();
        assert_eq!(ports.write(0x64, &[0xfe]), Some(EndReason::GuestReset));
        assert_eq!(ports.write(0x505, &[1]), Some(EndReason::GuestPanic));
        assert_eq!(ports.write(0x505, &[4]), Some(EndReason::GuestShutdown));
        let mut data = [0];
        ports.read(0x505, &mut data);
        assert_eq!(data, [5]);
    }
}
