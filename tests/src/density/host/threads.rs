//! CPU and context switches, by thread.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::error::HostError;

/// Name of the merge worker's thread.
const WORKER: &str = "dedup";
/// Name of the kernel's merging thread.
const KSMD: &str = "ksmd";

/// What a thread is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Worker,
    Vcpu,
    Other,
}

impl Kind {
    /// By its name: a vCPU's is `v<index>:<VM>`, cut off after 15 bytes.
    fn of(name: &str) -> Kind {
        let is_vcpu = name.strip_prefix('v').is_some_and(|rest| {
            let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
            digits > 0 && rest[digits..].starts_with(':')
        });
        match name {
            WORKER => Kind::Worker,
            _ if is_vcpu => Kind::Vcpu,
            _ => Kind::Other,
        }
    }
}

/// The scheduler's account of a thread.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Account {
    run_ns: u64,
    /// Times that it was given a CPU, which is how often it was switched to.
    switches: u64,
}

impl Account {
    /// Reads a `schedstat` (`Documentation/scheduler/sched-stats.rst`).
    fn read(path: &Path) -> io::Result<Account> {
        let text = fs::read_to_string(path)?;
        Account::parse(&text).ok_or_else(|| io::Error::other(format!("not a schedstat: {text:?}")))
    }

    fn parse(text: &str) -> Option<Account> {
        let mut numbers = text.split_whitespace().map(str::parse);
        let run_ns = numbers.next()?.ok()?;
        let switches = numbers.nth(1)?.ok()?;
        Some(Account { run_ns, switches })
    }
}

/// Totals of a process's threads.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Totals {
    /// CPU of merge workers.
    pub(crate) worker_ns: u64,
    /// CPU of vCPUs.
    pub(crate) vcpus_ns: u64,
    /// Context switches of all threads.
    pub(crate) switches: u64,
}

impl Totals {
    fn add(&mut self, kind: Kind, account: Account) {
        match kind {
            Kind::Worker => self.worker_ns += account.run_ns,
            Kind::Vcpu => self.vcpus_ns += account.run_ns,
            Kind::Other => {}
        }
        self.switches += account.switches;
    }
}

/// The threads of a process, the ended ones too.
///
/// What a thread did between the last look at it and its end is not in here; the kernel adds it to
/// the process's total alone. With a look a second and guests that live for 30 s or more, that is
/// at most a thirtieth of a guest's vCPU, and nothing of a worker.
#[derive(Debug)]
pub(crate) struct Threads {
    tasks: PathBuf,
    alive: HashMap<u32, (Kind, Account)>,
    ended: Totals,
}

impl Threads {
    /// The threads of a process, none of which was looked at.
    pub(crate) fn of(pid: u32) -> Threads {
        Threads {
            tasks: PathBuf::from(format!("/proc/{pid}/task")),
            alive: HashMap::new(),
            ended: Totals::default(),
        }
    }

    /// Looks at all of them.
    ///
    /// # Errors
    /// If the process is gone.
    pub(crate) fn look(&mut self) -> Result<Totals, HostError> {
        let failed = || HostError::io("read", &self.tasks);
        let mut seen = HashMap::new();
        for entry in fs::read_dir(&self.tasks).map_err(failed())? {
            let path = entry.map_err(failed())?.path();
            let tid = path
                .file_name()
                .and_then(|name| name.to_str()?.parse().ok());
            let name = fs::read_to_string(path.join("comm"));
            // One that ended since the directory was read is counted as ended below.
            if let (Some(tid), Ok(name), Ok(account)) =
                (tid, name, Account::read(&path.join("schedstat")))
            {
                seen.insert(tid, (Kind::of(name.trim_end()), account));
            }
        }
        Ok(self.note(seen))
    }

    /// Takes note of who is there now, and adds up all that were ever seen.
    fn note(&mut self, seen: HashMap<u32, (Kind, Account)>) -> Totals {
        for (tid, (kind, last)) in &self.alive {
            // A thread with less CPU than before is another one with the same number.
            let goes_on = seen
                .get(tid)
                .is_some_and(|(_, now)| now.run_ns >= last.run_ns);
            if !goes_on {
                self.ended.add(*kind, *last);
            }
        }
        self.alive = seen;
        let mut totals = self.ended;
        for (kind, account) in self.alive.values() {
            totals.add(*kind, *account);
        }
        totals
    }
}

/// The kernel's merging thread.
#[derive(Debug)]
pub(crate) struct Ksmd {
    schedstat: PathBuf,
}

impl Ksmd {
    /// Finds it; none in a kernel without KSM.
    pub(crate) fn find() -> Option<Ksmd> {
        for process in procfs::process::all_processes().ok()?.flatten() {
            // A program may call itself so; a thread of the kernel has no memory.
            let is_it = |stat: procfs::process::Stat| stat.comm == KSMD && stat.vsize == 0;
            if process.stat().is_ok_and(is_it) {
                let schedstat = PathBuf::from(format!("/proc/{}/schedstat", process.pid()));
                return Some(Ksmd { schedstat });
            }
        }
        None
    }

    /// Its CPU since the host's boot.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub(crate) fn cpu_ns(&self) -> Result<u64, HostError> {
        let account = Account::read(&self.schedstat);
        Ok(account
            .map_err(HostError::io("read", &self.schedstat))?
            .run_ns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account(run_ns: u64, switches: u64) -> Account {
        Account { run_ns, switches }
    }

    #[test]
    fn a_schedstat_tells_cpu_and_switches() {
        assert_eq!(Account::parse("17 4 3\n"), Some(account(17, 3)));
        assert_eq!(Account::parse("17 4"), None);
    }

    #[test]
    fn threads_are_told_by_their_names() {
        let kinds = [
            "dedup",
            "v0:idle-3",
            "v12:x",
            "v:x",
            "vcpu",
            "events",
            "v0x",
        ]
        .map(Kind::of);
        let (vcpu, other) = (Kind::Vcpu, Kind::Other);
        assert_eq!(
            kinds,
            [Kind::Worker, vcpu, vcpu, other, other, other, other]
        );
    }

    #[test]
    fn ended_threads_still_count() {
        let mut threads = Threads::of(1);
        let first = HashMap::from([
            (1, (Kind::Worker, account(5, 1))),
            (2, (Kind::Vcpu, account(7, 2))),
        ]);
        threads.note(first);
        let second = HashMap::from([
            (1, (Kind::Worker, account(6, 3))),
            (3, (Kind::Vcpu, account(10, 1))),
        ]);
        let totals = threads.note(second);
        let expected = Totals {
            worker_ns: 6,
            vcpus_ns: 17,
            switches: 6,
        };
        assert_eq!(totals, expected);
    }

    #[test]
    fn a_number_that_is_given_again_is_another_thread() {
        let mut threads = Threads::of(1);
        threads.note(HashMap::from([(2, (Kind::Vcpu, account(7, 2)))]));
        let totals = threads.note(HashMap::from([(2, (Kind::Vcpu, account(1, 1)))]));
        assert_eq!((totals.vcpus_ns, totals.switches), (8, 3));
    }
}
