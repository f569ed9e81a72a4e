//! The memory cgroups that this process is in, version 2 or 1: limits, use, and what the kernel
//! says of them.
//!
//! The kernel's OOM killer acts on whichever group of the hierarchy is full, so all of them that
//! have a limit are watched, not just the innermost. Sources: `Documentation/admin-guide/
//! cgroup-v2.rst`, `cgroup-v1/memory.rst`, and `proc_pid_mountinfo(5)`.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::policy::Filled;

/// Where a process finds its groups.
#[derive(Debug, Clone)]
pub(crate) struct Places {
    /// `/proc/self/cgroup`.
    pub(crate) membership: PathBuf,
    /// `/proc/self/mountinfo`.
    pub(crate) mounts: PathBuf,
}

impl Default for Places {
    fn default() -> Places {
        Places {
            membership: "/proc/self/cgroup".into(),
            mounts: "/proc/self/mountinfo".into(),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

impl Version {
    /// Files that each hold a limit in bytes, or a word for none. Above `memory.high` tasks are
    /// put to sleep for longer and longer; that is as bad as an end for a guest, and never ends.
    fn limits(self) -> &'static [&'static str] {
        match self {
            Version::V1 => &["memory.limit_in_bytes"],
            Version::V2 => &["memory.max", "memory.high"],
        }
    }

    fn usage(self) -> &'static str {
        match self {
            Version::V1 => "memory.usage_in_bytes",
            Version::V2 => "memory.current",
        }
    }

    /// Files that tell of a group that is out of memory, best first. That of a group alone is better
    /// than that of all groups below it, which are others' (Linux 5.2).
    fn events(self) -> &'static [&'static str] {
        match self {
            Version::V1 => &["memory.oom_control"],
            Version::V2 => &["memory.events.local", "memory.events"],
        }
    }

    /// The line of such a file that counts.
    fn ooms(self) -> &'static str {
        match self {
            Version::V1 => "under_oom",
            Version::V2 => "oom",
        }
    }

    /// Lines of `memory.stat` that add up to the page cache that the kernel can take back.
    fn cache(self) -> [&'static str; 2] {
        match self {
            Version::V1 => ["total_inactive_file", "total_active_file"],
            Version::V2 => ["inactive_file", "active_file"],
        }
    }
}

/// Version 1 has no word for "no limit" but a number that no machine holds.
const NO_LIMIT_BYTES: u64 = 1 << 60;
/// Longest text that is read of a file.
const TEXT_BYTES: usize = 8192;

/// Times that groups were out of memory, as far as some guard of this process took note of them, by
/// the device and inode of the file that tells: an event is one guard's to act upon.
static NOTED_OOMS: Mutex<BTreeMap<(u64, u64), u64>> = Mutex::new(BTreeMap::new());

/// One group of the hierarchy.
#[derive(Debug)]
struct Level {
    version: Version,
    // Kept open, and read without allocating anything: what an open file takes is charged to the
    // group, and whoever asks when it is full is put to sleep for it. Opening also costs more than
    // reading, and the guard may look a thousand times a second.
    limits: Vec<File>,
    usage: File,
    stat: Option<File>,
    events: Option<File>,
    /// That file's name in [`NOTED_OOMS`].
    events_key: (u64, u64),
    /// Times that the group was out of memory, when this was looked at last.
    ooms: AtomicU64,
}

/// The groups of this process.
#[derive(Debug)]
pub(crate) struct Cgroups {
    levels: Vec<Level>,
    pressure: Option<File>,
    /// Open, so that it takes no descriptor to see that the process was moved.
    membership: File,
    /// What it said when the groups were found.
    found_by: Option<String>,
    /// Files that groups without a memory controller would have with one.
    absent: Vec<PathBuf>,
}

