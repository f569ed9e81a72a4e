//! The user's terminal: raw mode, and the keys that leave it.

use std::io::Read;

use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};
use tokio::sync::mpsc;

use crate::command::CommandError;

/// Ctrl-A, the prefix of our own keys, as in QEMU and screen.
const PREFIX: u8 = 0x01;
/// Bytes read from standard input at once.
const READ_BYTES: usize = 1024;

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

/// What the user did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Key {
    /// Typed something for the guest.
    Bytes(Vec<u8>),
    /// Asked to leave: Ctrl-A x.
    Escape,
}

/// Standard input, read on a thread of its own.
#[derive(Debug)]
pub struct Keyboard {
    keys: mpsc::Receiver<Key>,
    is_escaped: bool,
}

impl Keyboard {
    /// Starts reading. Ctrl-A is looked for only if `has_escape`: input from a pipe is all the
    /// guest's.
    ///
    /// # Errors
    /// If no thread can be made.
    pub fn open(has_escape: bool) -> Result<Keyboard, CommandError> {
        let (pressed, keys) = mpsc::channel(16);
        // Not tokio's stdin: a read that never returns must not hold up the end of the process.
        std::thread::Builder::new()
            .name("keyboard".to_owned())
            .spawn(move || read_keys(std::io::stdin().lock(), has_escape, &pressed))
            .map_err(CommandError::os("thread for standard input"))?;
        Ok(Keyboard {
            keys,
            is_escaped: false,
        })
    }

    /// The next input; `None` at its end.
    pub async fn next(&mut self) -> Option<Key> {
        let key = self.keys.recv().await;
        self.is_escaped |= key == Some(Key::Escape);
        key
    }

    /// Whether the user asked to leave.
    pub fn is_escaped(&self) -> bool {
        self.is_escaped
    }
}

/// Reads until the end, or until the user leaves: what is typed after that is for the shell.
fn read_keys(mut stdin: impl Read, has_escape: bool, pressed: &mpsc::Sender<Key>) {
    let mut prefix = Prefix::default();
    let mut buffer = [0; READ_BYTES];
    loop {
        let length = match stdin.read(&mut buffer) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Ok(0) | Err(_) => return,
            Ok(length) => length,
        };
        let mut keys = vec![Key::Bytes(buffer[..length].to_vec())];
        if has_escape {
            keys = prefix.split(&buffer[..length]);
        }
        for key in keys {
            let is_last = key == Key::Escape;
            if pressed.blocking_send(key).is_err() || is_last {
                return;
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
    fn split(&mut self, typed: &[u8]) -> Vec<Key> {
        let mut bytes = Vec::with_capacity(typed.len());
        for &byte in typed {
            match (self.is_pending, byte) {
                (false, PREFIX) => self.is_pending = true,
                (true, b'x' | b'X') => {
                    self.is_pending = false;
                    return [Key::Bytes(bytes), Key::Escape]
                        .into_iter()
                        .filter(|key| *key != Key::Bytes(Vec::new()))
                        .collect();
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
        if bytes.is_empty() {
            return Vec::new();
        }
        vec![Key::Bytes(bytes)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(pieces: &[&str]) -> (String, bool) {
        let mut prefix = Prefix::default();
        let mut text = Vec::new();
        let mut is_escaped = false;
        for key in pieces
            .iter()
            .flat_map(|piece| prefix.split(piece.as_bytes()))
        {
            match key {
                Key::Bytes(bytes) => text.extend(bytes),
                Key::Escape => is_escaped = true,
            }
        }
        (String::from_utf8(text).unwrap(), is_escaped)
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
        let (pressed, mut keys) = mpsc::channel(16);
        read_keys(typed, true, &pressed);
        assert_eq!(keys.try_recv(), Ok(Key::Bytes(b"ls\r".to_vec())));
        assert_eq!(keys.try_recv(), Ok(Key::Escape));
        assert_eq!(shells, b"samepage stats\n");
    }
}
