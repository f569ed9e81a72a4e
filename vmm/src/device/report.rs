//! The report port of the pageload guest: counters that it commits one 64-bit value at a time.
//!
//! A 32-bit OUT to 0x680 selects a register, one to 0x684 gives the low half of its value, one to
//! 0x688 gives the high half and commits the whole. One to 0x68c asks for a pause in microseconds. A
//! 32-bit IN from 0x690 gives the frequency of the vCPU's time-stamp counter in kHz: not all CPUs have
//! it in CPUID, and a guest without a timer has nothing to measure it by.
//! Rejected: printing counters on the console, which costs the guest an exit per character and the
//! host a parser.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::info::{GuestReport, WriteLatency, WriteProbe};

/// Selects the register.
pub(crate) const PORT_INDEX: u16 = 0x680;
/// Low half of the value.
pub(crate) const PORT_LOW: u16 = 0x684;
/// High half; commits.
pub(crate) const PORT_HIGH: u16 = 0x688;
/// Holds the vCPU for this many microseconds.
pub(crate) const PORT_SLEEP_US: u16 = 0x68c;
/// Tells the frequency of the time-stamp counter in kHz.
pub(crate) const PORT_TSC_KHZ: u16 = 0x690;

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
    tsc_khz: Option<u32>,
    /// Figures that wait for the register that commits them.
    probe: WriteProbe,
    report: Option<GuestReport>,
}

impl ReportPort {
    /// What the guest reported last.
    pub(crate) fn report(&self) -> Option<GuestReport> {
        self.lock().report
    }

    /// Says what to tell the guest of its time-stamp counter; `None` as if there were no port.
    pub(crate) fn set_tsc_khz(&self, tsc_khz: Option<u32>) {
        self.lock().tsc_khz = tsc_khz;
    }

    /// Serves an IN from [`PORT_TSC_KHZ`]: all ones where the frequency is not known, and to other
    /// widths than 32 bits.
    pub(crate) fn read(&self, data: &mut [u8]) {
        let tsc_khz = self.lock().tsc_khz;
        match (<&mut [u8; 4]>::try_from(&mut *data), tsc_khz) {
            (Ok(bytes), Some(tsc_khz)) => *bytes = tsc_khz.to_le_bytes(),
            _ => data.fill(0xff),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a 32-bit OUT; other widths are ignored.
    pub(crate) fn write(&self, port: u16, data: &[u8]) {
        let Ok(bytes) = <[u8; 4]>::try_from(data) else {
            return;
        };
        let value = u32::from_le_bytes(bytes);
        let mut state = self.lock();
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
            7..=11 => return set_figure(&mut self.probe.shared, self.index - 7, value),
            12..=16 => return set_figure(&mut self.probe.control, self.index - 12, value),
            17..=21 => return set_figure(&mut self.probe.exit, self.index - 17, value),
            // The last one, so that no figure is seen beside one of another moment.
            22 => {
                self.probe.window = value;
                report.probe = Some(self.probe);
            }
            _ => return,
        }
        self.report = Some(report);
    }
}

fn set_figure(latency: &mut WriteLatency, figure: u32, value: u64) {
    match figure {
        0 => latency.count = value,
        1 => latency.p50_ns = value,
        2 => latency.p99_ns = value,
        3 => latency.p99_9_ns = value,
        _ => latency.max_ns = value,
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
        send(&port, 23, 1);
        port.write(PORT_INDEX, &[2]);
        port.write(PORT_HIGH, &[0; 8]);
        assert_eq!(port.report(), None);
    }

    #[test]
    fn figures_of_a_probe_are_seen_once_its_window_commits_them() {
        let port = ReportPort::default();
        (7..=21).for_each(|index| send(&port, index, u64::from(index) * 10));
        assert_eq!(port.report(), None);
        send(&port, 22, 3);
        let latency = |first: u64| WriteLatency {
            count: first,
            p50_ns: first + 10,
            p99_ns: first + 20,
            p99_9_ns: first + 30,
            max_ns: first + 40,
        };
        let probe = WriteProbe {
            window: 3,
            shared: latency(70),
            control: latency(120),
            exit: latency(170),
        };
        assert_eq!(port.report().and_then(|report| report.probe), Some(probe));
        send(&port, 7, 1);
        assert_eq!(port.report().and_then(|report| report.probe), Some(probe));
    }

    #[test]
    fn frequency_of_the_counter_is_told_in_32_bits_once_it_is_known() {
        let port = ReportPort::default();
        let read = |mut data: Vec<u8>| {
            port.read(&mut data);
            data
        };
        assert_eq!(read(vec![0; 4]), [0xff; 4]);
        port.set_tsc_khz(Some(2_400_000));
        assert_eq!(read(vec![0; 4]), 2_400_000_u32.to_le_bytes());
        assert_eq!(read(vec![0; 2]), [0xff; 2]);
    }
}
