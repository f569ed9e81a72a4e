//! The unix socket the API is served on: never open to others, not even for a moment.
//!
//! A socket that is bound and then `chmod`ed is open to everybody in between, and changing the
//! umask around `bind` changes it for every thread of the process. So the socket is bound inside
//! a fresh private directory beside its final place, given its mode there, and renamed into
//! place: the rename also replaces a stale socket in one step.
//!
//! Whoever puts a socket there, or takes it away, holds the lock of its directory: what was found
//! there is then still there. Whoever may read the directory can take its lock too, and keep it. So a
//! server that does not get it in time goes on without: that is unsafe only beside a server that does
//! the same at the same moment. Rejected: a lock file, which would be left behind.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

/// How long another server may hold the directory's lock. It does for some system calls.
const LOCK_TIME: Duration = Duration::from_secs(5);
/// Time between two tries: a lock that is waited for in the kernel has no deadline.
const LOCK_RETRY: Duration = Duration::from_millis(5);

/// Why the API's socket could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// A server answers on this path.
    #[error("api socket {}: another server is running there", .0.display())]
    InUse(PathBuf),
    /// Something that is not a socket is there; it is not ours to remove.
    #[error("api socket {}: exists and is not a socket", .0.display())]
    NotASocket(PathBuf),
    /// The path has no file name, such as `/` or `..`.
    #[error("api socket {}: not a path of a file", .0.display())]
    NoFileName(PathBuf),
    /// A system call failed.
    #[error("api socket {}: cannot {what}: {source}", path.display())]
    Os {
        /// The socket's path.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// The system's answer.
        source: io::Error,
    },
}

/// A listening unix socket of mode 0600, whose file goes away with it.
#[derive(Debug)]
pub struct ApiSocket {
    path: PathBuf,
    /// Device and inode of our socket file, to never remove somebody else's.
    identity: (u64, u64),
}

impl ApiSocket {
    /// Binds and listens on `path`, replacing a socket that nobody listens on any more.
    ///
    /// # Errors
    /// [`SocketError::InUse`] if a server answers there, [`SocketError::NotASocket`] if the path
    /// is taken by a file of another kind, and whatever the system refuses.
    pub fn bind(path: &Path) -> Result<(ApiSocket, UnixListener), SocketError> {
        ApiSocket::bind_within(path, LOCK_TIME)
    }

    fn bind_within(
        path: &Path,
        lock_time: Duration,
    ) -> Result<(ApiSocket, UnixListener), SocketError> {
        let os = |what| {
            move |source: io::Error| SocketError::Os {
                path: path.to_owned(),
                what,
                source,
            }
        };
        if path.file_name().is_none() {
            return Err(SocketError::NoFileName(path.to_owned()));
        }
        // Two servers that start at once must not both find the socket stale: whoever holds the
        // directory's lock looks and binds, the other then finds a live server.
        let parent = directory_of(path);
        let _lock = lock(parent, lock_time).map_err(os("open its directory"))?;
        refuse_live(path)?;

        let private = tempfile::Builder::new()
            .prefix(".s")
            .permissions(std::fs::Permissions::from_mode(0o700))
            .tempdir_in(parent)
            .map_err(os("make a directory beside it"))?;
        let nascent = private.path().join("s");
        let listener = bind_in(private.path()).map_err(os("bind"))?;
        std::fs::set_permissions(&nascent, std::fs::Permissions::from_mode(0o600))
            .map_err(os("set its mode"))?;
        let metadata = std::fs::metadata(&nascent).map_err(os("look at it"))?;
        std::fs::rename(&nascent, path).map_err(os("move it into place"))?;
        let socket = ApiSocket {
            path: path.to_owned(),
            identity: (metadata.dev(), metadata.ino()),
        };
        Ok((socket, listener))
    }

    /// Where clients connect to.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes the file if it is still ours. Under the directory's lock: another server may be
    /// putting its own there between our look and the removal.
    fn remove(&self, lock_time: Duration) -> io::Result<()> {
        let _lock = lock(directory_of(&self.path), lock_time)?;
        let ours = std::fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.identity);
        if ours {
            std::fs::remove_file(&self.path)?;
        }
        Ok(())
    }
}

impl Drop for ApiSocket {
    fn drop(&mut self) {
        // A socket that is left is stale, and the next server replaces it.
        if let Err(error) = self.remove(LOCK_TIME) {
            log::warn!("api socket {}: cannot remove: {error}", self.path.display());
        }
    }
}

