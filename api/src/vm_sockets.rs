//! A socket for each VM, on which it has Firecracker's API for itself: `/` is `/vms/{id}` there.
//!
//! Clients of Firecracker know one VM a socket. So each VM has a file `ID.sock` of mode 0600 in one
//! directory of mode 0700, from its creation to its removal. It can be given to somebody who is to
//! control this VM and no other: nothing else of the server is reached through it.
//!
//! Which sockets there are follows from which VMs there are ([`VmSockets::follow`]). Rejected: to
//! open one as a step of a creation. VMs come in other ways too, as those of adopted monitors do.
//!
//! # Locks
//! `open` is held while sockets are made and removed. The roster of the backend is taken under it. No
//! request and no end of the server waits long for it: the directory's storage may hang.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::net::UnixListener;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};
use tokio::task::spawn_blocking;
use tokio::time::timeout;
use vmm::VmId;

use crate::fault::Fault;
use crate::server::{self, Serving};
use crate::socket::{ApiSocket, SocketError};

/// Longest path that a client can connect to (`sun_path` of unix(7), with a zero behind it).
const PATH_BYTES_MAX: usize = 107;
/// Most connections to one VM's socket at a time, Firecracker's limit.
const CONNECTIONS_MAX: usize = 10;
/// How long the directory is waited for.
pub(crate) const DIRECTORY_TIME: Duration = Duration::from_secs(1);

/// Why there can be no sockets in a directory.
#[derive(Debug, thiserror::Error)]
pub enum VmSocketsError {
    /// Others may put their own sockets there.
    #[error("vm sockets {}: others may write to it", .0.display())]
    Open(PathBuf),
    /// A system call failed.
    #[error("vm sockets {}: {source}", path.display())]
    Os {
        /// The directory.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
}

/// The sockets of all VMs.
#[derive(Debug)]
pub struct VmSockets {
    directory: PathBuf,
    /// `None` once the server stops.
    open: Mutex<Option<BTreeMap<VmId, VmSocket>>>,
    /// Whoever follows: one thread waits for the directory, not one for each request.
    turn: Arc<Semaphore>,
}

/// One VM's.
#[derive(Debug)]
struct VmSocket {
    _file: ApiSocket,
    /// Ends the task that accepts, and has its connections finish, when it is dropped.
    _stop: watch::Sender<bool>,
}

impl VmSockets {
    /// Sockets in `directory`, which is made if it is missing.
    ///
    /// # Errors
    /// If it cannot be made, or others may write to it.
    pub fn in_directory(directory: &Path) -> Result<VmSockets, VmSocketsError> {
        let os = |source| VmSocketsError::Os {
            path: directory.to_owned(),
            source,
        };
        let mut builder = std::fs::DirBuilder::new();
        builder
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(os)?;
        if std::fs::metadata(directory).map_err(os)?.mode() & 0o022 != 0 {
            return Err(VmSocketsError::Open(directory.to_owned()));
        }
        remove_stale(directory).map_err(os)?;
        Ok(VmSockets {
            directory: std::path::absolute(directory).map_err(os)?,
            open: Mutex::new(Some(BTreeMap::new())),
            turn: Arc::new(Semaphore::new(1)),
        })
    }

    fn path_of(&self, id: &VmId) -> PathBuf {
        self.directory.join(format!("{id}.sock"))
    }

    /// Refuses a VM whose socket nobody could connect to.
    ///
    /// # Errors
    /// 400 if its path is too long.
    pub fn check(&self, id: &VmId) -> Result<(), Fault> {
        let path = self.path_of(id);
        if path.as_os_str().len() <= PATH_BYTES_MAX {
            return Ok(());
        }
        Err(Fault::bad_request(format!(
            "vm {id}: the path of its socket, {}, is longer than {PATH_BYTES_MAX} bytes",
            path.display()
        )))
    }

    /// Makes the sockets of VMs that have none, and removes those of VMs that are gone. Where the
    /// directory does not answer the next one to follow does it.
    pub async fn follow(self: &Arc<VmSockets>, serving: Serving) {
        let sockets = Arc::clone(self);
        let following = async move {
            let turn = Arc::clone(&sockets.turn).acquire_owned().await;
            let follow = move || {
                sockets.bring_in_line(&serving);
                drop(turn);
            };
            spawn_blocking(follow).await
        };
        match timeout(DIRECTORY_TIME, following).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => log::error!("sockets of vms: {error}"),
            Err(_) => self.warn_of_silence(),
        }
    }

    fn warn_of_silence(&self) {
        let directory = self.directory.display();
        log::warn!("vm sockets {directory}: no answer within {DIRECTORY_TIME:?}");
    }

