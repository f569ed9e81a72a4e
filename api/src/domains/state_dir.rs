//! The directory that outlives the front door: how a new one finds what the last one left.
//!
//! ```text
//! lock                          held while a front door lives
//! domains/<name>/api.sock       where the domain's monitor listens
//! domains/<name>/log            the monitor's standard error; locked while one lives
//! domains/<name>/vms/<id>       the configuration of a VM, and how its monitor ended under it
//! domains/<name>/consoles/<id>  what its console showed last
//! domains/<name>/cgroup         a link to the domain's cgroup, if it has one
//! domains/<name>/transient      the monitor ends with its front door, and its VMs with it
//! ```
//!
//! A monitor has its log open for as long as it lives, and the kernel keeps a lock (flock(2)) for as
//! long. So whether a domain's monitor lives is known also of one that hangs. Rejected: a connection
//! that is refused as the sign. A monitor that starts, ends or hangs may refuse one.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, socket_with};
use serde::{Deserialize, Serialize};
use vmm::VmId;
use vmm::config::VmConfig;

use crate::console_tails::{ConsoleTails, open_regular};
use crate::domain_name::DomainName;

const SOCKET: &str = "api.sock";
const LOG: &str = "log";
const CGROUP: &str = "cgroup";
const TRANSIENT: &str = "transient";
/// Most of a record that is read; a configuration comes in a request, which is smaller.
const RECORD_BYTES_MAX: u64 = 1 << 20;
/// How much of the end of a log is looked at for its last line.
const LAST_WORDS_BYTES: u64 = 4096;

/// Why a state directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateDirError {
    /// A server that lives uses it.
    #[error("state directory {}: another server uses it", .0.display())]
    InUse(PathBuf),
    /// Somebody else could put sockets and records into it.
    #[error("state directory {}: others may write to it (owner {owner}, mode {mode:o})", path.display())]
    NotPrivate {
        /// The directory.
        path: PathBuf,
        /// User id of its owner.
        owner: u32,
        /// Its permissions.
        mode: u32,
    },
    /// A system call failed.
    #[error("state directory {}: {source}", path.display())]
    Os {
        /// The directory.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

/// A state directory that is ours alone for as long as this lives.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    /// The kernel drops the lock with the last descriptor; monitors inherit none.
    _lock: File,
}

impl StateDir {
    /// Takes the directory, making it if it is not there.
    ///
    /// # Errors
    /// [`StateDirError::InUse`] if another process has it, [`StateDirError::NotPrivate`] if others
    /// may write to it.
    pub fn open(path: &Path) -> Result<StateDir, StateDirError> {
        let os = |source| StateDirError::Os {
            path: path.to_owned(),
            source,
        };
        for path in [path, &path.join("domains")] {
            make_private(path).map_err(os)?;
            let metadata = std::fs::metadata(path).map_err(os)?;
            let (owner, mode) = (metadata.uid(), metadata.mode() & 0o7777);
            // Others may look into the directory itself, as into /run, but not further.
            if owner != rustix::process::geteuid().as_raw() || mode & 0o022 != 0 {
                return Err(StateDirError::NotPrivate {
                    path: path.to_owned(),
                    owner,
                    mode,
                });
            }
        }
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(path.join("lock"))
            .map_err(os)?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(StateDir {
                path: path.to_owned(),
                _lock: lock,
            }),
            Err(Errno::WOULDBLOCK) => Err(StateDirError::InUse(path.to_owned())),
            Err(error) => Err(os(error.into())),
        }
    }

    /// The place of a domain, which may not exist yet.
    pub fn domain(&self, name: &DomainName) -> DomainDir {
        DomainDir {
            path: self.path.join("domains").join(name.to_string()),
        }
    }

    /// The domains that have a place. What is no name of a domain is not ours, and is left alone.
    ///
    /// # Errors
    /// If the directory cannot be read.
    pub fn domains(&self) -> io::Result<Vec<DomainName>> {
        names_in(&self.path.join("domains"))
    }
}

/// What is noted of a VM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Its configuration.
    pub config: VmConfig,
    /// How its monitor ended under it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub crashed: Option<String>,
}

/// The place of one domain.
#[derive(Debug, Clone)]
pub struct DomainDir {
    path: PathBuf,
}