/// Binds a socket `s`. By way of a descriptor of its directory: the directory's own path is longer than
/// the final one, which the kernel may just accept (`sun_path` of unix(7)).
fn bind_in(directory: &Path) -> io::Result<UnixListener> {
    let opened = File::open(directory)?;
    UnixListener::bind(format!("/proc/self/fd/{}/s", opened.as_raw_fd()))
}

fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Locks a directory for as long as the file lives, if nobody else keeps its lock for `time`.
fn lock(directory: &Path, time: Duration) -> io::Result<File> {
    let deadline = Instant::now() + time;
    let opened = File::open(directory)?;
    loop {
        match flock(&opened, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(opened),
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => thread::sleep(LOCK_RETRY),
            Err(Errno::WOULDBLOCK) => {
                log::warn!(
                    "{}: another process has held its lock for {time:?}; going on without",
                    directory.display()
                );
                return Ok(opened);
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Succeeds if nothing is at `path` or a socket that nobody listens on.
fn refuse_live(path: &Path) -> Result<(), SocketError> {
    let os = |what, source| SocketError::Os {
        path: path.to_owned(),
        what,
        source,
    };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(os("look at it", error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(SocketError::NotASocket(path.to_owned()));
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(SocketError::InUse(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(()),
        Err(error) => Err(os("ask whether a server is there", error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_is_private_and_goes_away_on_drop() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        let (socket, listener) = ApiSocket::bind(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().mode();
        assert_eq!(mode & 0o7777, 0o600);
        UnixStream::connect(&path).unwrap();
        listener.accept().unwrap();
        drop(socket);
        let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
        assert!(left.is_empty(), "left behind: {left:?}");
    }

    #[test]
    fn live_server_is_refused_and_stale_socket_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        let (first, listener) = ApiSocket::bind(&path).unwrap();
        let refused = ApiSocket::bind(&path).unwrap_err();
        assert!(matches!(refused, SocketError::InUse(_)), "{refused}");

        // As after a crash: nobody listens, the file is still there.
        drop(listener);
        let (second, _listener) = ApiSocket::bind(&path).unwrap();
        // The first one's drop must leave the second one's socket alone.
        drop(first);
        UnixStream::connect(second.path()).unwrap();
    }

    #[test]
    fn socket_is_bound_and_removed_although_somebody_keeps_the_directorys_lock() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        let others = File::open(dir.path()).unwrap();
        flock(&others, FlockOperation::LockExclusive).unwrap();
        let (socket, _listener) = ApiSocket::bind_within(&path, Duration::ZERO).unwrap();
        UnixStream::connect(&path).unwrap();
        socket.remove(Duration::ZERO).unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn server_waits_for_the_directorys_lock() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        let others = lock(dir.path(), Duration::ZERO).unwrap();
        let binding = thread::spawn({
            let path = path.clone();
            move || ApiSocket::bind_within(&path, Duration::from_secs(600)).map(drop)
        });
        // It cannot be there while the lock is held, however long the thread takes to begin.
        assert!(!path.exists());
        drop(others);
        binding.join().unwrap().unwrap();
    }

    #[test]
    fn path_may_be_as_long_as_the_kernel_takes() {
        let dir = tempfile::tempdir().unwrap();
        // `sun_path` has 108 bytes, the last of them a zero.
        let left = 107 - dir.path().as_os_str().len() - "/".len();
        // Of these two the second one leaves no room for a longer name beside the socket's.
        let parent = dir.path().join("d".repeat(left - "/s".len()));
        std::fs::create_dir(&parent).unwrap();
        for path in [dir.path().join("s".repeat(left)), parent.join("s")] {
            assert_eq!(path.as_os_str().len(), 107);
            let (_socket, _listener) = ApiSocket::bind(&path).unwrap();
            UnixStream::connect(&path).unwrap();
        }
    }

    #[test]
    fn file_of_another_kind_is_never_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("precious.txt");
        std::fs::write(&path, "data").unwrap();
        let refused = ApiSocket::bind(&path).unwrap_err();
        assert!(matches!(refused, SocketError::NotASocket(_)), "{refused}");
        assert_eq!(std::fs::read(&path).unwrap(), b"data");
    }
}
