//! Guest memory of a server, read and hashed from outside.
//!
//! Only pages with memory are read: to read another one would give it some, and page tables. What a
//! guest has of the pool without having touched it since is read from the pool's file.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::find::{self, GuestRange, MARK_BYTES, POOL, Part, PoolPlace};
use super::{Fingerprint, NEVER_TOUCHED, fingerprint, is_zero};
use crate::density::host::HostError;
use crate::density::host::left_over::wait_for;

const PAGE_BYTES: u64 = 4096;
const PAGE: usize = 4096;
/// Pages read by one call.
const CHUNK_PAGES: usize = 256;
/// Bytes of an entry of `/proc/PID/pagemap`.
const ENTRY_BYTES: usize = 8;
/// Its bits 63 and 62: in memory, swapped out (`Documentation/admin-guide/mm/pagemap.rst`).
const HAS_MEMORY: u64 = 3 << 62;

/// Fingerprints of all guests of the server with `pid`, in ascending order of addresses. The guests
/// should be paused, or at rest: what they write meanwhile may be seen in part.
///
/// `sizes_bytes` has the memory size of each guest that runs.
///
/// # Errors
/// If the server cannot be read, or has other guests than that.
pub fn read_fleet(pid: u32, sizes_bytes: &[u64]) -> Result<Vec<Vec<Fingerprint>>, HostError> {
    let server = Server::open(pid)?;
    let maps = server.directory.join("maps");
    let text = fs::read_to_string(&maps).map_err(HostError::io("read", &maps))?;
    let parts = find::parts(&text);
    let guests = find::guests(&parts, sizes_bytes, |address| server.mark(&parts, address))?;
    let mut expected = sizes_bytes.to_vec();
    let mut found: Vec<u64> = guests.iter().map(|guest| guest.end - guest.start).collect();
    expected.sort_unstable();
    found.sort_unstable();
    if found != expected {
        return Err(HostError::Malformed {
            path: maps,
            text: format!("guests of {found:?} bytes"),
            expected: "the guests that run",
        });
    }
    guests
        .iter()
        .map(|guest| server.guest(&parts, *guest))
        .collect()
}

/// The files of a server's process.
#[derive(Debug)]
struct Server {
    directory: PathBuf,
    memory: File,
    pagemap: File,
    /// Pools by their inodes.
    pools: HashMap<u64, File>,
}

impl Server {
    fn open(pid: u32) -> Result<Server, HostError> {
        let directory = PathBuf::from(format!("/proc/{pid}"));
        let open = |name: &str| {
            let path = directory.join(name);
            File::open(&path).map_err(HostError::io("open", &path))
        };
        Ok(Server {
            memory: open("mem")?,
            pagemap: open("pagemap")?,
            pools: pools(&directory)?,
            directory,
        })
    }

    /// The bytes at an address; none if there is no memory.
    fn mark(&self, parts: &[Part], address: u64) -> Result<Option<[u8; MARK_BYTES]>, HostError> {
        let offset = address % PAGE_BYTES;
        let start = address - offset;
        let end = start + PAGE_BYTES;
        let mut mark = None;
        self.visit(parts, GuestRange { start, end }, |_, page| {
            let from = usize::try_from(offset).unwrap_or(PAGE);
            let bytes = page.get(from..).and_then(|rest| rest.first_chunk());
            mark = bytes.copied();
        })?;
        Ok(mark)
    }

    /// Fingerprints of a guest's pages.
    fn guest(&self, parts: &[Part], guest: GuestRange) -> Result<Vec<Fingerprint>, HostError> {
        let pages = pages_in(guest.end - guest.start);
        let mut fingerprints = vec![NEVER_TOUCHED; pages];
        self.visit(parts, guest, |page, bytes| {
            fingerprints[page] = fingerprint(bytes);
        })?;
        Ok(fingerprints)
    }

