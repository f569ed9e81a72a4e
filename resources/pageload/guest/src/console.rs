//! Text on COM1. Monitors take bytes at any rate, so the transmitter is not waited for.

use core::fmt::{self, Write};

use pageload_workload::port::COM1;

use crate::port;

struct Console;

impl Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            port::out_8(COM1, byte);
        }
        Ok(())
    }
}

/// Prints a line that says whose it is.
pub(crate) fn print_line(text: fmt::Arguments<'_>) {
    // The console never fails, and there is nowhere else to say that it did.
    let _ = writeln!(Console, "pageload: {text}\r");
}