    fn bring_in_line(&self, serving: &Serving) {
        let mut open = self.lock();
        let Some(open) = open.as_mut() else {
            return;
        };
        // Lock order: this one -> roster. Asked under the lock, so that the last one to ask is right.
        let ids = serving.backend.vm_ids();
        open.retain(|id, _| ids.contains(id));
        for id in ids {
            if open.contains_key(&id) {
                continue;
            }
            match self.bind(&id, serving) {
                Ok(socket) => {
                    open.insert(id, socket);
                }
                // The VM is there, and is reached through the server's own socket.
                Err(error) => log::error!("vm {id}: {error}"),
            }
        }
    }

    fn bind(&self, id: &VmId, serving: &Serving) -> Result<VmSocket, SocketError> {
        let path = self.path_of(id);
        let (file, listener) = ApiSocket::bind(&path)?;
        let os = |source| SocketError::Os {
            path: path.clone(),
            what: "listen",
            source,
        };
        listener.set_nonblocking(true).map_err(os)?;
        let listener = UnixListener::from_std(listener).map_err(os)?;
        let (stop, stopped) = watch::channel(false);
        let serving = Serving {
            vm: Some(id.clone()),
            ..serving.clone()
        };
        let accepting = server::accept_until(listener, CONNECTIONS_MAX, serving, stopped);
        Handle::current().spawn(accepting);
        Ok(VmSocket {
            _file: file,
            _stop: stop,
        })
    }

    /// Removes all sockets, for good.
    pub async fn close(self: Arc<VmSockets>) {
        let sockets = Arc::clone(&self);
        let closing = spawn_blocking(move || drop(sockets.lock().take()));
        if timeout(DIRECTORY_TIME, closing).await.is_err() {
            self.warn_of_silence();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<BTreeMap<VmId, VmSocket>>> {
        // Changed by single inserts and removes: whole after any panic.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Removes the sockets that a server left which was killed. One that somebody listens on stays, and so
/// does all that is no socket of a VM.
fn remove_stale(directory: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        let is_named = path.extension().is_some_and(|ending| ending == "sock");
        let is_socket = || {
            let metadata = std::fs::symlink_metadata(&path);
            metadata.is_ok_and(|metadata| metadata.file_type().is_socket())
        };
        let is_refused = || {
            let connected = UnixStream::connect(&path);
            connected.is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
        };
        if is_named && is_socket() && is_refused() {
            std::fs::remove_file(&path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::sync::mpsc;

    use super::*;
    use crate::front_door::FrontDoor;
    use crate::server::Backend;

    #[test]
    fn a_directory_that_others_may_write_to_is_refused() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("new");
        VmSockets::in_directory(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().mode();
        assert_eq!(mode & 0o777, 0o700);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o770)).unwrap();
        let refused = VmSockets::in_directory(&path).unwrap_err();
        assert!(matches!(refused, VmSocketsError::Open(_)), "{refused}");
    }

    #[test]
    fn sockets_that_nobody_listens_on_are_removed_and_nothing_else_is() {
        let parent = tempfile::tempdir().unwrap();
        let bind = |name: &str| std::os::unix::net::UnixListener::bind(parent.path().join(name));
        drop(bind("stale.sock").unwrap());
        let _live = bind("live.sock").unwrap();
        drop(bind("other").unwrap());
        std::fs::write(parent.path().join("file.sock"), "text").unwrap();
        VmSockets::in_directory(parent.path()).unwrap();
        let left = std::fs::read_dir(parent.path()).unwrap();
        let mut left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["file.sock", "live.sock", "other"]);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_directory_that_hangs_keeps_neither_the_start_nor_the_end_of_the_server() {
        let parent = tempfile::tempdir().unwrap();
        let sockets = Arc::new(VmSockets::in_directory(&parent.path().join("vms")).unwrap());
        let theirs = Arc::clone(&sockets);
        let (let_go, held) = mpsc::channel::<()>();
        let (hung, hangs) = mpsc::channel();
        // As one that makes a socket there.
        let holder = std::thread::spawn(move || {
            let _open = theirs.lock();
            hung.send(()).unwrap();
            held.recv().unwrap_err();
        });
        hangs.recv().unwrap();
        let listener = UnixListener::bind(parent.path().join("api.sock")).unwrap();
        let door = Arc::new(FrontDoor::new(dedup::Settings::default()));
        let serving = Serving::new(Backend::InProcess(door), Some(sockets));
        let stop = std::future::ready(());
        let served = tokio::spawn(server::serve(listener, serving, stop));
        let served = timeout(Duration::from_secs(120), served).await;
        drop(let_go);
        holder.join().unwrap();
        served.expect("the server ends").unwrap().unwrap();
    }

    #[test]
    fn a_vm_whose_socket_nobody_could_connect_to_is_refused() {
        let parent = tempfile::tempdir().unwrap();
        let sockets = VmSockets::in_directory(&parent.path().join("d".repeat(60))).unwrap();
        sockets.check(&"a".parse().unwrap()).unwrap();
        let fault = sockets.check(&"a".repeat(64).parse().unwrap()).unwrap_err();
        assert!(fault.message.contains("107 bytes"), "{}", fault.message);
    }
}