impl DomainDir {
    /// Makes the place, and a socket in it that nobody listens on yet. What another monitor left there
    /// goes, but for records. `is_transient` says whether the monitor ends with its front door.
    ///
    /// # Errors
    /// What the system says.
    pub fn bind(&self, is_transient: bool) -> io::Result<OwnedFd> {
        make_private(self.tails().directory())?;
        self.remove_socket()?;
        remove_if_there(&self.path.join(TRANSIENT))?;
        if is_transient {
            File::create(self.path.join(TRANSIENT))?;
        }
        // The directory is private, so nobody can connect before the monitor is there.
        let opened = File::open(&self.path)?;
        let address = SocketAddrUnix::new(socket_in(&opened))?;
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        bind(&socket, &address)?;
        Ok(socket)
    }

    /// Connects to the domain's monitor.
    ///
    /// # Errors
    /// `ConnectionRefused` or `NotFound` if none listens; `WouldBlock` if one does not accept.
    pub async fn connect(&self) -> io::Result<tokio::net::UnixStream> {
        let opened = File::open(&self.path)?;
        tokio::net::UnixStream::connect(socket_in(&opened)).await
    }

    /// Takes the socket away, if there is one.
    ///
    /// # Errors
    /// What the system says.
    pub fn remove_socket(&self) -> io::Result<()> {
        remove_if_there(&self.path.join(SOCKET))
    }

    /// The file for what monitors of this domain say, each behind the last one. It is locked until the
    /// last copy of this descriptor is closed: the monitor's.
    ///
    /// # Errors
    /// `WouldBlock` while an earlier monitor lives; what the system says.
    pub fn lock_log(&self) -> io::Result<File> {
        make_private(&self.path)?;
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(self.path.join(LOG))?;
        flock(&log, FlockOperation::NonBlockingLockExclusive)?;
        Ok(log)
    }

