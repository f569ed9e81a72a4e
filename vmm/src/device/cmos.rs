//! CMOS memory and its real-time clock (MC146818), so that a guest that asks gets an answer.
//!
//! The clock is the host's, in UTC; what a guest sets is not kept. A guest that polls the "update
//! in progress" bit must see it fall: it is never set, which says "not being updated right now".

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Selects the register (bit 7 masks NMIs on a PC and is ignored).
pub(crate) const PORT_INDEX: u16 = 0x70;
/// The selected register.
pub(crate) const PORT_DATA: u16 = 0x71;

const REGISTERS: usize = 128;

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const DAY_OF_WEEK: u8 = 0x06;
const DAY_OF_MONTH: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;
const CENTURY: u8 = 0x32;

/// Divider for 32768 Hz and the usual 1024 Hz rate.
const STATUS_A_RUNNING: u8 = 0x26;
/// 24-hour clock, binary-coded decimal.
const STATUS_B_24_HOURS: u8 = 0x02;
/// Battery good.
const STATUS_D_VALID: u8 = 0x80;

/// CMOS of one VM.
#[derive(Debug)]
pub(crate) struct Cmos {
    index: u8,
    memory: [u8; REGISTERS],
}

impl Cmos {
    /// CMOS that tells of `mem_size_bytes` of memory, as QEMU and Bochs firmware expect it.
    pub(crate) fn new(mem_size_bytes: u64) -> Cmos {
        let mut memory = [0; REGISTERS];
        // 0x34/0x35: memory from 16 MiB up, in units of 64 KiB, at most up to the MMIO hole.
        let units = (mem_size_bytes.min(3 << 30).saturating_sub(16 << 20) >> 16).to_le_bytes();
        memory[0x34..0x36].copy_from_slice(&units[..2]);
        Cmos { index: 0, memory }
    }

    /// Serves a read of either port.
    pub(crate) fn read(&self, port: u16) -> u8 {
        if port == PORT_INDEX {
            return self.index;
        }
        let since_epoch = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or(Duration::ZERO);
        self.register(DateTime::from_unix(since_epoch.as_secs()))
    }

    /// Serves a write of either port.
    pub(crate) fn write(&mut self, port: u16, value: u8) {
        if port == PORT_INDEX {
            self.index = value & 0x7f;
        } else if self.index > STATUS_D {
            self.memory[usize::from(self.index)] = value;
        }
    }

    fn register(&self, now: DateTime) -> u8 {
        match self.index {
            SECONDS => bcd(now.second),
            MINUTES => bcd(now.minute),
            HOURS => bcd(now.hour),
            DAY_OF_WEEK => bcd(now.day_of_week),
            DAY_OF_MONTH => bcd(now.day),
            MONTH => bcd(now.month),
            YEAR => bcd(now.year % 100),
            CENTURY => bcd(now.year / 100),
            STATUS_A => STATUS_A_RUNNING,
            STATUS_B => STATUS_B_24_HOURS,
            // Reading acknowledges interrupts; there are none.
            STATUS_C => 0,
            STATUS_D => STATUS_D_VALID,
            index => self.memory[usize::from(index)],
        }
    }
}

fn bcd(value: u64) -> u8 {
    // Two decimal digits are at most 0x99.
    u8::try_from(value / 10 % 10 * 16 + value % 10).unwrap_or_default()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct DateTime {
    year: u64,
    month: u64,
    day: u64,
    /// 1 is Sunday.
    day_of_week: u64,
    hour: u64,
    minute: u64,
    second: u64,
}

impl DateTime {
    /// The UTC date and time `seconds` after 1970-01-01, by the proleptic Gregorian calendar
    /// (H. Hinnant, "chrono-compatible low-level date algorithms", `civil_from_days`).
    fn from_unix(seconds: u64) -> DateTime {
        let days = seconds / 86_400;
        // Years begin in March there, so that the leap day is a year's last day.
        let since_march_0 = days + 719_468;
        let era = since_march_0 / 146_097;
        let day_of_era = since_march_0 % 146_097;
        let year_of_era =
            (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * day_of_year + 2) / 153;
        let month = if month_from_march < 10 {
            month_from_march + 3
        } else {
            month_from_march - 9
        };
        DateTime {
            year: era * 400 + year_of_era + u64::from(month <= 2),
            month,
            day: day_of_year - (153 * month_from_march + 2) / 5 + 1,
            day_of_week: (days + 4) % 7 + 1,
            hour: seconds / 3_600 % 24,
            minute: seconds / 60 % 60,
            second: seconds % 60,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_right_around_leap_days_and_centuries() {
        for (seconds, expected) in [
            (0, (1970, 1, 1, 5)),
            (951_782_400, (2000, 2, 29, 3)),
            (951_868_800, (2000, 3, 1, 4)),
            (1_735_689_599, (2024, 12, 31, 3)),
            (4_107_542_400, (2100, 3, 1, 2)),
        ] {
            let date = DateTime::from_unix(seconds);
            assert_eq!(
                (date.year, date.month, date.day, date.day_of_week),
                expected
            );
        }
    }

    #[test]
    fn the_clock_reads_as_bcd() {
        let now = DateTime::from_unix(1_735_689_599);
        let mut cmos = Cmos::new(128 << 20);
        let mut read = |index| {
            cmos.write(PORT_INDEX, index);
            cmos.register(now)
        };
        assert_eq!([read(CENTURY), read(YEAR), read(MONTH)], [0x20, 0x24, 0x12]);
        assert_eq!(
            [read(HOURS), read(MINUTES), read(SECONDS)],
            [0x23, 0x59, 0x59]
        );
    }

    #[test]
    fn no_status_register_reads_all_ones_and_the_clock_is_never_updating() {
        let mut cmos = Cmos::new(128 << 20);
        for index in [STATUS_A, STATUS_B, STATUS_C, STATUS_D] {
            cmos.write(PORT_INDEX, index);
            assert_ne!(cmos.read(PORT_DATA), 0xff);
        }
        cmos.write(PORT_INDEX, STATUS_A);
        assert_eq!(cmos.read(PORT_DATA) & 0x80, 0);
    }

    #[test]
    fn spare_registers_keep_what_is_written_and_clock_registers_do_not() {
        let mut cmos = Cmos::new(128 << 20);
        cmos.write(PORT_INDEX, 0x80 | 0x7f);
        cmos.write(PORT_DATA, 0x5a);
        assert_eq!(cmos.read(PORT_DATA), 0x5a);
        cmos.write(PORT_INDEX, STATUS_D);
        cmos.write(PORT_DATA, 0);
        assert_eq!(cmos.read(PORT_DATA), STATUS_D_VALID);
    }
}
