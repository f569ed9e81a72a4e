//! The host's settings during a run, put back at its end.

use std::path::Path;

use super::error::HostError;
use super::journal::{Journal, JournalFile, ProcessId};
use super::left_over::undo;
use super::setting::{Root, Setting};
use crate::density::model::{Engine, Thp};

/// Kernel KSM's defaults (`mm/ksm.c`), which also hold before each arm sets its own.
const KSM_DEFAULTS: [(Setting, &str); 9] = [
    // First: it does not let anybody else set the pace.
    (Setting::KsmAdvisorMode, "none"),
    (Setting::KsmAdvisorMaxCpu, "70"),
    (Setting::KsmAdvisorTargetScanTime, "200"),
    (Setting::KsmPagesToScan, "100"),
    (Setting::KsmSleepMillisecs, "20"),
    (Setting::KsmUseZeroPages, "0"),
    (Setting::KsmSmartScan, "1"),
    (Setting::KsmMergeAcrossNodes, "1"),
    (Setting::KsmMaxPageSharing, "256"),
];

/// The pace that people set who want memory back soon.
const KSM_FAST: [(Setting, &str); 2] = [
    (Setting::KsmPagesToScan, "5000"),
    (Setting::KsmUseZeroPages, "1"),
];

/// The advisor, with a target that suits a fleet of minutes: the default of 200 s is never reached
/// before such a run is over. The mode comes last, as its start takes the target as it is.
const KSM_ADVISOR: [(Setting, &str); 3] = [
    (Setting::KsmUseZeroPages, "1"),
    (Setting::KsmAdvisorTargetScanTime, "20"),
    (Setting::KsmAdvisorMode, "scan-time"),
];

/// The host's settings, which this value may change. They are as before when it is dropped: at the
/// normal end, and when an error, a panic or a signal that the program handles unwinds it.
///
/// After SIGKILL, [`restore_left_over`](super::restore_left_over) does the same from the journal.
#[derive(Debug)]
pub struct HostSettings {
    root: Root,
    file: JournalFile,
    journal: Journal,
    /// Whether the journal is on disk, and thus something may have changed.
    is_written: bool,
}

impl HostSettings {
    /// Takes note of all settings, and keeps other benchmarks out until the drop.
    ///
    /// # Errors
    /// [`HostError::InUse`] while another benchmark runs, [`HostError::LeftOver`] after one was
    /// killed: what it left is put back only when somebody asks for it, as that ends a process.
    pub fn open() -> Result<HostSettings, HostError> {
        HostSettings::open_in(&Root::host())
    }

    /// As [`HostSettings::open`], on a host whose files are below `root`.
    ///
    /// # Errors
    /// As there.
    pub fn open_in(root: &Root) -> Result<HostSettings, HostError> {
        let file = JournalFile::lock(root)?;
        if let Some(left) = file.read()? {
            return Err(HostError::LeftOver {
                path: file.path(),
                pid: left.owner_pid,
            });
        }
        Ok(HostSettings {
            root: root.clone(),
            journal: Journal::of_now(root)?,
            file,
            is_written: false,
        })
    }

    /// What a setting is now; none if this kernel does not have it.
    ///
    /// # Errors
    /// If its file cannot be read.
    pub fn get(&self, setting: Setting) -> Result<Option<String>, HostError> {
        setting.read(&self.root)
    }

    /// Changes a setting until the end.
    ///
    /// # Errors
    /// If the kernel lacks it or does not take the value, or the journal cannot be written; then
    /// nothing has changed.
    pub fn set(&mut self, setting: Setting, value: &str) -> Result<(), HostError> {
        if !self.is_written {
            self.write_journal()?;
        }
        setting.write(&self.root, value)
    }

