//! The user's terminal: raw mode, and the keys that leave it.

use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};
use tokio::signal::unix::SignalKind;
use tokio::sync::mpsc::{self, error::TrySendError};
use tokio::sync::oneshot;

use crate::command::CommandError;
use crate::note::note;

/// Ctrl-A, the prefix of our own keys, as in QEMU and screen.
const PREFIX: u8 = 0x01;
/// Bytes read from standard input at once.
const READ_BYTES: usize = 1024;
/// Most pieces of input that wait for the guest.
const PIECES_MAX: usize = 64;

/// Signals that end a command which has the terminal in raw mode. There Ctrl-C is none: it is typed.
pub const END_SIGNALS: [SignalKind; 4] = [
    SignalKind::interrupt(),
    SignalKind::terminate(),
    SignalKind::hangup(),
    SignalKind::quit(),
];

/// Tells the user of input that the guest did not get.
pub fn note_lost(lost_bytes: &AtomicU64) {
    let lost_bytes = lost_bytes.load(Ordering::Relaxed);
    if lost_bytes > 0 {
        note(format_args!(
            "{lost_bytes} bytes that were typed are lost: the guest did not read"
        ));
    }
}

/// Standard input's terminal in raw mode; as it was before on drop.
#[derive(Debug)]
pub struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// Whether standard input is a terminal at all.
    pub fn is_present() -> bool {
        isatty(std::io::stdin())
    }

    /// Sets raw mode; `None` if standard input is no terminal.
    ///
    /// # Errors
    /// If the terminal refuses.
    pub fn enter() -> Result<Option<RawTerminal>, CommandError> {
        if !RawTerminal::is_present() {
            return Ok(None);
        }
        let refused = |errno: rustix::io::Errno| CommandError::Os {
            what: "cannot set the terminal to raw mode".to_owned(),
            source: errno.into(),
        };
        let before = tcgetattr(std::io::stdin()).map_err(refused)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(std::io::stdin(), OptionalActions::Now, &raw).map_err(refused)?;
        Ok(Some(RawTerminal { before }))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // The terminal may have gone away; then there is nothing to put right.
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, &self.before);
    }
}

/// Standard input, read on a thread of its own.
#[derive(Debug)]
pub struct Keyboard {
    typed: mpsc::Receiver<Vec<u8>>,
    lost_bytes: Arc<AtomicU64>,
}

/// Ctrl-A x.
#[derive(Debug)]
pub struct Escape(oneshot::Receiver<()>);

impl Keyboard {
    /// Starts reading. Ctrl-A is looked for only if `has_escape`: input from a pipe is all the
    /// guest's.
    ///
    /// # Errors
    /// If no thread can be made.
    pub fn open(has_escape: bool) -> Result<(Keyboard, Escape), CommandError> {
        let (typing, typed) = mpsc::channel(PIECES_MAX);
        let (escaping, escape) = oneshot::channel();
        let lost_bytes = Arc::new(AtomicU64::new(0));
        let reader = Reader {
            typing,
            lost_bytes: Arc::clone(&lost_bytes),
        };
        // Not tokio's stdin: a read that never returns must not hold up the end of the process.
        let read = move || {
            let stdin = std::io::stdin().lock();
            match has_escape {
                true => reader.read_terminal(stdin, escaping),
                false => reader.read_pipe(stdin),
            }
        };
        std::thread::Builder::new()
            .name("keyboard".to_owned())
            .spawn(read)
            .map_err(CommandError::os("thread for standard input"))?;
        Ok((Keyboard { typed, lost_bytes }, Escape(escape)))
    }

    /// The next input for the guest; `None` at its end.
    pub async fn next(&mut self) -> Option<Vec<u8>> {
        self.typed.recv().await
    }

    /// What was typed on a terminal while the guest did not read, and is lost.
    pub fn lost_bytes(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.lost_bytes)
    }
}

