//! Kernel KSM's settings, which are the whole host's: one user at a time, and put back on drop.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};

use crate::wait::wait_until;

const DIRECTORY: &str = "/sys/kernel/mm/ksm";

/// Settings that are put back, in this order: `run` first, so that nothing is scanned at a strange
/// pace, and the advisor after the pace, which can't be set while there is one.
const SETTINGS: [&str; 4] = ["run", "pages_to_scan", "sleep_millisecs", "advisor_mode"];

/// How long another test or benchmark may keep it.
const PATIENCE: Duration = Duration::from_secs(300);

/// The host's KSM in the hands of one test.
#[derive(Debug)]
pub struct KernelKsm {
    saved: Vec<(&'static str, String)>,
    /// Released last: whoever comes next finds the settings as they were.
    _lock: File,
}

impl KernelKsm {
    /// Waits until nobody else has it; `None`, with a word of why, where there is none or it can't be
    /// set.
    ///
    /// # Panics
    /// If somebody keeps it for minutes.
    pub fn take() -> Option<KernelKsm> {
        let told = |error: &io::Error| eprintln!("skipped: kernel KSM: {DIRECTORY}: {error}");
        let run = Path::new(DIRECTORY).join("run");
        let lock = File::options().read(true).write(true).open(run);
        let lock = lock.inspect_err(told).ok()?;
        // The lock that `versus_ksm` takes too.
        wait_until("nobody else uses kernel KSM", PATIENCE, || {
            flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok()
        });
        let saved = SETTINGS
            .into_iter()
            .map(|name| Ok((name, chosen(&fs::read_to_string(path(name))?))))
            .collect::<io::Result<_>>();
        Some(KernelKsm {
            saved: saved.inspect_err(told).ok()?,
            _lock: lock,
        })
    }

    /// Merges at a pace that a test can wait for.
    ///
    /// # Panics
    /// If the kernel refuses a setting; so for [`KernelKsm::set`].
    pub fn hurry(&self) {
        self.set("advisor_mode", "none");
        self.set("pages_to_scan", "10000");
        self.set("sleep_millisecs", "10");
        self.set("run", "1");
    }

    /// Changes a setting that is put back on drop.
    pub fn set(&self, name: &str, value: &str) {
        assert!(SETTINGS.contains(&name), "{name} would not be put back");
        fs::write(path(name), value).unwrap_or_else(|error| panic!("{name} = {value}: {error}"));
    }
}

impl Drop for KernelKsm {
    fn drop(&mut self) {
        for (name, value) in &self.saved {
            if let Err(error) = fs::write(path(name), value) {
                eprintln!("cannot put {DIRECTORY}/{name} back to {value}: {error}");
            }
        }
    }
}

fn path(name: &str) -> std::path::PathBuf {
    Path::new(DIRECTORY).join(name)
}

/// A choice is shown as `[none] scan-time`, a number as itself.
fn chosen(text: &str) -> String {
    let between = text.split(['[', ']']).nth(1);
    between.unwrap_or(text).trim().to_owned()
}