    /// Sets kernel KSM up for an arm: unmerges what is merged, starts from the kernel's defaults,
    /// and lets `ksmd` run for an arm of KSM only. Samepage's own engine is set by its API.
    ///
    /// Pages that other processes had merged are unmerged too. The counters of scans go on.
    ///
    /// # Errors
    /// If the kernel lacks what the arm needs, or does not take a value.
    pub fn apply_engine(&mut self, engine: Engine) -> Result<(), HostError> {
        if self.get(Setting::KsmRun)?.is_none() && !engine.is_ksm() {
            return Ok(());
        }
        self.set(Setting::KsmRun, "2")?;
        for (setting, value) in KSM_DEFAULTS {
            // What an older kernel lacks, it does not do. An arm that needs it says so below.
            if self.get(setting)?.is_some() {
                self.set(setting, value)?;
            }
        }
        let needed: &[(Setting, &str)] = match engine {
            Engine::Off | Engine::Samepage | Engine::KsmDefaults => &[],
            Engine::KsmFast => &KSM_FAST,
            Engine::KsmAdvisor => &KSM_ADVISOR,
        };
        for (setting, value) in needed {
            self.set(*setting, value)?;
        }
        self.set(Setting::KsmRun, if engine.is_ksm() { "1" } else { "0" })
    }

    /// Sets transparent huge pages up for an arm. `defrag` is the kernel's default in both.
    ///
    /// # Errors
    /// If the kernel has none, or does not take the value.
    pub fn apply_thp(&mut self, thp: Thp) -> Result<(), HostError> {
        self.set(Setting::ThpDefrag, "madvise")?;
        self.set(Setting::ThpEnabled, &thp.to_string())
    }

    /// Every setting by its path, as it is now, for [`Run::settings`](super::super::model::Run).
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn snapshot(&self) -> Result<Vec<(String, String)>, HostError> {
        let mut all = Vec::new();
        for setting in Setting::ALL {
            let value = self.get(setting)?;
            all.extend(value.map(|value| (setting.path().to_owned(), value)));
        }
        Ok(all)
    }

    /// Has the server ended by [`restore_left_over`](super::restore_left_over) if this process is
    /// killed. To be called as soon as it was started.
    ///
    /// # Errors
    /// If the journal cannot be written.
    pub fn note_server(&mut self, pid: u32) -> Result<(), HostError> {
        self.journal.server = ProcessId::of(pid);
        self.write_journal()
    }

    /// Has a cgroup removed, as [`HostSettings::note_server`]. To be called before it is made.
    ///
    /// # Errors
    /// If the journal cannot be written.
    pub fn note_group(&mut self, directory: &Path) -> Result<(), HostError> {
        self.journal.group = Some(directory.to_owned());
        self.write_journal()
    }

    /// Has a directory removed with all that is in it, as [`HostSettings::note_server`].
    ///
    /// # Errors
    /// If the journal cannot be written.
    pub fn note_directory(&mut self, directory: &Path) -> Result<(), HostError> {
        if !self.journal.directories.iter().any(|one| one == directory) {
            self.journal.directories.push(directory.to_owned());
        }
        self.write_journal()
    }

    /// Forgets server, cgroup and directories: the run has ended and removed them.
    ///
    /// # Errors
    /// If the journal cannot be written.
    pub fn forget_run(&mut self) -> Result<(), HostError> {
        self.journal.server = None;
        self.journal.group = None;
        self.journal.directories.clear();
        if self.is_written {
            self.write_journal()?;
        }
        Ok(())
    }

    /// Puts everything back, ends what was noted and not forgotten, and removes the journal.
    ///
    /// # Errors
    /// What could not be put back, after all else was; the journal then stays.
    pub fn restore(&mut self) -> Result<(), HostError> {
        if self.is_written {
            undo(&self.root, &self.journal)?;
            self.file.remove()?;
            self.is_written = false;
        }
        Ok(())
    }

    fn write_journal(&mut self) -> Result<(), HostError> {
        self.file.write(&self.journal)?;
        self.is_written = true;
        Ok(())
    }
}

impl Drop for HostSettings {
    fn drop(&mut self) {
        if let Err(error) = self.restore() {
            eprintln!("host settings are not restored: {error}");
            eprintln!("`density --restore` tries again");
        }
    }
}
