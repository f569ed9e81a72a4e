//! What a console showed last, in a file: it is still there when the monitor is not.
//!
//! The file is what was printed. Once it has twice [`HISTORY_BYTES_MAX`] bytes, its end is copied to its
//! beginning, and the rest is cut off. A monitor may die in between: the last [`HISTORY_BYTES_MAX`]
//! bytes are right at any moment.
//!
//! Rejected: a mapping that is shared with the file, which needs unsafe code and dies by a signal when
//! the file is cut short. Rejected: a ring and a position, which are two writes for each piece.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use vmm::console::HISTORY_BYTES_MAX;

const KEPT_BYTES: u64 = HISTORY_BYTES_MAX as u64;

/// The writing end.
#[derive(Debug)]
pub(super) struct ConsoleTail {
    file: File,
    length_bytes: u64,
}

impl ConsoleTail {
    /// Empties `file`, which must be open for reading too, and writes to it from now on.
    ///
    /// # Errors
    /// If it cannot be emptied.
    pub(super) fn new(file: File) -> io::Result<ConsoleTail> {
        let mut tail = ConsoleTail {
            file,
            length_bytes: 0,
        };
        tail.begin_anew()?;
        Ok(tail)
    }

    /// Empties the file: what comes now does not follow what came before.
    ///
    /// # Errors
    /// If it cannot be emptied.
    pub(super) fn begin_anew(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        self.length_bytes = 0;
        Ok(())
    }

    /// Keeps what was printed.
    ///
    /// # Errors
    /// If it cannot be written. What comes later must not be kept: it would be taken for this.
    pub(super) fn push(&mut self, bytes: &[u8]) -> io::Result<()> {
        let bytes = &bytes[bytes.len().saturating_sub(HISTORY_BYTES_MAX)..];
        self.length_bytes = append(&self.file, self.length_bytes, bytes)?;
        Ok(())
    }

    /// The end of `file`, at most [`HISTORY_BYTES_MAX`] bytes.
    ///
    /// # Errors
    /// If it cannot be read.
    pub(super) fn read(file: &File) -> io::Result<Vec<u8>> {
        let length_bytes = file.metadata()?.len();
        let start = length_bytes.saturating_sub(KEPT_BYTES);
        let kept = usize::try_from(length_bytes - start).unwrap_or(HISTORY_BYTES_MAX);
        let mut bytes = vec![0; kept];
        file.read_exact_at(&mut bytes, start)?;
        Ok(bytes)
    }
}

/// Writes `bytes` behind the first `length_bytes` of `file`; its new length.
fn append(file: &File, length_bytes: u64, bytes: &[u8]) -> io::Result<u64> {
    file.write_all_at(bytes, length_bytes)?;
    let length_bytes = length_bytes + bytes.len() as u64;
    if length_bytes < 2 * KEPT_BYTES {
        return Ok(length_bytes);
    }
    let end = ConsoleTail::read(file)?;
    file.write_all_at(&end, 0)?;
    file.set_len(KEPT_BYTES)?;
    Ok(KEPT_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(parts: &[&[u8]]) -> Vec<u8> {
        let file = tempfile::tempfile().unwrap();
        let mut tail = ConsoleTail::new(file.try_clone().unwrap()).unwrap();
        for part in parts {
            tail.push(part).unwrap();
            assert!(file.metadata().unwrap().len() < 2 * KEPT_BYTES);
        }
        ConsoleTail::read(&file).unwrap()
    }

    #[test]
    fn nothing_that_was_printed_is_an_empty_tail() {
        assert!(written(&[]).is_empty());
        assert!(written(&[b""]).is_empty());
    }

    #[test]
    fn tail_is_the_end_of_what_was_printed_however_it_was_cut() {
        let text: Vec<u8> = (0..7 * HISTORY_BYTES_MAX / 2)
            .map(|at| u8::try_from(at % 251).unwrap())
            .collect();
        let end = &text[text.len() - HISTORY_BYTES_MAX..];
        assert_eq!(written(&[b"one ", b"two"]), b"one two");
        assert!(written(&[&text]) == end);
        for cut in [
            1,
            HISTORY_BYTES_MAX - 1,
            HISTORY_BYTES_MAX,
            HISTORY_BYTES_MAX + 7,
        ] {
            let (first, second) = text.split_at(cut);
            assert!(written(&[first, second]) == end, "{cut}");
        }
        let single: Vec<&[u8]> = text.chunks(977).collect();
        assert!(written(&single) == end);
    }

    #[test]
    fn tail_is_whole_also_between_the_copy_and_the_cut() {
        let file = tempfile::tempfile().unwrap();
        let text: Vec<u8> = (0..2 * HISTORY_BYTES_MAX)
            .map(|at| u8::try_from(at % 251).unwrap())
            .collect();
        let end = &text[HISTORY_BYTES_MAX..];
        file.write_all_at(&text, 0).unwrap();
        // Half of the copy, and all of it.
        for copied in [HISTORY_BYTES_MAX / 2, HISTORY_BYTES_MAX] {
            file.write_all_at(&end[..copied], 0).unwrap();
            assert!(ConsoleTail::read(&file).unwrap() == end);
        }
    }
}
