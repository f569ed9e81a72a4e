//! The two engines behind one face: ours, and the kernel's.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use dedup::{
    AdvisorMode, DirtySource, Engine, Mapping, PAGE_SIZE_BYTES, PAGE_WORDS, Pace, PageSet,
    RegionHandle, Run, Settings,
};
use rustix::fs::{FlockOperation, flock};

use crate::workload::{Workload, fill};

/// Counters at one moment.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Progress {
    /// Pages that need not be there any more: sharing and zero.
    pub(crate) given_back_pages: u64,
    /// Pages that were merged to get there.
    pub(crate) merged_pages: u64,
    /// Net of what the engine takes for itself.
    pub(crate) saved_bytes: i64,
    /// Mappings that guest memory takes, where the engine needs more than it had.
    pub(crate) vmas: Option<u64>,
}

/// An engine under measurement, with regions filled and not yet scanned.
pub(crate) trait Peer {
    fn start(&mut self) -> io::Result<()>;
    fn unmerge(&mut self) -> io::Result<()>;
    fn progress(&self) -> io::Result<Progress>;
    /// CPU time of the engine's own thread so far, in nanoseconds.
    fn cpu_ns(&self) -> io::Result<u64>;
    /// Takes note of a write by the guest, as a hypervisor's dirty log would.
    fn wrote(&self, _region: usize, _page: usize) {}
    /// Start of each region.
    fn region_starts(&self) -> Vec<*mut u64>;
    /// Takes the last region away.
    fn exit_one(&mut self);
    /// Adds a region with the content of one of the workload's.
    fn add(&mut self, workload: &Workload, region: usize) -> io::Result<()>;
    /// Has the engine find its pace by itself from now on, with pauses of [`ADVISED_SLEEP_MS`]. KSM
    /// takes its target in seconds, at least one.
    fn advise(&self, target_ms: u32) -> io::Result<()>;
}

/// Pause between two batches under an advisor: KSM's default.
const ADVISED_SLEEP_MS: u32 = 20;
/// Most of a CPU under an advisor: KSM's default.
const ADVISED_CPU_PERCENT: u32 = 70;

pub(crate) fn filled(workload: &Workload, region: usize) -> io::Result<Mapping> {
    let contents = &workload.regions[region];
    let size_bytes = contents.len() * PAGE_SIZE_BYTES;
    let mapping = if workload.has_huge_pages {
        Mapping::with_huge_pages(size_bytes)
    } else {
        Mapping::new(size_bytes)
    }
    .map_err(io::Error::other)?;
    for (page, &content) in contents.iter().enumerate() {
        let words = mapping
            .as_ptr()
            .wrapping_add(page * PAGE_SIZE_BYTES)
            .cast::<u64>();
        // SAFETY: the page lies in the mapping, which nobody else uses yet.
        fill(
            unsafe { std::slice::from_raw_parts_mut(words, PAGE_WORDS) },
            content,
        );
    }
    Ok(mapping)
}

fn schedstat_ns(path: &Path) -> io::Result<u64> {
    let text = fs::read_to_string(path)?;
    text.split_whitespace()
        .next()
        .and_then(|first| first.parse().ok())
        .ok_or_else(|| io::Error::other(format!("{}: not a schedstat: {text}", path.display())))
}

/// The directory of the process or thread called `name`.
fn task_named(tasks: &str, name: &str) -> io::Result<PathBuf> {
    // A new thread takes its name only once it runs.
    let until = Instant::now() + Duration::from_secs(5);
    while Instant::now() < until {
        for entry in fs::read_dir(tasks)? {
            let path = entry?.path();
            if fs::read_to_string(path.join("comm")).is_ok_and(|comm| comm.trim() == name) {
                return Ok(path);
            }
        }
        std::thread::yield_now();
    }
    Err(io::Error::other(format!("no task named {name} in {tasks}")))
}

/// What the bench wrote to a region since the engine asked last: the dirty log of a guest that
/// the bench itself plays. Kernel KSM has no use for one.
#[derive(Debug, Clone, Default)]
pub(crate) struct Written(Arc<Mutex<Vec<u32>>>);

impl Written {
    fn lock(&self) -> MutexGuard<'_, Vec<u32>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DirtySource for Written {
    fn collect(&self, dirty: &mut PageSet, _ignored: &PageSet) -> io::Result<()> {
        for page in self.lock().drain(..) {
            dirty.insert(page);
        }
        Ok(())
    }
}

/// Our engine.
pub(crate) struct Samepage {
    regions: Vec<RegionHandle>,
    written: Vec<Written>,
    pub(crate) engine: Engine,
    task: PathBuf,
}