    /// Shows each page of a range that has a content: its number in the range, and its bytes.
    fn visit(
        &self,
        parts: &[Part],
        range: GuestRange,
        mut seen: impl FnMut(usize, &[u8]),
    ) -> Result<(), HostError> {
        let first = parts.partition_point(|part| part.end <= range.start);
        for part in &parts[first..] {
            let Some(part) = part.within(range.start, range.end) else {
                break;
            };
            let has_memory = self.has_memory(part)?;
            let mut page = 0;
            for run in has_memory.chunk_by(PartialEq::eq) {
                for chunk in run.chunks(CHUNK_PAGES) {
                    let offset = page as u64 * PAGE_BYTES;
                    let number = pages_in(part.start + offset - range.start);
                    let bytes = self.read(part, offset, chunk)?;
                    for (index, bytes) in bytes.chunks_exact(PAGE).enumerate() {
                        // A hole of the pool: nobody ever touched it.
                        if chunk[index] || !is_zero(bytes) {
                            seen(number + index, bytes);
                        }
                    }
                    page += chunk.len();
                }
            }
        }
        Ok(())
    }

    /// Whether the kernel has memory for each page of a part, in its own page tables.
    fn has_memory(&self, part: Part) -> Result<Vec<bool>, HostError> {
        let mut entries = vec![0; pages_in(part.end - part.start) * ENTRY_BYTES];
        let offset = part.start / PAGE_BYTES * ENTRY_BYTES as u64;
        self.pagemap
            .read_exact_at(&mut entries, offset)
            .map_err(HostError::io("read", &self.directory.join("pagemap")))?;
        let entry = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap_or_default());
        Ok(entries
            .chunks_exact(ENTRY_BYTES)
            .map(|bytes| entry(bytes) & HAS_MEMORY != 0)
            .collect())
    }

    /// Reads neighbours of a part that all have memory, or all have none. Nothing of those that
    /// have none in the pool either.
    fn read(&self, part: Part, offset: u64, neighbours: &[bool]) -> Result<Vec<u8>, HostError> {
        let mut bytes = vec![0; neighbours.len() * PAGE];
        match (neighbours.first(), part.pool) {
            (Some(true), _) => self.read_memory(&mut bytes, part.start + offset)?,
            (_, Some(place)) => self.read_pool(&mut bytes, place, offset)?,
            (_, None) => bytes.clear(),
        }
        Ok(bytes)
    }

    fn read_memory(&self, bytes: &mut [u8], address: u64) -> Result<(), HostError> {
        let what = format!("page {address:#x} is released by the engine");
        wait_for(&what, || {
            match self.memory.read_exact_at(bytes, address) {
                Ok(()) => Ok(true),
                // The engine has the page in hand, and whoever touches it waits; this reader cannot.
                Err(error) if error.raw_os_error() == Some(libc::EIO) => Ok(false),
                Err(error) => Err(HostError::io("read", &self.directory.join("mem"))(error)),
            }
        })
    }

    fn read_pool(&self, bytes: &mut [u8], place: PoolPlace, offset: u64) -> Result<(), HostError> {
        let missing = || io::Error::other(format!("no pool with inode {}", place.inode));
        let pool = self.pools.get(&place.inode).ok_or_else(missing);
        pool.and_then(|pool| pool.read_exact_at(bytes, place.offset + offset))
            .map_err(HostError::io("read a pool of", &self.directory))
    }
}

fn pages_in(bytes: u64) -> usize {
    usize::try_from(bytes / PAGE_BYTES).unwrap_or(usize::MAX)
}

/// Opens each pool that a process has a descriptor of.
fn pools(process: &Path) -> Result<HashMap<u64, File>, HostError> {
    let directory = process.join("fd");
    let failed = || HostError::io("read", &directory);
    let mut pools = HashMap::new();
    for entry in fs::read_dir(&directory).map_err(failed())? {
        let path = entry.map_err(failed())?.path();
        // One that was closed since the directory was read is none of these.
        let Ok(target) = fs::read_link(&path) else {
            continue;
        };
        if target.to_string_lossy().starts_with(POOL) {
            let file = File::open(&path).map_err(HostError::io("open", &path))?;
            let inode = file.metadata().map_err(HostError::io("look at", &path))?;
            pools.insert(inode.ino(), file);
        }
    }
    Ok(pools)
}
