//! What the consoles of a domain's VMs showed last, a file each: for when their monitor is gone.
//!
//! A file is written by a task that reads the console as its clients do. Whoever prints, a vCPU, waits
//! neither for it nor for the storage: a file that hangs misses what the console's history is too short
//! for, and is begun anew. What was printed in the moment before a monitor was killed may be missing.
//! Rejected: to write where it is printed. A vCPU that waits for storage can be neither paused nor ended,
//! and keeps the console's lock.

mod tail;

use std::fs::{File, OpenOptions};
use std::future::poll_fn;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{CWD, Mode, OFlags, openat};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;
use vmm::{Console, ConsoleReader, VmId};

use tail::ConsoleTail;

/// The directory of them.
#[derive(Debug, Clone)]
pub struct ConsoleTails {
    directory: PathBuf,
    /// Whoever writes a file. They are all on the same storage: if that hangs, it keeps one thread.
    turn: Arc<Semaphore>,
}

impl ConsoleTails {
    /// Those in `directory`, which need not be there yet.
    pub fn new(directory: PathBuf) -> ConsoleTails {
        ConsoleTails {
            directory,
            turn: Arc::new(Semaphore::new(1)),
        }
    }

    /// Where they are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Keeps what `console` shows from now on. Where that cannot be, the VM goes on without. From a
    /// thread of an async runtime, whose tasks then write it.
    pub fn keep(&self, id: &VmId, console: &Console) {
        let file = OpenOptions::new()
            .create(true)
            .read(true)
            .write(true)
            .truncate(true)
            .mode(0o600)
            .open(self.path_of(id));
        match file.and_then(ConsoleTail::new) {
            Ok(tail) => {
                let following = follow(console.subscribe(), tail, Arc::clone(&self.turn));
                Handle::current().spawn(following);
            }
            Err(error) => log::warn!("vm {id}: cannot keep the tail of its console: {error}"),
        }
    }

    /// What a VM's console showed last; nothing if that was not kept.
    pub fn read(&self, id: &VmId) -> Vec<u8> {
        let read = open_regular(&self.path_of(id)).and_then(|file| ConsoleTail::read(&file));
        read.unwrap_or_else(|error| {
            log::warn!("vm {id}: cannot read the tail of its console: {error}");
            Vec::new()
        })
    }

    /// Takes a VM's away, if there is one.
    pub fn remove(&self, id: &VmId) {
        if let Err(error) = std::fs::remove_file(self.path_of(id))
            && error.kind() != io::ErrorKind::NotFound
        {
            log::warn!("vm {id}: cannot remove the tail of its console: {error}");
        }
    }

    fn path_of(&self, id: &VmId) -> PathBuf {
        self.directory.join(id.as_str())
    }
}

/// Opens a regular file for reading. A monitor that a guest got into may have put anything in its
/// place: no link is followed, and no FIFO waited for.
///
/// # Errors
/// What the system says; [`io::ErrorKind::InvalidInput`] for a file of another kind.
pub(crate) fn open_regular(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = File::from(openat(CWD, path, flags, Mode::empty())?);
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "is not a regular file",
        ));
    }
    Ok(file)
}

/// Writes what `reader` gives until the VM has ended, or the file cannot be written.
async fn follow(mut reader: ConsoleReader, mut tail: ConsoleTail, turn: Arc<Semaphore>) {
    let mut missed_bytes = 0;
    while let Some(bytes) = poll_fn(|cx| reader.poll_read(cx)).await {
        let has_missed = reader.lost_bytes() > missed_bytes;
        missed_bytes = reader.lost_bytes();
        // Nobody closes the semaphore.
        let _turn = turn.acquire().await;
        let write = move || {
            if has_missed {
                tail.begin_anew()?;
            }
            tail.push(&bytes).map(|()| tail)
        };
        tail = match spawn_blocking(write).await {
            Ok(Ok(tail)) => tail,
            Ok(Err(error)) => {
                log::warn!("the tail of a console cannot be kept any more: {error}");
                return;
            }
            // The monitor ends.
            Err(_) => return,
        };
    }
    // Closing it may take as long as writing it.
    spawn_blocking(move || drop(tail));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn tail_is_read_by_its_vms_id_until_it_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        let tails = ConsoleTails::new(directory.path().to_owned());
        let id: VmId = "a".parse().unwrap();
        tails.keep(&id, &Console::new());
        assert!(tails.read(&id).is_empty());
        std::fs::write(tails.path_of(&id), "last words").unwrap();
        assert_eq!(tails.read(&id), b"last words");
        tails.remove(&id);
        assert!(!tails.path_of(&id).exists());
    }

    #[test]
    fn a_link_or_a_directory_in_place_of_a_tail_shows_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let tails = ConsoleTails::new(directory.path().to_owned());
        let secret = directory.path().join("secret");
        std::fs::write(&secret, "secret").unwrap();
        std::os::unix::fs::symlink(&secret, directory.path().join("link")).unwrap();
        std::fs::create_dir(directory.path().join("directory")).unwrap();
        for id in ["link", "directory"] {
            assert!(tails.read(&id.parse().unwrap()).is_empty());
        }
    }
}
