//! What a monitor gives up before it has a second thread.
//!
//! A guest that gets into its monitor is then without: new privileges (`no_new_privs`); running
//! programs, making and removing files, TCP, signals to and tracing of other processes (Landlock);
//! core dumps, which would be files of guest memory. It can still read and write the files that the
//! server may, for a monitor opens the files of its VMs by itself yet.
//!
//! All but the last holds for the calling thread and those that it starts. So it has to come before
//! the runtime, and can be tried in a thread of its own.

use std::io;
use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, LandlockStatus, PathBeneath, PathFd,
    Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};
use rustix::process::{Resource, Rlimit, setrlimit};

/// The newest version of Landlock that is asked for. What the kernel does not have is left out, and
/// told.
const NEWEST: ABI = ABI::V10;

/// Locks the calling thread down, apart from making regular files in `tails`. What could not be had.
pub fn lock_down(tails: Option<&Path>) -> Vec<String> {
    let restricted = match restrict(tails) {
        Ok(restricted) => restricted,
        Err(error) => return vec![format!("landlock: {error}")],
    };
    let mut missing = Vec::new();
    if !restricted.no_new_privs {
        missing.push("no_new_privs".to_owned());
    }
    if restricted.ruleset != RulesetStatus::FullyEnforced {
        missing.push(match restricted.landlock {
            LandlockStatus::Available { effective_abi, .. } => {
                format!("landlock: the kernel has {effective_abi:?} of {NEWEST:?}")
            }
            LandlockStatus::NotEnabled => "landlock: is not enabled".to_owned(),
            LandlockStatus::NotImplemented => "landlock: the kernel has none".to_owned(),
        });
    }
    missing
}

/// Has this process leave no core dump.
///
/// # Errors
/// If the system refuses.
pub fn forbid_core_dumps() -> io::Result<()> {
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    Ok(setrlimit(Resource::Core, none)?)
}

/// What monitors that are started here cannot give up, found out by a thread that does it.
pub fn missing_here() -> Vec<String> {
    let tried = std::thread::spawn(|| lock_down(None)).join();
    tried.unwrap_or_else(|_| vec!["the attempt to lock a thread down failed".to_owned()])
}

fn restrict(tails: Option<&Path>) -> Result<landlock::RestrictionStatus, RulesetError> {
    // Files that are there may be opened, and devices used.
    let opening = AccessFs::ReadFile
        | AccessFs::ReadDir
        | AccessFs::WriteFile
        | AccessFs::Truncate
        | AccessFs::IoctlDev;
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST) & !opening)?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?;
    if let Some(tails) = tails.and_then(|tails| PathFd::new(tails).ok()) {
        ruleset = ruleset.add_rule(PathBeneath::new(tails, AccessFs::MakeReg))?;
    }
    ruleset.restrict_self()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::net::{TcpListener, TcpStream};
    use std::process::{Child, Command, Stdio};

    use rustix::process::{Pid, Signal, kill_process};

    use super::*;

    /// Runs `attempt` in a thread that is locked down, if the kernel can do so.
    fn locked_down(tails: &Path, attempt: impl FnOnce() + Send) {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                let missing = lock_down(Some(tails));
                if missing
                    .iter()
                    .any(|part| part.ends_with("is not enabled") || part.ends_with("has none"))
                {
                    eprintln!("skipped: {missing:?}");
                    return;
                }
                attempt();
            });
            thread.join().unwrap();
        });
    }

    /// Another process of the same user, which ends with its test.
    struct Other(Child);

    impl Other {
        fn start() -> Other {
            let cat = Command::new("cat").stdin(Stdio::piped()).spawn();
            Other(cat.unwrap())
        }
    }

    impl Drop for Other {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn what_is_locked_down_makes_and_removes_no_file_but_a_tail() {
        let (tails, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let present = elsewhere.path().join("disk");
        fs::write(&present, "old").unwrap();
        locked_down(tails.path(), || {
            fs::write(tails.path().join("a"), "tail").unwrap();
            fs::write(&present, "new").unwrap();
            assert_eq!(fs::read(&present).unwrap(), b"new");
            let denied = io::ErrorKind::PermissionDenied;
            let made = fs::write(elsewhere.path().join("b"), "");
            assert_eq!(made.unwrap_err().kind(), denied);
            let made = fs::create_dir(tails.path().join("c"));
            assert_eq!(made.unwrap_err().kind(), denied);
            assert_eq!(fs::remove_file(&present).unwrap_err().kind(), denied);
        });
    }

    #[test]
    fn what_is_locked_down_runs_no_program_and_opens_no_tcp_connection() {
        let tails = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        locked_down(tails.path(), || {
            let denied = io::ErrorKind::PermissionDenied;
            let run = Command::new("true").status();
            assert_eq!(run.unwrap_err().kind(), denied);
            assert_eq!(TcpStream::connect(address).unwrap_err().kind(), denied);
            let bound = TcpListener::bind("127.0.0.1:0");
            assert_eq!(bound.unwrap_err().kind(), denied);
        });
    }

    #[test]
    fn what_is_locked_down_reaches_no_other_process() {
        let (tails, other) = (tempfile::tempdir().unwrap(), Other::start());
        let memory = format!("/proc/{}/mem", other.0.id());
        fs::File::open(&memory).unwrap();
        let pid = Pid::from_raw(i32::try_from(other.0.id()).unwrap()).unwrap();
        locked_down(tails.path(), || {
            fs::File::open(&memory).unwrap_err();
            kill_process(pid, Signal::TERM).unwrap_err();
            // Itself it may see, as the merge engine has to.
            fs::File::open("/proc/self/pagemap").unwrap();
        });
    }

    #[test]
    fn attempt_in_a_thread_leaves_the_process_as_it_was() {
        missing_here();
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("a"), "").unwrap();
    }
}
