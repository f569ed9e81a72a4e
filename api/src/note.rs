//! Words on standard error: to the user, and the log.

use std::fmt;
use std::fs::File;
use std::io::{self, Write, stderr};
use std::os::fd::AsFd;
use std::sync::OnceLock;
use std::time::Duration;

use crate::spool::{SLOW, Spool};

/// How long the end of a server waits for whoever reads its last words.
const LAST_WORDS_TIME: Duration = Duration::from_secs(1);

/// A monitor's thread has to come after its lock-down.
static SPOOL: OnceLock<Spool> = OnceLock::new();

/// Prints a line that begins with `samepage: `.
///
/// A standard error that cannot be written loses it: nobody reads it then, and what the command does
/// goes on. Rejected: `eprintln!`, which panics there, also at the other end of a closed pipe.
pub fn note(text: fmt::Arguments<'_>) {
    let _ = writeln!(stderr(), "samepage: {text}");
}

/// As [`note`], for a server that ends: it waits for no reader for long.
pub fn last_note(text: fmt::Arguments<'_>) {
    match spool() {
        Some(spool) => {
            spool.write(format!("samepage: {text}\n").as_bytes(), LAST_WORDS_TIME);
        }
        None => note(text),
    }
}

/// Begins the thread of the log, which the first line would begin otherwise.
pub fn open_log() {
    spool();
}

/// Where the log goes: to standard error, from a thread of its own. Whoever logs may hold up a domain,
/// and a pipe that nobody reads, or a file whose storage hangs, would hold it up as well.
#[derive(Debug, Default)]
pub struct LogTarget {
    told_lost: u64,
}

impl Write for LogTarget {
    fn write(&mut self, lines: &[u8]) -> io::Result<usize> {
        let Some(spool) = spool() else {
            return stderr().write(lines);
        };
        let lost = spool.lost() - self.told_lost;
        let mut told = Vec::new();
        if lost > 0 {
            writeln!(told, "samepage: {lost} lines of the log are lost")?;
        }
        told.extend(lines);
        if spool.write(&told, SLOW) {
            self.told_lost += lost;
        }
        Ok(lines.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// `None` while there can be none: for want of a descriptor, or a thread.
fn spool() -> Option<&'static Spool> {
    if SPOOL.get().is_none() {
        // Not the standard library's handle: its lock would be held while the thread writes.
        let file = File::from(stderr().as_fd().try_clone_to_owned().ok()?);
        // Another thread may have been quicker.
        let _ = SPOOL.set(Spool::new(file, "log").ok()?);
    }
    SPOOL.get()
}
