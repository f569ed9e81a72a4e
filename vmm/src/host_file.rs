//! Files of the host that a configuration names: opened without side effects.

use std::fs::{File, FileType, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

/// What a file turned out to be where another kind was wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{found}, not a {wanted}")]
pub(crate) struct WrongKind {
    /// The file's kind.
    pub(crate) found: &'static str,
    /// The kinds that are allowed.
    pub(crate) wanted: &'static str,
}

/// Which kinds of file are allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Allowed {
    /// Regular files.
    Regular,
    /// Regular files and block devices.
    Sectors,
}

/// Opens a file for reading, and for writing where `is_writable`, once its kind is known to be allowed.
///
/// The kind is judged on a descriptor that opens nothing (`O_PATH`), and that very file is opened
/// then. Rejected: opening first and judging then. A named pipe's writer would lose what it wrote, a
/// tape would be rewound. Rejected: judging the path. It may name another file a moment later.
///
/// # Errors
/// The system's answer; [`io::ErrorKind::InvalidInput`] with a [`WrongKind`] for another kind.
pub(crate) fn open(path: &Path, is_writable: bool, allowed: Allowed) -> io::Result<File> {
    let named = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(path)?;
    let kind = named.metadata()?.file_type();
    let is_allowed = kind.is_file() || (allowed == Allowed::Sectors && kind.is_block_device());
    if !is_allowed {
        let wanted = match allowed {
            Allowed::Regular => "regular file",
            Allowed::Sectors => "regular file or block device",
        };
        let found = name_of(kind);
        let error = WrongKind { found, wanted };
        return Err(io::Error::new(io::ErrorKind::InvalidInput, error));
    }
    OpenOptions::new()
        .read(true)
        .write(is_writable)
        // Neither flag changes anything for the kinds that are allowed. They stay as a second
        // line of defence; `O_CLOEXEC` is the standard library's own.
        .custom_flags(libc::O_NOCTTY | libc::O_NONBLOCK)
        .open(format!("/proc/self/fd/{}", named.as_raw_fd()))
}

/// Locks a whole file for as long as it is open: for itself where `is_exclusive`, else with other
/// readers. The kernel drops the lock with the last descriptor of this very opening
/// (`F_OFD_SETLK`, fcntl(2)).
///
/// Rejected: `F_SETLK`. Two VMs of one process would both get it, and any close would drop it.
///
/// # Errors
/// [`io::ErrorKind::WouldBlock`] when somebody else holds it; else the system's answer.
pub(crate) fn lock(file: &File, is_exclusive: bool) -> io::Result<()> {
    let kind = if is_exclusive {
        libc::F_WRLCK
    } else {
        libc::F_RDLCK
    };
    let whole = libc::flock {
        l_type: i16::try_from(kind).map_err(io::Error::other)?,
        l_whence: i16::try_from(libc::SEEK_SET).map_err(io::Error::other)?,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    match fcntl(file, FcntlArg::F_OFD_SETLK(&whole)) {
        Ok(_) => Ok(()),
        Err(Errno::EACCES) => Err(io::ErrorKind::WouldBlock.into()),
        Err(error) => Err(error.into()),
    }
}

/// The [`WrongKind`] that [`open`] failed with, if it was that.
pub(crate) fn wrong_kind(error: &io::Error) -> Option<WrongKind> {
    error.get_ref()?.downcast_ref::<WrongKind>().copied()
}

fn name_of(kind: FileType) -> &'static str {
    match () {
        () if kind.is_dir() => "directory",
        () if kind.is_fifo() => "named pipe",
        () if kind.is_char_device() => "character device",
        () if kind.is_block_device() => "block device",
        () if kind.is_socket() => "socket",
        () => "special file",
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::thread;

    use rustix::fs::{CWD, FileType as NodeType, Mode, mknodat};

    use super::*;

    fn refused(path: &Path, allowed: Allowed) -> String {
        let error = open(path, false, allowed).unwrap_err();
        assert!(wrong_kind(&error).is_some(), "{error:?}");
        error.to_string()
    }

    #[test]
    fn other_kinds_are_refused_by_their_name() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(
            refused(directory.path(), Allowed::Regular),
            "directory, not a regular file"
        );
        assert_eq!(
            refused(Path::new("/dev/null"), Allowed::Sectors),
            "character device, not a regular file or block device"
        );
        let missing = open(&directory.path().join("none"), false, Allowed::Sectors).unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
        assert_eq!(wrong_kind(&missing), None);
    }

    #[test]
    fn the_writer_of_a_named_pipe_loses_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pipe");
        mknodat(CWD, &path, NodeType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        // Waits in open until somebody reads.
        let writer = thread::spawn({
            let path = path.clone();
            move || {
                let mut pipe = OpenOptions::new().write(true).open(path).unwrap();
                pipe.write_all(b"precious")
            }
        });
        for _ in 0..100 {
            assert_eq!(
                refused(&path, Allowed::Regular),
                "named pipe, not a regular file"
            );
        }
        let mut text = String::new();
        File::open(&path)
            .unwrap()
            .read_to_string(&mut text)
            .unwrap();
        writer.join().unwrap().unwrap();
        assert_eq!(text, "precious");
    }

    #[test]
    fn one_may_write_or_several_may_read() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || open(file.path(), true, Allowed::Sectors).unwrap();
        let (first, second) = (open(), open());
        lock(&first, true).unwrap();
        for is_exclusive in [true, false] {
            let error = lock(&second, is_exclusive).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "{error}");
        }
        // A descriptor of another opening that is closed does not take the lock away.
        drop(second);
        lock(&open(), true).unwrap_err();
        drop(first);
        let (one, two) = (open(), open());
        lock(&one, false).unwrap();
        lock(&two, false).unwrap();
        lock(&open(), true).unwrap_err();
    }

    #[test]
    fn a_regular_file_is_opened_for_what_was_asked() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"abc").unwrap();
        let mut text = String::new();
        let mut read_only = open(file.path(), false, Allowed::Regular).unwrap();
        read_only.read_to_string(&mut text).unwrap();
        assert_eq!(text, "abc");
        read_only.write_all(b"x").unwrap_err();
        let mut writable = open(file.path(), true, Allowed::Sectors).unwrap();
        writable.write_all(b"x").unwrap();
    }
}