    /// Whether a monitor of this domain lives, hung or not.
    ///
    /// # Errors
    /// What the system says; then it is not known.
    pub fn has_monitor(&self) -> io::Result<bool> {
        let log = match open_regular(&self.path.join(LOG)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            log => log?,
        };
        match flock(&log, FlockOperation::NonBlockingLockShared) {
            Ok(()) => Ok(false),
            Err(Errno::WOULDBLOCK) => Ok(true),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether the domain's monitor was started to end with its front door.
    pub fn is_transient(&self) -> bool {
        self.path.join(TRANSIENT).exists()
    }

    /// The last line that the monitor said; empty if it said nothing.
    pub fn last_words(&self) -> String {
        let read = || {
            let mut log = open_regular(&self.path.join(LOG))?;
            let length_bytes = log.metadata()?.len();
            log.seek(SeekFrom::Start(
                length_bytes.saturating_sub(LAST_WORDS_BYTES),
            ))?;
            let mut end = Vec::new();
            log.take(LAST_WORDS_BYTES).read_to_end(&mut end)?;
            io::Result::Ok(end)
        };
        let end = read().unwrap_or_default();
        let end = String::from_utf8_lossy(&end);
        end.lines().last().unwrap_or_default().to_owned()
    }

    /// Where the ends of its VMs' consoles are.
    pub fn tails(&self) -> ConsoleTails {
        ConsoleTails::new(self.path.join("consoles"))
    }

    /// Notes the domain's cgroup.
    ///
    /// # Errors
    /// What the system says.
    pub fn link_cgroup(&self, cgroup: &Path) -> io::Result<()> {
        let link = self.path.join(CGROUP);
        remove_if_there(&link)?;
        std::os::unix::fs::symlink(cgroup, link)
    }

    /// The domain's cgroup, if one was noted.
    pub fn cgroup(&self) -> Option<PathBuf> {
        std::fs::read_link(self.path.join(CGROUP)).ok()
    }

    /// Notes a VM. A reader finds all of it or nothing.
    ///
    /// # Errors
    /// What the system says.
    pub fn write_record(&self, id: &VmId, record: &Record) -> io::Result<()> {
        let directory = self.path.join("vms");
        make_private(&directory)?;
        let mut file = tempfile::NamedTempFile::with_prefix_in(".", &directory)?;
        file.write_all(&serde_json::to_vec(record)?)?;
        file.persist(directory.join(id.as_str()))
            .map_err(|error| error.error)?;
        Ok(())
    }

    /// Takes the note of a VM away, if there is one.
    pub fn remove_record(&self, id: &VmId) {
        if let Err(error) = remove_if_there(&self.path.join("vms").join(id.as_str())) {
            log::warn!("vm {id}: cannot remove its record: {error}");
        }
    }

    /// The VMs that are noted here. Of a note that cannot be read there is the id alone.
    ///
    /// # Errors
    /// If the directory cannot be read.
    pub fn records(&self) -> io::Result<Vec<(VmId, Option<Record>)>> {
        let directory = self.path.join("vms");
        let ids: Vec<VmId> = names_in(&directory)?;
        let read = |id: VmId| {
            let mut text = Vec::new();
            let record = open_regular(&directory.join(id.as_str()))
                .and_then(|file| file.take(RECORD_BYTES_MAX).read_to_end(&mut text))
                .and_then(|_| Ok(serde_json::from_slice(&text)?));
            if let Err(error) = &record {
                log::error!("vm {id}: its record is unreadable: {error}");
            }
            (id, record.ok())
        };
        Ok(ids.into_iter().map(read).collect())
    }

    /// Takes the place away with all that is in it.
    pub fn remove(&self) {
        if let Err(error) = std::fs::remove_dir_all(&self.path)
            && error.kind() != io::ErrorKind::NotFound
        {
            log::warn!("{}: cannot remove: {error}", self.path.display());
        }
    }
}

/// The socket by a path that is short enough for a socket, whatever the directory's is.
fn socket_in(directory: &File) -> PathBuf {
    format!("/proc/self/fd/{}/{SOCKET}", directory.as_raw_fd()).into()
}

fn make_private(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The entries of a directory whose names can be read as a `T`; none if it is not there.
fn names_in<T: std::str::FromStr>(directory: &Path) -> io::Result<Vec<T>> {
    let entries = match std::fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry?.file_name();
        names.extend(name.to_str().and_then(|name| name.parse().ok()));
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn domain_in(root: &Path, name: &str) -> DomainDir {
        StateDir::open(root).unwrap().domain(&name.parse().unwrap())
    }

    #[test]
    fn directory_is_one_servers_at_a_time() {
        let root = tempfile::tempdir().unwrap();
        let first = StateDir::open(root.path()).unwrap();
        let second = StateDir::open(root.path()).unwrap_err();
        assert!(second.to_string().ends_with("another server uses it"));
        drop(first);
        StateDir::open(root.path()).unwrap();
    }

    #[test]
    fn directory_that_others_may_write_to_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("state");
        std::fs::create_dir(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o775)).unwrap();
        let refused = StateDir::open(&path).unwrap_err();
        assert!(refused.to_string().contains("mode 775"), "{refused}");
    }

    #[test]
    fn domains_and_records_are_found_again_and_strangers_are_left_alone() {
        let root = tempfile::tempdir().unwrap();
        let state = StateDir::open(root.path()).unwrap();
        let name: DomainName = "vm:a".parse().unwrap();
        let dir = state.domain(&name);
        drop(dir.bind(false).unwrap());
        let id: VmId = "a".parse().unwrap();
        let record = Record {
            config: VmConfig::new("builtin:pageload"),
            crashed: Some("signal: 9 (SIGKILL)".to_owned()),
        };
        dir.write_record(&id, &record).unwrap();
        std::fs::write(root.path().join("domains/lost+found"), "").unwrap();

        assert_eq!(state.domains().unwrap(), [name]);
        assert_eq!(dir.records().unwrap(), [(id.clone(), Some(record))]);
        std::fs::write(root.path().join("domains/vm:a/vms/a"), "{").unwrap();
        assert_eq!(dir.records().unwrap(), [(id.clone(), None)]);
        dir.remove_record(&id);
        assert!(dir.records().unwrap().is_empty());
        dir.remove();
        assert!(state.domains().unwrap().is_empty());
    }

    #[test]
    fn a_monitor_is_known_to_live_until_its_log_is_closed() {
        let root = tempfile::tempdir().unwrap();
        let dir = domain_in(root.path(), "ci");
        assert!(!dir.has_monitor().unwrap());
        let mut log = dir.lock_log().unwrap();
        let inherited = log.try_clone().unwrap();
        log.write_all(b"first\nlast\n").unwrap();
        drop(log);
        assert!(dir.has_monitor().unwrap());
        let second = dir.lock_log().unwrap_err();
        assert_eq!(second.kind(), io::ErrorKind::WouldBlock);
        drop(inherited);
        assert!(!dir.has_monitor().unwrap());
        assert_eq!(dir.last_words(), "last");
    }

    #[tokio::test]
    async fn socket_is_reached_once_it_is_listened_on_however_long_the_path_is() {
        let root = tempfile::tempdir().unwrap();
        let dir = domain_in(&root.path().join("d".repeat(120)), "ci");
        let missing = dir.connect().await.unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
        let socket = dir.bind(false).unwrap();
        let refused = dir.connect().await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        rustix::net::listen(&socket, 1).unwrap();
        dir.connect().await.unwrap();
    }
}
