//! What the demo shows while it runs: one line on a terminal, a line now and then elsewhere.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use dedup::Stats;

use crate::bytes::in_units;

/// Time between two lines where lines cannot be rewritten.
const LINE_INTERVAL: Duration = Duration::from_secs(1);

/// The progress line.
#[derive(Debug)]
pub(super) struct Progress {
    /// Standard output is for the summary alone.
    is_to_stderr: bool,
    is_terminal: bool,
    last_line: Option<(String, Instant)>,
}

impl Progress {
    pub(super) fn new(is_to_stderr: bool) -> Progress {
        let is_terminal = if is_to_stderr {
            std::io::stderr().is_terminal()
        } else {
            std::io::stdout().is_terminal()
        };
        Progress {
            is_to_stderr,
            is_terminal,
            last_line: None,
        }
    }

    pub(super) fn filling(&mut self, filled: usize, vms: usize, memory_bytes: u64) {
        let memory = in_units(i128::from(memory_bytes));
        self.note(&format!(
            "filling: {filled} of {vms} vms done, memory {memory}"
        ));
    }

    pub(super) fn merging(
        &mut self,
        stats: &Stats,
        memory_before_bytes: u64,
        memory_bytes: u64,
        duplicate_pages: Option<u64>,
    ) {
        let given_back = stats.pages_sharing + stats.pages_zero;
        let before = in_units(i128::from(memory_before_bytes));
        let now = in_units(i128::from(memory_bytes));
        let mut line = format!(
            "merging: memory {before} -> {now}, {} shared, {} sharing, {} zero",
            stats.pages_shared, stats.pages_sharing, stats.pages_zero
        );
        if let Some(duplicates) = duplicate_pages.filter(|&pages| pages > 0) {
            let percent = (given_back * 100 / duplicates).min(100);
            line += &format!(", {percent} % of the duplicates");
        }
        self.note(&line);
    }

    /// Shows `text` as the present line.
    pub(super) fn note(&mut self, text: &str) {
        let kind = |line: &str| line.split(':').next().map(str::to_owned);
        let is_due = match &self.last_line {
            None => true,
            Some((last, _)) if last == text => false,
            // A new phase is shown at once.
            Some((last, shown)) => {
                self.is_terminal || kind(last) != kind(text) || shown.elapsed() >= LINE_INTERVAL
            }
        };
        if is_due {
            // "\x1b[K" clears what a longer line left behind.
            let ends = if self.is_terminal {
                ("\r", "\x1b[K")
            } else {
                ("", "\n")
            };
            self.write(&format!("{}{text}{}", ends.0, ends.1));
            self.last_line = Some((text.to_owned(), Instant::now()));
        }
    }

    /// Leaves the line for what follows.
    pub(super) fn end_line(&mut self) {
        if self.is_terminal && self.last_line.take().is_some() {
            self.write("\n");
        }
    }

    fn write(&self, text: &str) {
        // Progress that nobody can see is not worth an error.
        let _ = if self.is_to_stderr {
            std::io::stderr().write_all(text.as_bytes())
        } else {
            let mut stdout = std::io::stdout().lock();
            stdout
                .write_all(text.as_bytes())
                .and_then(|()| stdout.flush())
        };
    }
}
