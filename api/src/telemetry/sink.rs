//! A file or a named pipe that lines are written to.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use crate::spool::{SLOW, Spool};

/// Most files of one VM at a time. More than two are not closed yet, for their storage hangs.
const FILES_MAX: usize = 8;

/// An open file or pipe. Dropping it has it closed, without waiting for it.
#[derive(Debug)]
pub(super) struct Sink {
    spool: Spool,
    taken_lost: u64,
}

/// How many sinks of a VM are not closed yet.
pub(super) type OpenSinks = Arc<()>;

/// A file that counts until it is closed.
struct Counted {
    // Before its count.
    file: File,
    _one: OpenSinks,
}

impl Write for Counted {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Sink {
    /// Opens it, for lines behind what is there; a file is made if it is missing.
    ///
    /// # Errors
    /// The system's answer, with the path; also for what is neither file nor pipe, and where too many of
    /// `open` are not closed yet.
    pub(super) fn open(path: &Path, open: &OpenSinks) -> io::Result<Sink> {
        let named = |error: io::Error| {
            let kind = error.kind();
            io::Error::new(kind, format!("{}: {error}", path.display()))
        };
        let open_count = Arc::strong_count(open) - 1;
        if open_count >= FILES_MAX {
            let message = format!("{open_count} files of this vm are not closed yet");
            return Err(named(io::Error::new(io::ErrorKind::ResourceBusy, message)));
        }
        // A device or a socket would be opened with its side effects: looked at first. What is put in
        // its place meanwhile is found out below.
        let is_wrong = |kind: std::fs::FileType| !kind.is_file() && !kind.is_fifo();
        let wrong = || {
            let error = io::Error::new(io::ErrorKind::InvalidInput, "is no file and no named pipe");
            Err(named(error))
        };
        if std::fs::metadata(path).is_ok_and(|metadata| is_wrong(metadata.file_type())) {
            return wrong();
        }
        let file = OpenOptions::new()
            // Without a reader a pipe can be opened for writing only by who also reads.
            .read(true)
            .append(true)
            .create(true)
            .mode(0o600)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path)
            .map_err(named)?;
        if is_wrong(file.metadata().map_err(named)?.file_type()) {
            return wrong();
        }
        let counted = Counted {
            file,
            _one: Arc::clone(open),
        };
        let spool = Spool::new(counted, "telemetry").map_err(named)?;
        Ok(Sink {
            spool,
            taken_lost: 0,
        })
    }

    /// Writes a line; false if it is lost. One of up to `PIPE_BUF` (4096) bytes is written as a whole
    /// or not at all. Waits for no storage that hangs: what is not written yet may be lost later.
    pub(super) fn write(&self, line: &str) -> bool {
        self.spool.write(line.as_bytes(), SLOW)
    }

    /// How many lines were lost since this was asked last.
    pub(super) fn take_lost(&mut self) -> u64 {
        let lost = self.spool.lost();
        lost - std::mem::replace(&mut self.taken_lost, lost)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(path: &Path) -> io::Result<Sink> {
        Sink::open(path, &OpenSinks::default())
    }

    #[test]
    fn lines_are_put_behind_what_a_file_has() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        for line in ["one\n", "two\n"] {
            assert!(open(&path).unwrap().write(line));
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "one\ntwo\n");
    }

    #[test]
    fn a_pipe_that_nobody_reads_is_written_until_it_is_full() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pipe");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &path,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        let mut sink = open(&path).unwrap();
        let line = "x".repeat(4095) + "\n";
        let written = (0..1000).take_while(|_| sink.write(&line)).count();
        assert!((1..1000).contains(&written), "{written}");
        assert_eq!((sink.take_lost(), sink.take_lost()), (1, 0));
    }

    #[test]
    fn what_is_neither_file_nor_pipe_is_refused() {
        let error = open(Path::new("/dev/null")).unwrap_err();
        assert!(
            error.to_string().contains("/dev/null: is no file"),
            "{error}"
        );
    }
}
