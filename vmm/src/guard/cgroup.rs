//! The memory cgroups that this process is in, version 2 or 1: limits, use, and what the kernel
//! says of them.
//!
//! The kernel's OOM killer acts on whichever group of the hierarchy is full, so all of them that
//! have a limit are watched, not just the innermost. Sources: `Documentation/admin-guide/
//! cgroup-v2.rst`, `cgroup-v1/memory.rst`, and `proc_pid_mountinfo(5)`.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

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

/// One group of the hierarchy.
#[derive(Debug)]
struct Level {
    version: Version,
    directory: PathBuf,
    usage: File,
}

/// The groups of this process.
#[derive(Debug)]
pub(crate) struct Cgroups {
    levels: Vec<Level>,
    pressure: Option<File>,
}

impl Cgroups {
    /// Finds the groups. A system without a memory controller has none.
    ///
    /// # Errors
    /// If the places cannot be read.
    pub(crate) fn find(places: &Places) -> io::Result<Cgroups> {
        let membership = fs::read_to_string(&places.membership)?;
        let mounts = fs::read_to_string(&places.mounts)?;
        let mut levels = Vec::new();
        let mut pressure = None;
        for (version, mount, group) in hierarchies(&membership, &mounts) {
            let mut directory = mount.join(group.strip_prefix("/").unwrap_or(&group));
            if version == Version::V2 && pressure.is_none() {
                pressure = File::open(directory.join("memory.pressure")).ok();
            }
            while directory.starts_with(&mount) {
                // A group without the file has no memory controller, as version 2's root.
                if let Ok(usage) = File::open(directory.join(version.usage())) {
                    levels.push(Level {
                        version,
                        directory: directory.clone(),
                        usage,
                    });
                }
                if !directory.pop() {
                    break;
                }
            }
        }
        let pressure = pressure.or_else(|| File::open("/proc/pressure/memory").ok());
        Ok(Cgroups { levels, pressure })
    }

    /// The fullest of the groups that have a limit.
    pub(crate) fn filled(&self) -> Option<Filled> {
        let filled = self.levels.iter().filter_map(Level::filled);
        filled.min_by_key(|filled| filled.headroom_bytes())
    }

    /// Whether the kernel waits for an end in one of the groups.
    pub(crate) fn is_out(&self) -> bool {
        self.levels.iter().any(Level::is_out)
    }

    /// Share of the last 10 s in percent that some task of the group, or else of the host, waited
    /// for memory.
    pub(crate) fn pressure_percent(&self) -> f64 {
        let text = self.pressure.as_ref().map(read);
        let text = text.and_then(Result::ok).unwrap_or_default();
        pressure_percent(&text).unwrap_or(0.0)
    }
}

impl Level {
    fn limit_bytes(&self) -> Option<u64> {
        let limit = |name: &&str| {
            let text = fs::read_to_string(self.directory.join(name)).ok()?;
            let bytes: u64 = text.trim().parse().ok()?;
            (bytes < NO_LIMIT_BYTES).then_some(bytes)
        };
        self.version.limits().iter().filter_map(limit).min()
    }

    fn filled(&self) -> Option<Filled> {
        let limit_bytes = self.limit_bytes()?;
        let use_bytes: u64 = read(&self.usage).ok()?.trim().parse().ok()?;
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
        let stat = fs::read_to_string(self.directory.join("memory.stat")).unwrap_or_default();
        let value = |name: &str| number_of(&stat, name).unwrap_or(0);
        self.version.cache().into_iter().map(value).sum()
    }

    /// Version 2 counts ends (`oom` of `memory.events`), which comes too late; what it shows in
    /// time is its use at the limit. Version 1 tells while it lasts.
    fn is_out(&self) -> bool {
        let control = self.directory.join("memory.oom_control");
        let text = fs::read_to_string(control).unwrap_or_default();
        number_of(&text, "under_oom").is_some_and(|under| under > 0)
    }
}

fn read(file: &File) -> io::Result<String> {
    let mut text = [0; 256];
    let length = file.read_at(&mut text, 0)?;
    Ok(String::from_utf8_lossy(&text[..length]).into_owned())
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
            ],
        );
        let cgroups = fake.find();
        assert_eq!(cgroups.filled(), filled(1000, 8000));
        assert!((cgroups.pressure_percent() - 7.5).abs() < 1e-9);
        assert!(!cgroups.is_out());
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
            ],
        );
        let cgroups = fake.find();
        assert_eq!(cgroups.filled(), None);
        fake.set("a/b", &[("memory.limit_in_bytes", "4096\n")]);
        assert_eq!(cgroups.filled(), filled(5, 4096));
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