impl Samepage {
    pub(crate) fn new(workload: &Workload) -> io::Result<Samepage> {
        let settings = Settings {
            run: Run::Stop,
            pace: Pace {
                pages_to_scan: 20_000,
                sleep_millisecs: 0,
                ..Pace::default()
            },
            ..Settings::default()
        };
        let engine = Engine::new(&settings).map_err(io::Error::other)?;
        let task = task_named("/proc/self/task", "dedup")?;
        let mut peer = Samepage {
            regions: Vec::new(),
            written: Vec::new(),
            engine,
            task,
        };
        (0..workload.regions.len()).try_for_each(|region| peer.add(workload, region))?;
        Ok(peer)
    }

    fn set_run(&self, run: Run) -> io::Result<()> {
        self.engine.set_run(run).map_err(io::Error::other)
    }
}

impl Peer for Samepage {
    fn start(&mut self) -> io::Result<()> {
        self.set_run(Run::Merge)
    }

    fn unmerge(&mut self) -> io::Result<()> {
        self.set_run(Run::Unmerge)
    }

    fn progress(&self) -> io::Result<Progress> {
        let stats = self.engine.stats();
        Ok(Progress {
            given_back_pages: stats.pages_sharing + stats.pages_zero,
            merged_pages: stats.pages_sharing + stats.pages_shared + stats.pages_zero,
            saved_bytes: stats.saved_bytes,
            vmas: Some(stats.vmas),
        })
    }

    fn cpu_ns(&self) -> io::Result<u64> {
        schedstat_ns(&self.task.join("schedstat"))
    }

    fn region_starts(&self) -> Vec<*mut u64> {
        self.regions
            .iter()
            .map(|region| region.mapping().as_ptr().cast())
            .collect()
    }

    fn wrote(&self, region: usize, page: usize) {
        self.written[region]
            .lock()
            .push(u32::try_from(page).unwrap_or(u32::MAX));
    }

    fn exit_one(&mut self) {
        self.regions.pop();
    }

    fn add(&mut self, workload: &Workload, region: usize) -> io::Result<()> {
        let source = Written(Arc::default());
        let mapping = filled(workload, region)?;
        let region = self
            .engine
            .register_watched(mapping, Box::new(source.clone()));
        self.regions.push(region.map_err(io::Error::other)?);
        self.written.push(source);
        Ok(())
    }

    fn advise(&self, target_ms: u32) -> io::Result<()> {
        let pace = Pace {
            sleep_millisecs: ADVISED_SLEEP_MS,
            max_cpu_percent: ADVISED_CPU_PERCENT,
            advisor_mode: AdvisorMode::ScanTime,
            target_scan_time_ms: target_ms,
            ..Pace::default()
        };
        self.engine.set_pace(pace);
        Ok(())
    }
}

const KSM: &str = "/sys/kernel/mm/ksm";

/// Makes sure that no other run of this bench goes on until the file is closed: two would set kernel
/// KSM's pace for each other, and the second would restore what the first had set.
pub(crate) fn alone() -> io::Result<fs::File> {
    let file = fs::File::open(Path::new(KSM).join("run"))?;
    flock(&file, FlockOperation::NonBlockingLockExclusive)
        .map_err(|error| io::Error::other(format!("{KSM} is in use by another run: {error}")))?;
    Ok(file)
}

