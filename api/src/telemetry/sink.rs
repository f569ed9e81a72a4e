//! A file or a named pipe that lines are written to.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

/// An open file or pipe.
#[derive(Debug)]
pub(super) struct Sink(File);

impl Sink {
    /// Opens it, for lines behind what is there; a file is made if it is missing.
    ///
    /// # Errors
    /// The system's answer, with the path; also for what is neither file nor pipe.
    pub(super) fn open(path: &Path) -> io::Result<Sink> {
        let named = |error: io::Error| {
            let kind = error.kind();
            io::Error::new(kind, format!("{}: {error}", path.display()))
        };
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
        Ok(Sink(file))
    }

    /// Writes a line; false if it is lost. One of up to `PIPE_BUF` (4096) bytes is written as a whole
    /// or not at all.
    pub(super) fn write(&mut self, line: &str) -> bool {
        self.0.write_all(line.as_bytes()).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_put_behind_what_a_file_has() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        for line in ["one\n", "two\n"] {
            assert!(Sink::open(&path).unwrap().write(line));
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
        let mut sink = Sink::open(&path).unwrap();
        let line = "x".repeat(4095) + "\n";
        let written = (0..1000).take_while(|_| sink.write(&line)).count();
        assert!((1..1000).contains(&written), "{written}");
    }

    #[test]
    fn what_is_neither_file_nor_pipe_is_refused() {
        let error = Sink::open(Path::new("/dev/null")).unwrap_err();
        assert!(
            error.to_string().contains("/dev/null: is no file"),
            "{error}"
        );
    }
}
