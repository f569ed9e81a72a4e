//! What the consoles of a domain's VMs showed last, a file each: for when their monitor is gone.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, openat};
use vmm::{Console, ConsoleTail, VmId};

/// The directory of them.
#[derive(Debug, Clone)]
pub struct ConsoleTails {
    directory: PathBuf,
}

impl ConsoleTails {
    /// Those in `directory`, which need not be there yet.
    pub fn new(directory: PathBuf) -> ConsoleTails {
        ConsoleTails { directory }
    }

    /// Where they are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Has `console` keep what it shows from now on. Where that cannot be, the VM goes on without.
    pub fn keep(&self, id: &VmId, console: &Console) {
        let file = OpenOptions::new()
            .create(true)
            .read(true)
            .write(true)
            .truncate(true)
            .mode(0o600)
            .open(self.path_of(id));
        match file.and_then(ConsoleTail::new) {
            Ok(tail) => console.keep_tail(tail),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tail_is_read_by_its_vms_id_until_it_is_removed() {
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
