//! The host's end: unix sockets.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, fchmod};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};

/// Connections that wait to be taken by the event loop.
const BACKLOG: i32 = 64;

/// Where connections come from and go to. Nothing of it waits.
pub trait VsockHost: Send {
    /// Takes a connection to the guest, which does not block.
    ///
    /// # Errors
    /// `WouldBlock` where there is none; what else the system says.
    fn accept(&self) -> io::Result<UnixStream>;
    /// Connects to what serves `port` on the host. The connection does not block.
    ///
    /// # Errors
    /// Nobody serves it, or has not taken what was there before; what else the system says.
    fn connect(&self, port: u32) -> io::Result<UnixStream>;
    /// Is readable while there is a connection to be taken.
    fn fd(&self) -> RawFd;
}

/// Firecracker's unix sockets: clients of the guest connect to a path, servers for it listen on that
/// path with `_` and their port.
#[derive(Debug)]
pub struct VsockSocket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the socket's file, to never remove somebody else's.
    identity: (u64, u64),
}

impl VsockSocket {
    /// Binds `path`, with mode 0600 from the first moment on. Its file is removed with it.
    ///
    /// # Errors
    /// `AlreadyExists` if there is something; what else the system says.
    pub fn bind(path: &Path) -> io::Result<VsockSocket> {
        let socket = nonblocking()?;
        // A socket's file gets the mode of its inode (`unix_bind_bsd` of Linux).
        fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
        bind(&socket, &SocketAddrUnix::new(path)?).map_err(|error| match error {
            rustix::io::Errno::ADDRINUSE => {
                io::Error::new(io::ErrorKind::AlreadyExists, "exists already")
            }
            error => error.into(),
        })?;
        let metadata = fs::symlink_metadata(path)?;
        let socket = VsockSocket {
            listener: UnixListener::from(socket),
            path: path.to_owned(),
            identity: (metadata.dev(), metadata.ino()),
        };
        listen(&socket.listener, BACKLOG)?;
        Ok(socket)
    }
}

fn nonblocking() -> io::Result<rustix::fd::OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    Ok(socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        flags,
        None,
    )?)
}

impl VsockHost for VsockSocket {
    fn accept(&self) -> io::Result<UnixStream> {
        let (stream, _) = self.listener.accept()?;
        stream.set_nonblocking(true)?;
        Ok(stream)
    }

    fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let mut path = OsString::from(&self.path);
        path.push(format!("_{port}"));
        let socket = nonblocking()?;
        connect(&socket, &SocketAddrUnix::new(Path::new(&path))?)?;
        Ok(UnixStream::from(socket))
    }

    fn fd(&self) -> RawFd {
        self.listener.as_raw_fd()
    }
}

impl Drop for VsockSocket {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.identity);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            log::warn!("vsock {}: cannot remove: {error}", self.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_socket_is_its_owners_alone_and_goes_with_its_device() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("v");
        let socket = VsockSocket::bind(&path).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(
            socket.accept().unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
        let mut client = UnixStream::connect(&path).unwrap();
        client.write_all(b"x").unwrap();
        socket.accept().unwrap().read_exact(&mut [0]).unwrap();
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn what_is_there_already_is_neither_replaced_nor_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("v");
        let socket = VsockSocket::bind(&path).unwrap();
        let second = VsockSocket::bind(&path).unwrap_err();
        assert_eq!(second.kind(), io::ErrorKind::AlreadyExists);
        fs::remove_file(&path).unwrap();
        fs::write(&path, "of somebody else").unwrap();
        drop(socket);
        assert!(path.exists());
    }

    #[test]
    fn a_server_that_takes_no_connections_is_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let socket = VsockSocket::bind(&directory.path().join("v")).unwrap();
        let refused = socket.connect(5).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::NotFound);
        let server = VsockSocket::bind(&directory.path().join("v_5")).unwrap();
        let waiting: Vec<_> = (0..=BACKLOG).map(|_| socket.connect(5).unwrap()).collect();
        let full = socket.connect(5).unwrap_err();
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
        server.accept().unwrap();
        drop(waiting);
    }
}
