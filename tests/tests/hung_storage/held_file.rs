//! A file on a real FUSE file system that stops answering when a test wants it to.
//!
//! Its file system answers what it kept back, and is unmounted, when this is dropped: a thread that
//! waits for it cannot be killed before. So a test makes it after the server that is to use it.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use fuser::consts::FOPEN_DIRECT_IO;
use fuser::{
    BackgroundSession, FUSE_ROOT_ID, FileAttr, FileType, Filesystem, MountOption, ReplyAttr,
    ReplyData, ReplyEmpty, ReplyOpen, Request,
};
use tempfile::NamedTempFile;

/// How long the kernel may keep what it was told of the file.
const TTL: Duration = Duration::from_secs(600);

/// How the kernel reads the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reads {
    /// Through its page cache. A thread that waits for a page can be killed.
    Cached,
    /// By asking each time. A thread that waits for the answer cannot be killed.
    Direct,
}

/// A mounted file.
pub(crate) struct HeldFile {
    // Before the file that it is mounted on.
    _session: BackgroundSession,
    mounted_on: NamedTempFile,
    held: Arc<Mutex<Held>>,
}

#[derive(Default)]
struct Held {
    from: Option<usize>,
    waiting: Vec<(Vec<u8>, ReplyData)>,
    is_open_for_ever: bool,
    closing: Vec<ReplyEmpty>,
}

impl HeldFile {
    /// Mounts a file that holds `content`, and answers at once.
    pub(crate) fn mount(content: Vec<u8>, reads: Reads) -> HeldFile {
        let mount = || -> io::Result<HeldFile> {
            let mounted_on = NamedTempFile::new()?;
            let held = Arc::<Mutex<Held>>::default();
            let files = Files {
                content,
                reads,
                held: held.clone(),
            };
            let options = [MountOption::FSName("held-file".to_owned())];
            let session = fuser::spawn_mount2(files, mounted_on.path(), &options)?;
            Ok(HeldFile {
                _session: session,
                mounted_on,
                held,
            })
        };
        mount().expect("this test needs /dev/fuse, and the right to mount")
    }

    pub(crate) fn path(&self) -> &Path {
        self.mounted_on.path()
    }

    /// Stops answering reads behind the first `from` bytes.
    pub(crate) fn hold(&self, from: usize) {
        lock(&self.held).from = Some(from);
    }

    /// Stops answering who closes the file.
    pub(crate) fn hold_closing(&self) {
        lock(&self.held).is_open_for_ever = true;
    }

    /// Whether somebody waits for an answer.
    pub(crate) fn is_waited_for(&self) -> bool {
        let held = lock(&self.held);
        !held.waiting.is_empty() || !held.closing.is_empty()
    }

    /// Answers all, also from now on.
    pub(crate) fn let_go(&self) {
        let (waiting, closing) = {
            let mut held = lock(&self.held);
            held.from = None;
            held.is_open_for_ever = false;
            let closing = std::mem::take(&mut held.closing);
            (std::mem::take(&mut held.waiting), closing)
        };
        closing.into_iter().for_each(ReplyEmpty::ok);
        waiting
            .into_iter()
            .for_each(|(data, reply)| reply.data(&data));
    }
}

impl Drop for HeldFile {
    fn drop(&mut self) {
        self.let_go();
    }
}

fn lock(held: &Mutex<Held>) -> MutexGuard<'_, Held> {
    held.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A file system of one file, which is its root.
struct Files {
    content: Vec<u8>,
    reads: Reads,
    held: Arc<Mutex<Held>>,
}

impl Filesystem for Files {
    fn getattr(&mut self, _: &Request<'_>, _: u64, _: Option<u64>, reply: ReplyAttr) {
        let size = self.content.len() as u64;
        let at = SystemTime::UNIX_EPOCH;
        let attributes = FileAttr {
            ino: FUSE_ROOT_ID,
            size,
            blocks: size.div_ceil(512),
            atime: at,
            mtime: at,
            ctime: at,
            crtime: at,
            kind: FileType::RegularFile,
            perm: 0o600,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        };
        reply.attr(&TTL, &attributes);
    }

    fn open(&mut self, _: &Request<'_>, _: u64, _: i32, reply: ReplyOpen) {
        let flags = match self.reads {
            Reads::Cached => 0,
            Reads::Direct => FOPEN_DIRECT_IO,
        };
        reply.opened(0, flags);
    }

    fn flush(&mut self, _: &Request<'_>, _: u64, _: u64, _: u64, reply: ReplyEmpty) {
        let mut held = lock(&self.held);
        if held.is_open_for_ever {
            held.closing.push(reply);
        } else {
            drop(held);
            reply.ok();
        }
    }

    fn read(
        &mut self,
        _: &Request<'_>,
        _: u64,
        _: u64,
        offset: i64,
        size: u32,
        _: i32,
        _: Option<u64>,
        reply: ReplyData,
    ) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = start.saturating_add(size as usize).min(self.content.len());
        let data = self.content.get(start..end).unwrap_or_default().to_vec();
        let mut held = lock(&self.held);
        if held.from.is_some_and(|from| end > from) {
            held.waiting.push((data, reply));
        } else {
            drop(held);
            reply.data(&data);
        }
    }
}
