//! Undoing what a run did to the host: at its own end, or after it was killed.

use std::fs;
use std::io;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::error::HostError;
use super::journal::{Journal, JournalFile, ProcessId};
use super::setting::{Root, Setting};

/// How long a server may take to give back the memory of its guests, and a cgroup to be empty.
const PATIENCE: Duration = Duration::from_secs(60);
const LOOK_INTERVAL: Duration = Duration::from_millis(10);
/// Shown by `advisor_mode` when `ksmd`'s pace is found by the kernel.
const SCAN_TIME: &str = "scan-time";

/// What `restore_left_over` did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Restored {
    /// No run was killed.
    Nothing,
    /// Each thing that was undone, in words.
    Done(Vec<String>),
}

/// Undoes what a killed run left behind: ends its server, removes its cgroup and its temporary
/// files, and puts the host's settings back.
///
/// # Errors
/// [`HostError::InUse`] while a benchmark runs; whatever could not be undone, after all else was.
/// The journal then stays for another try.
pub fn restore_left_over() -> Result<Restored, HostError> {
    restore_left_over_in(&Root::host())
}

/// As [`restore_left_over`], on a host whose files are below `root`.
///
/// # Errors
/// As there.
pub fn restore_left_over_in(root: &Root) -> Result<Restored, HostError> {
    let file = JournalFile::lock(root)?;
    let Some(journal) = file.read()? else {
        return Ok(Restored::Nothing);
    };
    let mut done = Vec::new();
    if journal.is_of_this_boot()? {
        done = undo(root, &journal)?;
    } else {
        done.push("the host was booted since, so nothing of the run is left".to_owned());
    }
    file.remove()?;
    Ok(Restored::Done(done))
}

/// Undoes all that a journal names; what is undone already is left alone. Returns what it did.
pub(crate) fn undo(root: &Root, journal: &Journal) -> Result<Vec<String>, HostError> {
    let mut done = Vec::new();
    let mut errors = Vec::new();
    let mut note = |result: Result<Option<String>, HostError>| match result {
        Ok(what) => done.extend(what),
        Err(error) => errors.push(error),
    };
    // First of all: what it has merged goes with it, and the cgroup can be removed.
    note(journal.server.map_or(Ok(None), end));
    note(journal.group.as_deref().map_or(Ok(None), remove_group));
    for directory in &journal.directories {
        note(remove_files(directory));
    }
    for setting in restore_settings(root, &journal.settings) {
        note(setting.map(Some));
    }
    HostError::all(errors)?;
    Ok(done)
}

/// Ends a process, unless another one has its number now.
fn end(process: ProcessId) -> Result<Option<String>, HostError> {
    let pid = i32::try_from(process.pid).ok().and_then(Pid::from_raw);
    // The descriptor is of one process for good, so that what is looked at below is what is ended.
    let Some(Ok(pidfd)) = pid.map(|pid| pidfd_open(pid, PidfdFlags::empty())) else {
        return Ok(None);
    };
    if !process.is_alive() {
        return Ok(None);
    }
    match pidfd_send_signal(&pidfd, Signal::KILL) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => {}
        Err(error) => {
            let path = format!("/proc/{}", process.pid);
            return Err(HostError::io("end", Path::new(&path))(error.into()));
        }
    }
    let what = format!("the end of server {}", process.pid);
    wait_for(&what, || Ok(!process.is_alive()))?;
    Ok(Some(format!("ended server {}", process.pid)))
}

fn remove_group(directory: &Path) -> Result<Option<String>, HostError> {
    if !directory.exists() {
        return Ok(None);
    }
    let what = format!("{} is empty and removed", directory.display());
    wait_for(&what, || match fs::remove_dir(directory) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
        // Its processes have ended, and the kernel is not done with them.
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => Ok(false),
        Err(error) => Err(HostError::io("remove", directory)(error)),
    })?;
    Ok(Some(format!("removed {}", directory.display())))
}