impl Cgroups {
    /// Finds the groups. A system without a memory controller has none.
    ///
    /// # Errors
    /// If the places cannot be read.
    pub(crate) fn find(places: &Places) -> io::Result<Cgroups> {
        let membership = File::open(&places.membership)?;
        let found_by = read(&membership, |text| Some(text.to_owned()));
        let mounts = fs::read_to_string(&places.mounts)?;
        let (mut levels, mut absent) = (Vec::new(), Vec::new());
        let mut pressure = None;
        let groups = hierarchies(&fs::read_to_string(&places.membership)?, &mounts);
        for (version, mount, group) in groups {
            let mut directory = mount.join(group.strip_prefix("/").unwrap_or(&group));
            if version == Version::V2 && pressure.is_none() {
                pressure = File::open(directory.join("memory.pressure")).ok();
            }
            while directory.starts_with(&mount) {
                // A group without the file has no memory controller, as version 2's root.
                match Level::open(version, &directory) {
                    Some(level) => levels.push(level),
                    None => absent.push(directory.join(version.usage())),
                }
                if !directory.pop() {
                    break;
                }
            }
        }
        let pressure = pressure.or_else(|| File::open("/proc/pressure/memory").ok());
        Ok(Cgroups {
            levels,
            pressure,
            membership,
            found_by,
            absent,
        })
    }

    /// Whether the process was moved into another group since, or one of its groups got a memory
    /// controller. Takes no descriptor.
    pub(crate) fn have_changed(&self) -> bool {
        let is_moved = |text: &str| Some(self.found_by.as_deref() != Some(text));
        read(&self.membership, is_moved).unwrap_or(false)
            || self.absent.iter().any(|file| file.exists())
    }

    /// The fullest of the groups that have a limit.
    pub(crate) fn filled(&self) -> Option<Filled> {
        let filled = self.levels.iter().filter_map(Level::filled);
        filled.min_by_key(|filled| filled.headroom_bytes())
    }

    /// Whether one of the groups is out of memory, or was since the last look of this process. All of
    /// them are looked at: what one shortage did to several groups is one event.
    pub(crate) fn is_out(&self) -> bool {
        let out = self.levels.iter().filter(|level| level.is_out());
        out.count() > 0
    }

    /// Share of the last 10 s in percent that some task of the group, or else of the host, waited
    /// for memory.
    pub(crate) fn pressure_percent(&self) -> f64 {
        let percent = self
            .pressure
            .as_ref()
            .map(|file| read(file, pressure_percent));
        percent.flatten().unwrap_or(0.0)
    }
}

impl Level {
    /// `None` for a group without a memory controller.
    fn open(version: Version, directory: &Path) -> Option<Level> {
        let open = |name: &str| File::open(directory.join(name)).ok();
        let usage = open(version.usage())?;
        let events = version.events().iter().find_map(|name| open(name));
        let metadata = events.as_ref().and_then(|file| file.metadata().ok());
        let mut level = Level {
            version,
            usage,
            limits: version
                .limits()
                .iter()
                .filter_map(|name| open(name))
                .collect(),
            stat: open("memory.stat"),
            events_key: metadata.map_or((0, 0), |it| (it.dev(), it.ino())),
            events,
            ooms: AtomicU64::new(0),
        };
        // What happened before anybody looked counts as noted.
        let told = level.ooms_told();
        let mut noted = noted_ooms();
        let number = noted.entry(level.events_key).or_insert(told);
        // A number that went down is that of another group, with the inode of one that is gone.
        *number = told.min(*number);
        level.ooms = AtomicU64::new(*number);
        Some(level)
    }

    fn ooms_told(&self) -> u64 {
        let count = |text: &str| number_of(text, self.version.ooms());
        let number = self.events.as_ref().and_then(|file| read(file, count));
        number.unwrap_or(0)
    }

    fn limit_bytes(&self) -> Option<u64> {
        let limits = self.limits.iter().filter_map(|file| read(file, number));
        limits.filter(|bytes| *bytes < NO_LIMIT_BYTES).min()
    }

    fn filled(&self) -> Option<Filled> {
        let limit_bytes = self.limit_bytes()?;
        let use_bytes = read(&self.usage, number)?;
        let mut filled = Filled {
            use_bytes,
            limit_bytes,
        };
        // Page cache goes before anybody is killed. Asked for only where it matters: it makes the
        // kernel add up the counters of all CPUs.
        if filled.is_short() {
            filled.use_bytes = use_bytes.saturating_sub(self.cache_bytes());
        }
        Some(filled)
    }

