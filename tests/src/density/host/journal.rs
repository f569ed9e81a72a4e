//! What has to be undone, on disk before it is done, so that a kill of the benchmark loses nothing.
//!
//! The journal is in a directory that is locked while its owner lives. The kernel drops the lock
//! with the process, so a journal without a lock is that of a killed run.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use procfs::process::Process;
use rustix::fs::{FlockOperation, flock};
use rustix::process::geteuid;
use serde::{Deserialize, Serialize};

use super::error::HostError;
use super::setting::{Root, Setting};

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
const NAME: &str = "journal.json";
/// Where the journal is first written to, then renamed.
const DRAFT: &str = "journal.new";

/// A process, and not another one that has its number later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its number.
    pub pid: u32,
    /// When it began, in clock ticks since the host's boot.
    pub start_time_ticks: u64,
}

impl ProcessId {
    /// The process that has a number now; none if there is none, or only its exit status is left.
    pub fn of(pid: u32) -> Option<ProcessId> {
        let stat = Process::new(i32::try_from(pid).ok()?).ok()?.stat().ok()?;
        let is_over = matches!(stat.state, 'Z' | 'X');
        (!is_over).then_some(ProcessId {
            pid,
            start_time_ticks: stat.starttime,
        })
    }

    /// Whether it still runs.
    pub fn is_alive(self) -> bool {
        ProcessId::of(self.pid) == Some(self)
    }
}

/// What a run did to the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Journal {
    /// The boot of the host that it is about: none of it outlives that.
    pub boot_id: String,
    /// The process of the run.
    pub owner_pid: u32,
    /// What the settings were.
    pub settings: Vec<(Setting, String)>,
    /// The server that it started.
    pub server: Option<ProcessId>,
    /// The memory cgroup that it made.
    pub group: Option<PathBuf>,
    /// Directories for temporary files that it made.
    pub directories: Vec<PathBuf>,
}

impl Journal {
    /// One that has the settings of the host as they are.
    pub(crate) fn of_now(root: &Root) -> Result<Journal, HostError> {
        let mut settings = Vec::new();
        for setting in Setting::ALL {
            settings.extend(setting.read(root)?.map(|value| (setting, value)));
        }
        Ok(Journal {
            boot_id: boot_id()?,
            owner_pid: std::process::id(),
            settings,
            server: None,
            group: None,
            directories: Vec::new(),
        })
    }

    /// Whether the host was not booted since.
    pub(crate) fn is_of_this_boot(&self) -> Result<bool, HostError> {
        Ok(self.boot_id == boot_id()?)
    }
}

fn boot_id() -> Result<String, HostError> {
    let path = Path::new(BOOT_ID);
    let id = fs::read_to_string(path).map_err(HostError::io("read", path))?;
    Ok(id.trim().to_owned())
}

/// The journal's directory, locked for this process.
#[derive(Debug)]
pub(crate) struct JournalFile {
    directory: PathBuf,
    lock: Lock,
    /// The lock that the engine's own benchmark against kernel KSM takes too.
    _ksm_lock: Option<Lock>,
}

/// A file that is locked until this is dropped.
#[derive(Debug)]
struct Lock(File);

impl Drop for Lock {
    fn drop(&mut self) {
        // Not left to the descriptor's end: a child that was forked just now has it too, until it
        // becomes its program. To unlock one is to unlock all (flock(2)).
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}

impl JournalFile {
    /// Makes the directory, and locks it and kernel KSM's settings.
    ///
    /// # Errors
    /// [`HostError::InUse`] while another benchmark runs; errors of the directory.
    pub(crate) fn lock(root: &Root) -> Result<JournalFile, HostError> {
        let ksm = root.path(Setting::KsmRun.path());
        let ksm_lock = match File::open(&ksm) {
            Ok(file) => Some(locked(file, &ksm)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(HostError::io("open", &ksm)(error)),
        };
        let directory = directory(root)?;
        loop {
            let made = DirBuilder::new().mode(0o700).create(&directory);
            if let Err(error) = made
                && error.kind() != io::ErrorKind::AlreadyExists
            {
                return Err(HostError::io("make", &directory)(error));
            }
            let opened = File::open(&directory).map_err(HostError::io("open", &directory))?;
            let lock = locked(opened, &directory)?;
            // Whoever had it before may have removed it between the two lines above.
            if is_at(&lock.0, &directory) {
                return Ok(JournalFile {
                    directory,
                    lock,
                    _ksm_lock: ksm_lock,
                });
            }
        }
    }

    /// Where the journal is.
    pub(crate) fn path(&self) -> PathBuf {
        self.directory.join(NAME)
    }

    /// What a killed run wrote.
    ///
    /// # Errors
    /// If it cannot be read, or is no journal.
    pub(crate) fn read(&self) -> Result<Option<Journal>, HostError> {
        let path = self.path();
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(HostError::io("read", &path)(error)),
        };
        let journal = serde_json::from_str(&text).map_err(|_| HostError::Malformed {
            path,
            text,
            expected: "a journal",
        })?;
        Ok(Some(journal))
    }

    /// Puts the journal on disk; when this returns, a crash of the benchmark does not lose it.
    pub(crate) fn write(&self, journal: &Journal) -> Result<(), HostError> {
        let draft = self.directory.join(DRAFT);
        let failed = || HostError::io("write", &draft);
        let text = serde_json::to_string_pretty(journal).map_err(|error| failed()(error.into()))?;
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&draft)
            .map_err(failed())?;
        file.write_all(text.as_bytes()).map_err(failed())?;
        file.sync_all().map_err(failed())?;
        let path = self.path();
        fs::rename(&draft, &path).map_err(HostError::io("write", &path))?;
        self.lock
            .0
            .sync_all()
            .map_err(HostError::io("write", &self.directory))
    }

    /// Removes the journal: all that it names is undone.
    pub(crate) fn remove(&self) -> Result<(), HostError> {
        for name in [DRAFT, NAME] {
            let path = self.directory.join(name);
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(HostError::io("remove", &path)(error));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

impl Drop for JournalFile {
    fn drop(&mut self) {
        // Fails, as it should, where a journal is left in it.
        let _ = fs::remove_dir(&self.directory);
    }
}

/// Where the journal goes. Root's is in one place, whatever session it is from: host settings
/// belong to no session, and a killed run must be found from any other.
fn directory(root: &Root) -> Result<PathBuf, HostError> {
    const NAME: &str = "samepage-density";
    if *root != Root::host() || geteuid().is_root() {
        return Ok(root.path("/run").join(NAME));
    }
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(directory) => Ok(PathBuf::from(directory).join(NAME)),
        None => Err(HostError::Missing {
            path: PathBuf::from("$XDG_RUNTIME_DIR"),
            value: "a directory for the journal".to_owned(),
        }),
    }
}

fn locked(file: File, path: &Path) -> Result<Lock, HostError> {
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Lock(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(HostError::InUse {
            path: path.to_owned(),
        }),
        Err(error) => Err(HostError::io("lock", path)(error.into())),
    }
}

/// Whether an open directory is still the one with this name.
fn is_at(open: &File, path: &Path) -> bool {
    let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    let (Ok(open), Ok(named)) = (open.metadata(), fs::metadata(path)) else {
        return false;
    };
    identity(open) == identity(named)
}