impl Escape {
    /// Waits until the user asks to leave; for ever where there is no such key, or no input.
    pub async fn pressed(self) {
        if self.0.await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// The side of the thread.
struct Reader {
    typing: mpsc::Sender<Vec<u8>>,
    lost_bytes: Arc<AtomicU64>,
}

impl Reader {
    /// Reads until the end. Waits where the guest does not read: nothing is lost.
    fn read_pipe(self, mut stdin: impl Read) {
        while let Some(bytes) = read_some(&mut stdin) {
            if self.typing.blocking_send(bytes).is_err() {
                return;
            }
        }
    }

    /// Reads until the end, or until the user leaves: what is typed after that is for the shell. The
    /// key to leave must be found whatever the guest does, so this never waits for the guest.
    fn read_terminal(self, mut stdin: impl Read, escaping: oneshot::Sender<()>) {
        let mut prefix = Prefix::default();
        while let Some(bytes) = read_some(&mut stdin) {
            let (bytes, is_escape) = prefix.split(&bytes);
            let length_bytes = bytes.len() as u64;
            match self.typing.try_send(bytes) {
                Ok(()) => {}
                Err(TrySendError::Full(_)) => {
                    self.lost_bytes.fetch_add(length_bytes, Ordering::Relaxed);
                }
                Err(TrySendError::Closed(_)) => return,
            }
            if is_escape {
                // Nobody listens any more: the VM has ended.
                let _ = escaping.send(());
                return;
            }
        }
    }
}

/// The next piece; `None` at the end.
fn read_some(stdin: &mut impl Read) -> Option<Vec<u8>> {
    let mut buffer = vec![0; READ_BYTES];
    loop {
        match stdin.read(&mut buffer) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Ok(0) | Err(_) => return None,
            Ok(length) => {
                buffer.truncate(length);
                return Some(buffer);
            }
        }
    }
}

/// Finds Ctrl-A sequences, also across reads.
#[derive(Debug, Default)]
struct Prefix {
    is_pending: bool,
}

impl Prefix {
    /// What is for the guest, and whether the user then asked to leave.
    fn split(&mut self, typed: &[u8]) -> (Vec<u8>, bool) {
        let mut bytes = Vec::with_capacity(typed.len());
        for &byte in typed {
            match (self.is_pending, byte) {
                (false, PREFIX) => self.is_pending = true,
                (true, b'x' | b'X') => {
                    self.is_pending = false;
                    return (bytes, true);
                }
                (true, PREFIX) => {
                    self.is_pending = false;
                    bytes.push(PREFIX);
                }
                (true, other) => {
                    // Not ours: the guest gets what was typed.
                    self.is_pending = false;
                    bytes.extend([PREFIX, other]);
                }
                (false, other) => bytes.push(other),
            }
        }
        (bytes, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(pieces: &[&str]) -> (String, bool) {
        let mut prefix = Prefix::default();
        let mut text = Vec::new();
        let mut is_escaped = false;
        for piece in pieces {
            let (bytes, is_escape) = prefix.split(piece.as_bytes());
            text.extend(bytes);
            is_escaped |= is_escape;
        }
        (String::from_utf8(text).unwrap(), is_escaped)
    }

    fn reader() -> (Reader, mpsc::Receiver<Vec<u8>>) {
        let (typing, typed) = mpsc::channel(PIECES_MAX);
        let lost_bytes = Arc::default();
        (Reader { typing, lost_bytes }, typed)
    }

    #[test]
    fn ctrl_a_x_leaves_and_ctrl_a_twice_is_one_ctrl_a() {
        assert_eq!(typed(&["ls\r"]), ("ls\r".into(), false));
        assert_eq!(typed(&["ls\x01x"]), ("ls".into(), true));
        assert_eq!(typed(&["a\x01", "x"]), ("a".into(), true));
        assert_eq!(typed(&["a\x01\x01x"]), ("a\x01x".into(), false));
        assert_eq!(typed(&["\x01", "q"]), ("\x01q".into(), false));
        assert_eq!(typed(&["x\x03"]), ("x\x03".into(), false));
    }

    #[test]
    fn what_is_typed_after_leaving_is_left_to_the_shell() {
        // One read returns one piece, as with a terminal.
        let mut shells = &b"samepage stats\n"[..];
        let typed = (&b"ls\r"[..]).chain(&b"\x01x"[..]).chain(&mut shells);
        let (reader, mut keys) = reader();
        let (escaping, mut escape) = oneshot::channel();
        reader.read_terminal(typed, escaping);
        assert_eq!(keys.try_recv(), Ok(b"ls\r".to_vec()));
        assert_eq!(escape.try_recv(), Ok(()));
        assert_eq!(shells, b"samepage stats\n");
    }

    #[test]
    fn key_to_leave_is_found_behind_more_than_the_guest_reads() {
        let pasted = vec![b'p'; 2 * PIECES_MAX * READ_BYTES];
        let typed = (&pasted[..]).chain(&b"\x01x"[..]);
        let (reader, mut keys) = reader();
        let lost_bytes = Arc::clone(&reader.lost_bytes);
        let (escaping, mut escape) = oneshot::channel();
        reader.read_terminal(typed, escaping);
        assert_eq!(escape.try_recv(), Ok(()));
        let mut kept_bytes = 0;
        while let Ok(bytes) = keys.try_recv() {
            kept_bytes += bytes.len();
        }
        let lost_bytes = lost_bytes.load(Ordering::Relaxed);
        assert_eq!(kept_bytes as u64 + lost_bytes, pasted.len() as u64);
    }

    #[test]
    fn nothing_of_a_pipe_is_lost_however_slow_the_guest_is() {
        let piped: Vec<u8> = (0..=250)
            .cycle()
            .take(2 * PIECES_MAX * READ_BYTES)
            .collect();
        let (reader, mut keys) = reader();
        let input = std::io::Cursor::new(piped.clone());
        let reading = std::thread::spawn(move || reader.read_pipe(input));
        let mut read = Vec::new();
        while let Some(bytes) = keys.blocking_recv() {
            read.extend(bytes);
        }
        reading.join().unwrap();
        assert_eq!(read, piped);
    }
}
