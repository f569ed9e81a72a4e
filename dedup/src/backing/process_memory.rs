//! What this process holds, asked of the kernel without walking a page table.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use crate::backing::linux::pagemap::Pagemap;
use crate::backing::linux::{LinuxPool, allocated_pages};
use crate::backing::mapping::Mapping;
use crate::base::budget::{Headroom, MemoryGauge};
use crate::base::complaints::complain;
use crate::base::page::PAGE_SIZE_BYTES;

/// The memory of this process and of one engine's pool. A look costs about a microsecond.
///
/// All that it reads is open from the start: whoever looks when memory is short may find that the
/// process has no descriptor left, and an open file is itself memory.
#[derive(Debug)]
pub struct ProcessMemory {
    statm: File,
    pagemap: Pagemap,
    pool: File,
}

impl ProcessMemory {
    pub(crate) fn open(pool: &LinuxPool) -> io::Result<ProcessMemory> {
        Ok(ProcessMemory {
            statm: open_statm()?,
            pagemap: Pagemap::open()?,
            pool: pool.file()?,
        })
    }

    /// The same figures by a file of its own. The kernel lets one at a time read an open file, and
    /// who waits for the other waits until that has a CPU again.
    ///
    /// # Errors
    /// If `/proc` cannot be read.
    pub fn reopen(&self) -> io::Result<ProcessMemory> {
        Ok(ProcessMemory {
            statm: open_statm()?,
            pagemap: Pagemap::open()?,
            pool: self.pool.try_clone()?,
        })
    }

    /// Private memory of the whole process: what its guests do not share, and all of its own.
    ///
    /// Resident less what is backed by files (`fs/proc/task_mmu.c`, `task_statm`). The resident
    /// pages of the pool are among the latter, once for each mapping; that figure says nothing.
    /// Older kernels add up per-CPU counters roughly here, and are some MiB late on large hosts.
    ///
    /// # Errors
    /// If `/proc` cannot be read.
    pub fn private_bytes(&self) -> io::Result<u64> {
        let mut text = [0; 128];
        let length = self.statm.read_at(&mut text, 0)?;
        let private_pages = private_pages(&text[..length]);
        private_pages
            .map(|pages| pages * PAGE_SIZE_BYTES as u64)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "/proc/self/statm"))
    }

    /// Memory behind `mapping` that nothing else shares. Walks its page tables: some 50 ns a page.
    ///
    /// # Errors
    /// If the kernel lacks `PAGEMAP_SCAN` (Linux 6.7).
    pub fn private_bytes_of(&self, mapping: &Mapping) -> io::Result<u64> {
        self.pagemap.private_bytes(mapping)
    }

    /// What the engine's pool holds.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub fn pool_bytes(&self) -> io::Result<u64> {
        Ok(allocated_pages(&self.pool)? * PAGE_SIZE_BYTES as u64)
    }
}

fn open_statm() -> io::Result<File> {
    File::open("/proc/self/statm")
}

/// Second field less third: resident, and of these backed by files.
fn private_pages(statm: &[u8]) -> Option<u64> {
    let mut fields = std::str::from_utf8(statm).ok()?.split_ascii_whitespace();
    let resident: u64 = fields.nth(1)?.parse().ok()?;
    let of_files: u64 = fields.next()?.parse().ok()?;
    Some(resident.saturating_sub(of_files))
}

/// For an engine that nobody gave another gauge: the process is the domain.
impl MemoryGauge for ProcessMemory {
    fn headroom(&self, budget_bytes: Option<u64>) -> Option<Headroom> {
        let (budget_bytes, as_of) = (budget_bytes?, Instant::now());
        let used = self
            .private_bytes()
            .and_then(|private| Ok(private + self.pool_bytes()?));
        match used {
            Ok(used_bytes) => Some(Headroom {
                bytes: budget_bytes.saturating_sub(used_bytes),
                as_of,
            }),
            Err(error) => {
                complain!(Warn, "cannot tell how much memory is in use: {error}");
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backing::Backing;
    use crate::backing::linux::{LinuxMemory, Userfaultfd};
    use crate::backing::mapping::Mapping;
    use crate::base::page::{PAGE_SIZE_BYTES, PoolPage};

    #[test]
    fn private_memory_is_resident_less_what_files_back() {
        assert_eq!(private_pages(b"1000 700 300 5 0 60 0\n"), Some(400));
        assert_eq!(private_pages(b"1000 3 4 5 0 60 0\n"), Some(0));
        assert_eq!(private_pages(b"1000"), None);
    }

    #[test]
    fn the_gauge_sees_private_memory_come_and_pool_pages_once() {
        let pool = LinuxPool::new().unwrap();
        let memory = ProcessMemory::open(&pool).unwrap();
        assert_eq!(memory.pool_bytes().unwrap(), 0);
        let before = memory.private_bytes().unwrap();
        let taken = vec![1_u8; 64 << 20];
        std::hint::black_box(&taken);
        // Other tests of this program give memory back meanwhile, so half is enough.
        assert!(memory.private_bytes().unwrap() > before + (32 << 20));
        drop(taken);
        let userfaultfd = std::sync::Arc::new(Userfaultfd::open().unwrap());
        let mapping = Mapping::new(PAGE_SIZE_BYTES).unwrap();
        let filled = LinuxMemory::new(mapping, userfaultfd).unwrap();
        filled.fill(0..1, &pool, PoolPage(7)).unwrap();
        assert_eq!(memory.pool_bytes().unwrap(), 4096);
        assert_eq!(memory.headroom(None), None);
        assert_eq!(memory.headroom(Some(1)).unwrap().bytes, 0);
    }
}
