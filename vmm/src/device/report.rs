//! The report port of the pageload guest: counters that it commits one 64-bit value at a time.
//!
//! A 32-bit OUT to 0x680 selects a register, one to 0x684 gives the low half of its value, one to
//! 0x688 gives the high half and commits the whole. One to 0x68c asks for a pause in microseconds.
//! Rejected: printing counters on the console, which costs the guest an exit per character and the
//! host a parser.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::info::GuestReport;

/// Selects the register.
pub(crate) const PORT_INDEX: u16 = 0x680;
/// Low half of the value.
pub(crate) const PORT_LOW: u16 = 0x684;
/// High half; commits.
pub(crate) const PORT_HIGH: u16 = 0x688;
/// Holds the vCPU for this many microseconds.
pub(crate) const PORT_SLEEP_US: u16 = 0x68c;

/// How long a 32-bit OUT to [`PORT_SLEEP_US`] asks the vCPU to be held. Other widths are ignored.
///
/// It is how a guest without a timer driver paces itself. It gives the guest nothing that `hlt`
/// does not: the time is its own, and a pause or stop cuts it short.
pub(crate) fn sleep_time(port: u16, data: &[u8]) -> Option<Duration> {
    let bytes = <[u8; 4]>::try_from(data)
        .ok()
        .filter(|_| port == PORT_SLEEP_US)?;
    Some(Duration::from_micros(u64::from(u32::from_le_bytes(bytes))))
}

/// The registers and what was committed.
#[derive(Debug, Default)]
pub(crate) struct ReportPort {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    index: u32,
    low: u32,
    report: Option<GuestReport>,
}

impl ReportPort {
    /// What the guest reported last.
    pub(crate) fn report(&self) -> Option<GuestReport> {
        self.state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .report
    }

    /// Takes a 32-bit OUT; other widths are ignored.
    pub(crate) fn write(&self, port: u16, data: &[u8]) {
        let Ok(bytes) = <[u8; 4]>::try_from(data) else {
            return;
        };
        let value = u32::from_le_bytes(bytes);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match port {
            PORT_INDEX => state.index = value,
            PORT_LOW => state.low = value,
            _ => state.commit(value),
        }
    }
}

impl State {
    fn commit(&mut self, high: u32) {
        let value = u64::from(high) << 32 | u64::from(self.low);
        let mut report = self.report.unwrap_or_default();
        match self.index {
            0 => report.phase = value,
            1 => report.verify_passes = value,
            2 => report.verify_errors = value,
            3 => report.pages_written = value,
            4 => report.first_bad_page = value.checked_sub(1),
            5 => report.exception_vector = value.checked_sub(1),
            6 => report.verified_pages = value,
            _ => return,
        }
        self.report = Some(report);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn send(port: &ReportPort, index: u32, value: u64) {
        port.write(PORT_INDEX, &index.to_le_bytes());
        port.write(PORT_LOW, &value.to_le_bytes()[..4]);
        port.write(PORT_HIGH, &value.to_le_bytes()[4..]);
    }

    #[test]
    fn nothing_is_reported_until_a_value_is_committed() {
        let port = ReportPort::default();
        port.write(PORT_INDEX, &[0; 4]);
        port.write(PORT_LOW, &[1, 0, 0, 0]);
        assert_eq!(port.report(), None);
        port.write(PORT_HIGH, &[0; 4]);
        assert_eq!(port.report().map(|report| report.phase), Some(1));
    }

    #[test]
    fn values_are_64_bits_and_indices_plus_one_become_options() {
        let port = ReportPort::default();
        send(&port, 6, 0x1_2345_6789);
        send(&port, 4, 1);
        send(&port, 5, 0);
        let report = port.report().unwrap();
        assert_eq!(report.verified_pages, 0x1_2345_6789);
        assert_eq!(
            (report.first_bad_page, report.exception_vector),
            (Some(0), None)
        );
    }

    #[test]
    fn only_a_32_bit_write_to_its_port_asks_for_sleep() {
        let us = 1500_u32.to_le_bytes();
        assert_eq!(
            sleep_time(PORT_SLEEP_US, &us),
            Some(Duration::from_micros(1500))
        );
        assert_eq!(sleep_time(PORT_HIGH, &us), None);
        assert_eq!(sleep_time(PORT_SLEEP_US, &us[..2]), None);
    }

    #[test]
    fn unknown_registers_and_other_widths_are_ignored() {
        let port = ReportPort::default();
        send(&port, 7, 1);
        port.write(PORT_INDEX, &[2]);
        port.write(PORT_HIGH, &[0; 8]);
        assert_eq!(port.report(), None);
    }
}