/// Settings of kernel KSM as they were, put back on drop.
struct SavedSettings(Vec<(&'static str, String)>);

impl SavedSettings {
    fn save() -> io::Result<SavedSettings> {
        [
            "run",
            "pages_to_scan",
            "sleep_millisecs",
            "use_zero_pages",
            "advisor_max_cpu",
            "advisor_target_scan_time",
            "advisor_mode",
        ]
        .into_iter()
        .map(|name| Ok((name, fs::read_to_string(Path::new(KSM).join(name))?)))
        .collect::<io::Result<_>>()
        .map(SavedSettings)
    }
}

impl Drop for SavedSettings {
    fn drop(&mut self) {
        // What is merged is unmerged first: some settings can't be changed otherwise.
        let mut all = vec![("run", "2".to_owned())];
        for (name, value) in self.0.iter().rev() {
            // A choice is shown as `[none] scan-time`.
            let chosen = value
                .split(['[', ']'])
                .nth(1)
                .unwrap_or(value)
                .trim()
                .to_owned();
            all.push((name, chosen));
        }
        for (name, value) in all {
            if let Err(error) = fs::write(Path::new(KSM).join(name), &value) {
                eprintln!("cannot restore {KSM}/{name} to {value}: {error}");
            }
        }
    }
}

/// Kernel KSM, tuned to its best: no sleep, large batches, zero pages dropped, smart scan as is.
pub(crate) struct Ksm {
    regions: Vec<Mapping>,
    task: PathBuf,
    _saved: SavedSettings,
}

impl Ksm {
    pub(crate) fn new(workload: &Workload) -> io::Result<Ksm> {
        let saved = SavedSettings::save()?;
        let task = task_named("/proc", "ksmd")?;
        for (name, value) in [
            ("run", "2"),
            ("advisor_mode", "none"),
            ("pages_to_scan", "20000"),
            ("sleep_millisecs", "0"),
            ("use_zero_pages", "1"),
        ] {
            set(name, value)?;
        }
        let mut peer = Ksm {
            regions: Vec::new(),
            task,
            _saved: saved,
        };
        (0..workload.regions.len()).try_for_each(|region| peer.add(workload, region))?;
        Ok(peer)
    }
}

fn set(name: &str, value: &str) -> io::Result<()> {
    fs::write(Path::new(KSM).join(name), value)
        .map_err(|error| io::Error::other(format!("{KSM}/{name}: cannot write {value}: {error}")))
}

fn get(name: &str) -> io::Result<i64> {
    let text = fs::read_to_string(Path::new(KSM).join(name))?;
    text.trim()
        .parse()
        .map_err(|_| io::Error::other(format!("{KSM}/{name}: {text}")))
}

impl Peer for Ksm {
    fn start(&mut self) -> io::Result<()> {
        set("run", "1")
    }

    fn unmerge(&mut self) -> io::Result<()> {
        set("run", "2")
    }

    fn progress(&self) -> io::Result<Progress> {
        let count = |name| get(name).map(|value| u64::try_from(value).unwrap_or(0));
        let (shared, sharing) = (count("pages_shared")?, count("pages_sharing")?);
        let zero = count("ksm_zero_pages")?;
        Ok(Progress {
            given_back_pages: sharing + zero,
            merged_pages: sharing + shared + zero,
            saved_bytes: get("general_profit")?,
            vmas: None,
        })
    }

    fn cpu_ns(&self) -> io::Result<u64> {
        schedstat_ns(&self.task.join("schedstat"))
    }

    fn region_starts(&self) -> Vec<*mut u64> {
        self.regions
            .iter()
            .map(|region| region.as_ptr().cast())
            .collect()
    }

    fn exit_one(&mut self) {
        self.regions.pop();
    }

    fn add(&mut self, workload: &Workload, region: usize) -> io::Result<()> {
        let mapping = filled(workload, region)?;
        // SAFETY: the range is the mapping's own; the advice changes no content.
        let advised = unsafe {
            libc::madvise(
                mapping.as_ptr().cast(),
                mapping.size_bytes(),
                libc::MADV_MERGEABLE,
            )
        };
        if advised != 0 {
            return Err(io::Error::last_os_error());
        }
        self.regions.push(mapping);
        Ok(())
    }

    fn advise(&self, target_ms: u32) -> io::Result<()> {
        for (name, value) in [
            ("sleep_millisecs", ADVISED_SLEEP_MS),
            ("advisor_max_cpu", ADVISED_CPU_PERCENT),
            ("advisor_target_scan_time", target_ms.div_ceil(1000)),
        ] {
            set(name, &value.to_string())?;
        }
        set("advisor_mode", "scan-time")
    }
}

/// Memory that nobody merges.
pub(crate) struct Off {
    regions: Vec<Mapping>,
}

impl Off {
    pub(crate) fn new(workload: &Workload) -> io::Result<Off> {
        Ok(Off {
            regions: (0..workload.regions.len())
                .map(|region| filled(workload, region))
                .collect::<Result<_, _>>()?,
        })
    }

    pub(crate) fn region_starts(&self) -> Vec<*mut u64> {
        self.regions
            .iter()
            .map(|region| region.as_ptr().cast())
            .collect()
    }
}

/// A word of a region that this process alone writes to.
pub(crate) fn write_word(start: *mut u64, page: usize, word: usize, value: u64) {
    let address = start.wrapping_add(page * PAGE_WORDS + word);
    debug_assert!(!ptr::eq(address, ptr::null()));
    // SAFETY: callers name pages of a region that lives as long as the measurement.
    unsafe { address.write_volatile(value) }
}

/// Writes to a page what it holds already.
pub(crate) fn rewrite_word(start: *mut u64, page: usize, word: usize) {
    let address = start.wrapping_add(page * PAGE_WORDS + word);
    // SAFETY: as for `write_word`.
    let value = unsafe { address.read_volatile() };
    write_word(start, page, word, value);
}
