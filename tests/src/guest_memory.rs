//! The memory of pageload guests, read from outside out of the server's process: what an oracle
//! counts, without asking the engine anything.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;

use pageload_workload::layout::{self, FIRST_PAGE_ADDRESS, PAGE_BYTES};
use pageload_workload::{Plan, WORDS_PER_PAGE, Workload};

/// Bytes of a page.
pub const PAGE: usize = WORDS_PER_PAGE * size_of::<u64>();
/// Pages of its own that a guest is recognised by.
const MARKS: usize = 3;

/// A process whose memory is read.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    memory: File,
}

impl Process {
    /// Opens `/proc/PID/mem`.
    ///
    /// # Errors
    /// If it is gone, or belongs to somebody else.
    pub fn open(pid: u32) -> io::Result<Process> {
        let memory = File::open(format!("/proc/{pid}/mem"))?;
        Ok(Process { pid, memory })
    }

    fn page(&self, address: u64) -> io::Result<Vec<u8>> {
        let mut page = vec![0; PAGE];
        self.memory.read_exact_at(&mut page, address)?;
        Ok(page)
    }

    /// All of a guest's pages, found by the pages that this guest alone has.
    ///
    /// # Errors
    /// If the process has no such guest, or cannot be read.
    pub fn guest_pages(&self, workload: Workload, mem_size_bytes: u64) -> io::Result<Vec<Vec<u8>>> {
        let plan = Plan::new(workload, layout::page_count(mem_size_bytes));
        let shown = |page: u64, bytes: &[u8]| {
            let word = |index: usize| {
                let word = bytes[index * 8..][..8].try_into();
                u64::from_le_bytes(word.unwrap_or_default())
            };
            plan.content(page).verify(word).is_ok()
        };
        // The last pages are hot: each guest's are its own.
        let last = plan.pages() - 1;
        let guest_end = FIRST_PAGE_ADDRESS + plan.pages() * PAGE_BYTES;
        for (start, end) in self.writable_ranges()? {
            for address in (start..end).step_by(PAGE) {
                if !self.page(address).is_ok_and(|bytes| shown(last, &bytes)) {
                    continue;
                }
                let base = (address + PAGE_BYTES).checked_sub(guest_end);
                let base = base.ok_or_else(|| io::Error::other("a guest below address 0"))?;
                for page in last + 1 - MARKS as u64..last {
                    let bytes = self.page(base + FIRST_PAGE_ADDRESS + page * PAGE_BYTES)?;
                    assert!(shown(page, &bytes), "page {page} of {workload}");
                }
                let pages = (0..mem_size_bytes / PAGE_BYTES).map(|page| base + page * PAGE_BYTES);
                return pages.map(|address| self.page(address)).collect();
            }
        }
        Err(io::Error::other(format!("no guest with {workload}")))
    }

    fn writable_ranges(&self) -> io::Result<Vec<(u64, u64)>> {
        let maps = fs::read_to_string(format!("/proc/{}/maps", self.pid))?;
        let range = |line: &str| {
            let (range, rest) = line.split_once(' ')?;
            // The pool's shared view is no guest's.
            let (start, end) = range.split_once('-').filter(|_| rest.starts_with("rw-p"))?;
            let address = |hex| u64::from_str_radix(hex, 16).ok();
            Some((address(start)?, address(end)?))
        };
        Ok(maps.lines().filter_map(range).collect())
    }
}
