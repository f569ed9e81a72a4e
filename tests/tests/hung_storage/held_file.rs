//! A file on a real FUSE file system that stops answering when a test wants it to.
//!
//! It is mounted where the test alone, and what it starts, sees it ([`own_mounts`]): the kernel takes
//! it away with the last of them, also when the test is killed.
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
    ReplyData, ReplyEmpty, ReplyOpen, ReplyWrite, Request, TimeOrNow,
};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
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

/// Gives this thread, and the processes that it starts from now on, mounts of their own.
pub(crate) fn own_mounts() {
    unshare(CloneFlags::CLONE_NEWNS).expect("this test needs the right to have mounts of its own");
    // Else what is mounted here is mounted there too.
    let alone = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, alone, None::<&str>).expect("mounts of its own");
}

/// A mounted file.
pub(crate) struct HeldFile {
    // Before the file that it is mounted on.
    _session: BackgroundSession,
    mounted_on: NamedTempFile,
    held: Arc<Mutex<Held>>,
}

/// What is not answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Silence {
    /// Reads behind the first so many bytes.
    ReadsBehind(usize),
    /// Writes.
    Writes,
    /// `fsync` and `fdatasync`.
    Flushes,
    /// Whoever closes the file.
    Closing,
}

#[derive(Default)]
struct Held {
    content: Vec<u8>,
    silence: Option<Silence>,
    waiting: Vec<Waiting>,
}

/// Somebody who waits for an answer.
enum Waiting {
    Reader(Vec<u8>, ReplyData),
    Writer {
        start: usize,
        data: Vec<u8>,
        reply: ReplyWrite,
    },
    Other(ReplyEmpty),
}

impl Held {
    fn answer(&mut self, waiting: Waiting) {
        match waiting {
            Waiting::Reader(data, reply) => reply.data(&data),
            Waiting::Writer { start, data, reply } => {
                let end = start + data.len();
                self.content.resize(end.max(self.content.len()), 0);
                self.content[start..end].copy_from_slice(&data);
                reply.written(u32::try_from(data.len()).unwrap_or(u32::MAX));
            }
            Waiting::Other(reply) => reply.ok(),
        }
    }

    fn answer_unless(&mut self, is_held: bool, waiting: Waiting) {
        if is_held {
            self.waiting.push(waiting);
        } else {
            self.answer(waiting);
        }
    }
}

impl HeldFile {
    /// Mounts a file that holds `content`, and answers at once. After [`own_mounts`].
    pub(crate) fn mount(content: Vec<u8>, reads: Reads) -> HeldFile {
        let mount = || -> io::Result<HeldFile> {
            let mounted_on = NamedTempFile::new()?;
            let held = Arc::new(Mutex::new(Held {
                content,
                ..Held::default()
            }));
            let files = Files {
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

    /// Stops answering.
    pub(crate) fn hold(&self, silence: Silence) {
        lock(&self.held).silence = Some(silence);
    }

    /// Whether somebody waits for an answer.
    pub(crate) fn is_waited_for(&self) -> bool {
        !lock(&self.held).waiting.is_empty()
    }

    /// What it holds.
    pub(crate) fn content(&self) -> Vec<u8> {
        lock(&self.held).content.clone()
    }

    /// Answers all, also from now on.
    pub(crate) fn let_go(&self) {
        let mut held = lock(&self.held);
        held.silence = None;
        for waiting in std::mem::take(&mut held.waiting) {
            held.answer(waiting);
        }
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

fn attributes(held: &Held) -> FileAttr {
    let size = held.content.len() as u64;
    let at = SystemTime::UNIX_EPOCH;
    FileAttr {
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
    }
}

/// A file system of one file, which is its root.
struct Files {
    reads: Reads,
    held: Arc<Mutex<Held>>,
}

impl Filesystem for Files {
    fn getattr(&mut self, _: &Request<'_>, _: u64, _: Option<u64>, reply: ReplyAttr) {
        reply.attr(&TTL, &attributes(&lock(&self.held)));
    }

    fn setattr(
        &mut self,
        _: &Request<'_>,
        _: u64,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<u64>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<u32>,
        reply: ReplyAttr,
    ) {
        let mut held = lock(&self.held);
        if let Some(size) = size.and_then(|size| usize::try_from(size).ok()) {
            held.content.resize(size, 0);
        }
        reply.attr(&TTL, &attributes(&held));
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
        let is_held = held.silence == Some(Silence::Closing);
        held.answer_unless(is_held, Waiting::Other(reply));
    }

    fn fsync(&mut self, _: &Request<'_>, _: u64, _: u64, _: bool, reply: ReplyEmpty) {
        let mut held = lock(&self.held);
        let is_held = held.silence == Some(Silence::Flushes);
        held.answer_unless(is_held, Waiting::Other(reply));
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
        let mut held = lock(&self.held);
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = start.saturating_add(size as usize).min(held.content.len());
        let data = held.content.get(start..end).unwrap_or_default().to_vec();
        let is_held =
            matches!(held.silence, Some(Silence::ReadsBehind(first_bytes)) if end > first_bytes);
        held.answer_unless(is_held, Waiting::Reader(data, reply));
    }

    fn write(
        &mut self,
        _: &Request<'_>,
        _: u64,
        _: u64,
        offset: i64,
        data: &[u8],
        _: u32,
        _: i32,
        _: Option<u64>,
        reply: ReplyWrite,
    ) {
        let mut held = lock(&self.held);
        let is_held = held.silence == Some(Silence::Writes);
        let writer = Waiting::Writer {
            start: usize::try_from(offset).unwrap_or(usize::MAX),
            data: data.to_vec(),
            reply,
        };
        held.answer_unless(is_held, writer);
    }
}
