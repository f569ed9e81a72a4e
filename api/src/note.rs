//! Words to the user on standard error.

use std::fmt;
use std::io::Write;

/// Prints a line that begins with `samepage: `.
///
/// A standard error that cannot be written loses it: nobody reads it then, and what the command does
/// goes on. Rejected: `eprintln!`, which panics there, also at the other end of a closed pipe.
pub fn note(text: fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stderr(), "samepage: {text}");
}