fn remove_files(directory: &Path) -> Result<Option<String>, HostError> {
    match fs::remove_dir_all(directory) {
        Ok(()) => Ok(Some(format!("removed {}", directory.display()))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(HostError::io("remove", directory)(error)),
    }
}

/// Puts settings back, each in words, in the order that kernel KSM wants.
///
/// What cannot be put back: merged pages of other processes that were unmerged, counters such as
/// `full_scans`, and the pace that the advisor had found by itself. The kernel finds all of them
/// again.
fn restore_settings(root: &Root, before: &[(Setting, String)]) -> Vec<Result<String, HostError>> {
    let mut results = Vec::new();
    let before_of = |setting| {
        let found = before.iter().find(|(other, _)| *other == setting);
        found.map(|(_, value)| value.as_str())
    };
    let changed = |setting: Setting, value: &str| match setting.read(root) {
        Ok(now) => now.is_some_and(|now| now != value),
        Err(_) => true,
    };
    let is_changed = |setting| before_of(setting).is_some_and(|value| changed(setting, value));
    let advises = before_of(Setting::KsmAdvisorMode) == Some(SCAN_TIME);
    let is_kept = |setting| match setting {
        Setting::KsmRun | Setting::KsmAdvisorMode => true,
        Setting::KsmPagesToScan => advises,
        _ => false,
    };
    // The advisor does not let anybody else set the pace.
    if !advises && is_changed(Setting::KsmAdvisorMode) {
        results.push(restore(root, Setting::KsmAdvisorMode, "none"));
    }
    // These two can be changed only while nothing is merged.
    if is_changed(Setting::KsmMergeAcrossNodes) || is_changed(Setting::KsmMaxPageSharing) {
        results.push(restore(root, Setting::KsmRun, "2"));
    }
    for (setting, value) in before {
        if !is_kept(*setting) && changed(*setting, value) {
            results.push(restore(root, *setting, value));
        }
    }
    for setting in [Setting::KsmAdvisorMode, Setting::KsmRun] {
        if let Some(value) = before_of(setting)
            && changed(setting, value)
        {
            results.push(restore(root, setting, value));
        }
    }
    results
}

fn restore(root: &Root, setting: Setting, value: &str) -> Result<String, HostError> {
    setting.write(root, value)?;
    Ok(format!("set {} to {value}", setting.path()))
}

/// Looks until something is so, or it takes too long.
pub(crate) fn wait_for(
    what: &str,
    mut is_so: impl FnMut() -> Result<bool, HostError>,
) -> Result<(), HostError> {
    let deadline = Instant::now() + PATIENCE;
    while !is_so()? {
        if Instant::now() > deadline {
            return Err(HostError::TooLate {
                what: what.to_owned(),
                time: PATIENCE,
            });
        }
        thread::sleep(LOOK_INTERVAL);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::process::{Child, Command};

    use super::*;

    fn host_with_journal(change: impl FnOnce(&mut Journal)) -> (tempfile::TempDir, Root) {
        let host = tempfile::tempdir().unwrap();
        fs::create_dir(host.path().join("run")).unwrap();
        let root = Root::at(host.path());
        let thp = root.path(Setting::ThpEnabled.path());
        fs::create_dir_all(thp.parent().unwrap()).unwrap();
        fs::write(&thp, "always").unwrap();
        let mut journal = Journal::of_now(&root).unwrap();
        journal.settings = vec![(Setting::ThpEnabled, "never".to_owned())];
        change(&mut journal);
        let file = JournalFile::lock(&root).unwrap();
        file.write(&journal).unwrap();
        (host, root)
    }

    struct Sleep(Child);

    impl Sleep {
        fn spawn() -> Sleep {
            Sleep(Command::new("sleep").arg("1000").spawn().unwrap())
        }
    }

    impl Drop for Sleep {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn a_process_that_only_has_the_servers_number_is_left_alone() {
        let other = Sleep::spawn();
        let now = ProcessId::of(other.0.id()).unwrap();
        let (_host, root) = host_with_journal(|journal| {
            journal.server = Some(ProcessId {
                start_time_ticks: now.start_time_ticks - 1,
                ..now
            });
        });
        let done = restore_left_over_in(&root).unwrap();
        assert!(now.is_alive(), "{done:?}");
        assert_eq!(Setting::ThpEnabled.read(&root).unwrap().unwrap(), "never");
    }

    #[test]
    fn nothing_is_undone_after_the_host_was_booted() {
        let server = Sleep::spawn();
        let id = ProcessId::of(server.0.id());
        let (_host, root) = host_with_journal(|journal| {
            journal.boot_id = "another".to_owned();
            journal.server = id;
        });
        restore_left_over_in(&root).unwrap();
        assert!(id.unwrap().is_alive());
        assert_eq!(Setting::ThpEnabled.read(&root).unwrap().unwrap(), "always");
        assert_eq!(restore_left_over_in(&root).unwrap(), Restored::Nothing);
    }

    #[test]
    fn what_cannot_be_undone_is_named_after_all_else_was_and_stays_in_the_journal() {
        let (host, root) = host_with_journal(|journal| {
            let file = Setting::ThpEnabled.path();
            journal.directories = vec![PathBuf::from(file).join("directory")];
        });
        let error = restore_left_over_in(&root).unwrap_err().to_string();
        assert!(error.contains("enabled/directory"), "{error}");
        assert_eq!(Setting::ThpEnabled.read(&root).unwrap().unwrap(), "never");
        assert!(
            host.path()
                .join("run/samepage-density/journal.json")
                .exists()
        );
    }

    #[test]
    fn a_journal_that_is_cut_off_is_named() {
        let (host, root) = host_with_journal(|_| {});
        let path = host.path().join("run/samepage-density/journal.json");
        fs::write(&path, "{").unwrap();
        let error = restore_left_over_in(&root).unwrap_err().to_string();
        assert!(error.contains("journal.json"), "{error}");
    }
}
