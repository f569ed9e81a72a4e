//! What the host must be like for the figures to mean something, and is not afterwards.

use std::fs;
use std::io;
use std::path::Path;

use dedup::{Mapping, PAGE_SIZE_BYTES};

use crate::peer::write_word;

/// Mappings that a process may have: shuffled memory takes one for each page.
const MAX_MAP_COUNT: &str = "/proc/sys/vm/max_map_count";

/// Size of the free memory, as a power of two pages, that a virtual host takes back.
const REPORTING_ORDER: &str = "/sys/module/page_reporting/parameters/page_reporting_order";

/// The largest that there is, and past it, where the kernel takes that.
const REPORTING_ORDERS: [&str; 2] = ["11", "10"];

const HUGE_PAGE_PAGES: usize = 512;

/// Settings of the kernel as they were, put back on drop.
#[derive(Debug)]
pub(crate) struct Prepared(Vec<(&'static str, String)>);

impl Prepared {
    /// Lets shuffled memory be mapped, and keeps a virtual host from taking free memory back: the
    /// next use of a page would cost ten times what merging it does, and whoever allocates it would
    /// pay.
    pub(crate) fn new() -> io::Result<Prepared> {
        let mut saved = Prepared(Vec::new());
        saved.set(MAX_MAP_COUNT, "1000000")?;
        if Path::new(REPORTING_ORDER).exists() {
            let mut orders = REPORTING_ORDERS.into_iter();
            while orders
                .next()
                .is_some_and(|order| saved.set(REPORTING_ORDER, order).is_err())
            {}
        }
        Ok(saved)
    }

    fn set(&mut self, path: &'static str, value: &str) -> io::Result<()> {
        let before = fs::read_to_string(path)?;
        fs::write(path, value)?;
        self.0.push((path, before));
        Ok(())
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        for (path, value) in &self.0 {
            if let Err(error) = fs::write(path, value) {
                eprintln!("cannot restore {path} to {}: {error}", value.trim());
            }
        }
    }
}

/// Touches three quarters of the free memory, at least what the measurements need, and gives it
/// back: what a virtual host has never seen used it must get first.
pub(crate) fn warm_up(least_bytes: usize) -> io::Result<()> {
    let bytes = least_bytes.max(available_bytes()? / 4 * 3);
    eprintln!("touching {} GiB of memory once", bytes >> 30);
    let size_bytes = bytes.next_multiple_of(HUGE_PAGE_PAGES * PAGE_SIZE_BYTES);
    let mapping = Mapping::with_huge_pages(size_bytes).map_err(io::Error::other)?;
    for page in 0..size_bytes / PAGE_SIZE_BYTES {
        if page % HUGE_PAGE_PAGES == 0 {
            crate::measure::go_on()?;
        }
        write_word(mapping.as_ptr().cast(), page, 0, 1);
    }
    Ok(())
}

fn available_bytes() -> io::Result<usize> {
    let meminfo = fs::read_to_string("/proc/meminfo")?;
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<usize>().ok());
    kib.map(|kib| kib * 1024)
        .ok_or_else(|| io::Error::other("/proc/meminfo: no MemAvailable"))
}