    fn cache_bytes(&self) -> u64 {
        let lines = self.version.cache();
        let add_up = |text: &str| Some(lines.iter().filter_map(|name| number_of(text, name)).sum());
        let bytes = self.stat.as_ref().and_then(|file| read(file, add_up));
        bytes.unwrap_or(0)
    }

    /// Version 1 tells while it lasts. Version 2 counts the times, also those that nobody was
    /// killed for, so one that nobody took note of yet tells.
    fn is_out(&self) -> bool {
        let told = self.ooms_told();
        match self.version {
            Version::V1 => told > 0,
            Version::V2 if told == self.ooms.swap(told, Ordering::Relaxed) => false,
            Version::V2 => {
                let mut noted = noted_ooms();
                let number = noted.entry(self.events_key).or_insert(0);
                let is_new = told > *number;
                *number = told;
                is_new
            }
        }
    }
}

fn noted_ooms() -> MutexGuard<'static, BTreeMap<(u64, u64), u64>> {
    // Changed by single inserts: whole after any panic.
    NOTED_OOMS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What `parse` makes of the file's text, or of the beginning of one that is longer than a page or
/// two: what is asked for stands near it.
fn read<T>(file: &File, parse: impl FnOnce(&str) -> Option<T>) -> Option<T> {
    let mut text = [0; TEXT_BYTES];
    let length = file.read_at(&mut text, 0).ok()?;
    parse(std::str::from_utf8(&text[..length]).ok()?)
}

fn number(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

fn number_of(text: &str, name: &str) -> Option<u64> {
    let mut lines = text.lines().filter_map(|line| line.split_once(' '));
    let (_, value) = lines.find(|(key, _)| *key == name)?;
    value.trim().parse().ok()
}

/// `some avg10=1.23 ...`.
fn pressure_percent(text: &str) -> Option<f64> {
    let some = text.lines().find(|line| line.starts_with("some "))?;
    let mut fields = some.split(' ').filter_map(|field| field.split_once('='));
    fields.find(|(name, _)| *name == "avg10")?.1.parse().ok()
}

/// Mount point of each hierarchy with a memory controller, and the process's group below it.
fn hierarchies(membership: &str, mounts: &str) -> Vec<(Version, PathBuf, PathBuf)> {
    let mut found = Vec::new();
    for line in membership.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(group)) =
            (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let version = match controllers {
            "" => Version::V2,
            _ if controllers.split(',').any(|name| name == "memory") => Version::V1,
            _ => continue,
        };
        let mount = mounts.lines().find_map(|line| mount_of(line, version));
        if let Some((root, point)) = mount {
            // What is mounted may be a part of the hierarchy: a container's own.
            let group = Path::new(group);
            let below = group.strip_prefix(&root).unwrap_or(group);
            found.push((version, point, below.to_owned()));
        }
    }
    found
}

/// Root and mount point of a `mountinfo` line that is a hierarchy of `version`.
fn mount_of(line: &str, version: Version) -> Option<(PathBuf, PathBuf)> {
    let (before, after) = line.split_once(" - ")?;
    let mut fields = before.split(' ').skip(3);
    let (root, point) = (fields.next()?, fields.next()?);
    let mut fields = after.split(' ');
    let (kind, options) = (fields.next()?, fields.nth(1)?);
    let is_it = match version {
        Version::V2 => kind == "cgroup2",
        Version::V1 => kind == "cgroup" && options.split(',').any(|option| option == "memory"),
    };
    is_it.then(|| (root.into(), point.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A hierarchy of plain files, with the process in `/a/b`.
    struct Fake {
        directory: tempfile::TempDir,
    }

    impl Fake {
        fn new(kind: &str, options: &str, membership: &str) -> Fake {
            let fake = Fake {
                directory: tempfile::tempdir().unwrap(),
            };
            fs::create_dir_all(fake.path("cgroup/a/b")).unwrap();
            let point = fake.path("cgroup");
            let mounts = format!(
                "22 1 0:20 / /proc rw - proc proc rw\n\
                 30 22 0:26 / {} rw,relatime shared:9 - {kind} cgroup {options}\n",
                point.display()
            );
            fs::write(fake.path("mountinfo"), mounts).unwrap();
            fs::write(fake.path("membership"), membership).unwrap();
            fake
        }

        fn path(&self, name: &str) -> PathBuf {
            self.directory.path().join(name)
        }

        fn set(&self, group: &str, files: &[(&str, &str)]) {
            for (name, text) in files {
                fs::write(self.path("cgroup").join(group).join(name), text).unwrap();
            }
        }

        fn find(&self) -> Cgroups {
            let places = Places {
                membership: self.path("membership"),
                mounts: self.path("mountinfo"),
            };
            Cgroups::find(&places).unwrap()
        }
    }

    fn filled(use_bytes: u64, limit_bytes: u64) -> Option<Filled> {
        Some(Filled {
            use_bytes,
            limit_bytes,
        })
    }

    #[test]
    fn version_2_has_its_limit_use_and_pressure() {
        let fake = Fake::new("cgroup2", "rw,nsdelegate", "0::/a/b\n");
        let pressure = "some avg10=7.50 avg60=1.00 avg300=0.00 total=1\nfull avg10=2.00 total=1\n";
        fake.set(
            "a/b",
            &[
                ("memory.max", "8000\n"),
                ("memory.high", "max\n"),
                ("memory.current", "1000\n"),
                ("memory.pressure", pressure),
                ("memory.events", "low 0\nhigh 0\nmax 8\noom 0\noom_kill 0\n"),
            ],
        );
        let cgroups = fake.find();
        assert_eq!(cgroups.filled(), filled(1000, 8000));
        assert!((cgroups.pressure_percent() - 7.5).abs() < 1e-9);
        assert!(!cgroups.is_out());
        let events = "low 0\nhigh 0\nmax 9\noom 1\noom_kill 0\n";
        fake.set("a/b", &[("memory.events", events)]);
        assert!(cgroups.is_out(), "since the last look");
        assert!(!cgroups.is_out(), "not since then");
        fake.set(
            "a/b",
            &[("memory.current", "2000\n"), ("memory.high", "5000\n")],
        );
        assert_eq!(
            cgroups.filled(),
            filled(2000, 5000),
            "read anew at each look"
        );
    }

    #[test]
    fn an_event_is_acted_upon_once_by_one_of_the_guards_of_a_process() {
        let fake = Fake::new("cgroup2", "rw", "0::/a/b\n");
        let events = |number: u32| format!("low 0\nmax 9\noom {number}\noom_kill 0\n");
        let set = |number| {
            let text: String = events(number);
            for group in ["a", "a/b"] {
                let files = [("memory.current", "1"), ("memory.events", text.as_str())];
                fake.set(group, &files);
            }
        };
        set(3);
        let (first, second) = (fake.find(), fake.find());
        assert!(
            !first.is_out() && !second.is_out(),
            "it was before their time"
        );
        set(4);
        assert!(first.is_out());
        assert!(!first.is_out(), "the group above told of the same");
        assert!(!second.is_out(), "the first one acts upon it");
        let third = fake.find();
        assert!(!third.is_out());
        set(5);
        assert!(third.is_out() && !first.is_out());
    }

    #[test]
    fn what_happened_to_groups_below_is_not_this_groups() {
        let fake = Fake::new("cgroup2", "rw", "0::/a/b\n");
        let quiet = "low 0\nmax 0\noom 0\noom_kill 0\n";
        let files = |below: &'static str| {
            [
                ("memory.current", "1"),
                ("memory.events", below),
                ("memory.events.local", quiet),
            ]
        };
        fake.set("a", &files(quiet));
        let cgroups = fake.find();
        fake.set("a", &files("low 0\nmax 7\noom 7\noom_kill 7\n"));
        assert!(!cgroups.is_out());
    }

    #[test]
    fn a_process_that_was_moved_is_found_in_its_new_group() {
        let fake = Fake::new("cgroup2", "rw", "0::/a\n");
        let cgroups = fake.find();
        assert_eq!(cgroups.filled(), None);
        assert!(!cgroups.have_changed());
        fake.set("a/b", &[("memory.max", "8000"), ("memory.current", "1000")]);
        assert!(!cgroups.have_changed(), "nobody was moved there");
        fs::write(fake.path("membership"), "0::/a/b\n").unwrap();
        assert!(cgroups.have_changed());
        let cgroups = fake.find();
        assert_eq!(cgroups.filled(), filled(1000, 8000));
        assert!(!cgroups.have_changed());
    }

    #[test]
    fn a_memory_controller_that_is_enabled_later_counts() {
        let fake = Fake::new("cgroup2", "rw", "0::/a/b\n");
        let cgroups = fake.find();
        assert!(!cgroups.have_changed());
        fake.set("a/b", &[("memory.max", "8000"), ("memory.current", "1000")]);
        assert!(cgroups.have_changed());
        assert_eq!(fake.find().filled(), filled(1000, 8000));
    }

    #[test]
    fn the_fullest_group_of_the_hierarchy_counts() {
        let fake = Fake::new("cgroup2", "rw", "0::/a/b\n");
        fake.set("a/b", &[("memory.max", "8000"), ("memory.current", "1000")]);
        fake.set("a", &[("memory.max", "9000"), ("memory.current", "7000")]);
        assert_eq!(fake.find().filled(), filled(7000, 9000));
    }

    #[test]
    fn page_cache_is_not_in_use_once_memory_is_short() {
        let fake = Fake::new("cgroup2", "rw", "0::/a\n");
        let stat = "anon 5000\ninactive_file 700\nactive_file 300\n";
        fake.set("a", &[("memory.max", "8000"), ("memory.stat", stat)]);
        fake.set("a", &[("memory.current", "7900")]);
        assert_eq!(fake.find().filled(), filled(6900, 8000));
    }

    #[test]
    fn version_1_has_a_number_for_no_limit_and_tells_when_it_is_out() {
        let membership = "9:cpu,cpuacct:/\n4:memory:/a/b\n0::/\n";
        let fake = Fake::new("cgroup", "rw,memory", membership);
        let unlimited = "9223372036854771712\n";
        fake.set(
            "a/b",
            &[
                ("memory.limit_in_bytes", unlimited),
                ("memory.usage_in_bytes", "5"),
                (
                    "memory.oom_control",
                    "oom_kill_disable 0\nunder_oom 0\noom_kill 0\n",
                ),
            ],
        );
        let cgroups = fake.find();
        assert_eq!(cgroups.filled(), None);
        fake.set("a/b", &[("memory.limit_in_bytes", "4096\n")]);
        assert_eq!(cgroups.filled(), filled(5, 4096));
        assert!(!cgroups.is_out());
        fake.set(
            "a/b",
            &[(
                "memory.oom_control",
                "oom_kill_disable 0\nunder_oom 1\noom_kill 0\n",
            )],
        );
        assert!(cgroups.is_out());
    }

    #[test]
    fn a_part_of_a_hierarchy_may_be_all_that_is_mounted() {
        let mounts = "30 22 0:26 /pod/a /sys/fs/cgroup rw - cgroup2 cgroup rw\n";
        let found = hierarchies("0::/pod/a/b\n", mounts);
        let expected = (Version::V2, "/sys/fs/cgroup".into(), "b".into());
        assert_eq!(found, [expected]);
    }

    #[test]
    fn a_system_without_a_memory_controller_has_no_limit() {
        let fake = Fake::new("cgroup", "rw,cpu", "1:cpu:/\n0::/\n");
        assert_eq!(fake.find().filled(), None);
    }

    #[test]
    fn this_process_can_ask_for_its_own() {
        let cgroups = Cgroups::find(&Places::default()).unwrap();
        assert!(cgroups.pressure_percent() >= 0.0);
        if let Some(filled) = cgroups.filled() {
            assert!(filled.limit_bytes > 0);
        }
    }
}
