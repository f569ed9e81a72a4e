//! The density benchmark as a program: its figures add up, and it leaves the host as it was.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process};
use samepage_tests::density::host::{HostError, HostSettings};
use samepage_tests::density::model::{Engine, Report};
use samepage_tests::density::report::disagreements;
use samepage_tests::wait::{PATIENCE, wait_until};
use samepage_tests::{binary, kvm};

const KSM: &str = "/sys/kernel/mm/ksm";
/// What the arm `ksm-fast` sets.
const PAGES_TO_SCAN: &str = "5000";

/// One benchmark at a time: it has the host's settings for itself. That of somebody else on this host
/// is waited for.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    wait_until("no other benchmark runs", PATIENCE, || {
        !matches!(HostSettings::open(), Err(HostError::InUse { .. }))
    });
    alone
}

/// Whether it can run here: it makes cgroups, and changes settings of the host that somebody else
/// may be measuring with.
fn skip() -> bool {
    if !kvm::is_present() {
        return true;
    }
    let why = if !rustix::process::geteuid().is_root() {
        "not root"
    } else if !Path::new(KSM).exists() {
        "this kernel has no KSM"
    } else if is_taken() {
        "another benchmark is running"
    } else {
        return false;
    };
    eprintln!("skipped: {why}");
    true
}

fn is_taken() -> bool {
    let run = fs::File::open(format!("{KSM}/run")).expect("kernel KSM");
    flock(&run, FlockOperation::NonBlockingLockExclusive).is_err()
}

/// The settings that a benchmark changes, its cgroups, and its directories.
#[derive(Debug, PartialEq, Eq)]
struct HostState {
    settings: Vec<(String, String)>,
    groups: Vec<PathBuf>,
    directories: Vec<PathBuf>,
}

impl HostState {
    fn now() -> HostState {
        let files = ["run", "pages_to_scan", "sleep_millisecs", "use_zero_pages"];
        let mut paths = files.map(|file| format!("{KSM}/{file}")).to_vec();
        paths.push("/sys/kernel/mm/transparent_hugepage/enabled".to_owned());
        let settings = paths.into_iter().map(|path| {
            let value = fs::read_to_string(&path).unwrap_or_default();
            (path, value)
        });
        HostState {
            settings: settings.collect(),
            groups: named(Path::new("/sys/fs/cgroup/memory"))
                .chain(named(Path::new("/sys/fs/cgroup")))
                .collect(),
            directories: named(&std::env::temp_dir()).collect(),
        }
    }
}

/// What is called as the benchmark calls things.
fn named(directory: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| {
        let name = path.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| name.starts_with("samepage-density-"))
    })
}

fn density(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_density"));
    command.args(arguments).stdin(Stdio::null());
    command
}

/// A benchmark that ends with its test whatever happens: one that is left over keeps all others out.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // A no-op if it has ended. Killed rather than asked: a test that failed must not also hang.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A run with kernel KSM that has changed the host's settings and has guests.
fn running() -> Running {
    // Before any deadline: the benchmark builds the server if it is not there.
    binary::samepage();
    let child = density(&["--workload", "phase", "--engine", "ksm-fast", "--vms", "2"])
        .stdout(Stdio::null())
        .spawn()
        .expect("the benchmark starts");
    let mut running = Running(child);
    wait_until("the run has set its pace", PATIENCE, || {
        let ended = running.0.try_wait().expect("look at the benchmark");
        assert!(ended.is_none(), "the benchmark ended: {ended:?}");
        let pages = fs::read_to_string(format!("{KSM}/pages_to_scan"));
        pages.is_ok_and(|pages| pages.trim() == PAGES_TO_SCAN)
    });
    wait_until("the server has a socket", PATIENCE, || {
        named(&std::env::temp_dir()).any(|directory| directory.join("api.sock").exists())
    });
    running
}

fn signal(running: &Running, signal: Signal) {
    let pid = i32::try_from(running.0.id()).ok().and_then(Pid::from_raw);
    kill_process(pid.expect("a pid"), signal).expect("it is there");
}

#[test]
fn small_runs_add_up_and_leave_the_host_as_it_was() {
    let _alone = alone();
    if skip() {
        return;
    }
    let before = HostState::now();
    let directory = tempfile::tempdir().unwrap();
    let json = directory.path().join("report.json");

    let output = density(&["--preset", "ci", "--json"])
        .arg(&json)
        .output()
        .unwrap();

    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert_eq!(HostState::now(), before);
    let report: Report = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
    let engines: Vec<Engine> = report.runs.iter().map(|run| run.arm.engine).collect();
    assert_eq!(engines, [Engine::Off, Engine::KsmFast, Engine::Samepage]);
    for run in &report.runs {
        let engine = run.arm.engine;
        assert!(run.errors.is_empty(), "{engine}: {:?}", run.errors);
        assert!(run.oracle.is_some() && !run.samples.is_empty(), "{engine}");
        let disagreements = disagreements(run);
        assert!(disagreements.is_empty(), "{engine}: {disagreements:?}");
    }
    // The table shows each engine.
    let table = String::from_utf8(output.stdout).unwrap();
    for engine in engines {
        assert!(table.contains(&engine.to_string()), "{table}");
    }
}

#[test]
fn interrupted_run_leaves_the_host_as_it_was() {
    let _alone = alone();
    if skip() {
        return;
    }
    let before = HostState::now();
    for how in [Signal::INT, Signal::TERM] {
        let mut running = running();
        signal(&running, how);
        assert_eq!(running.0.wait().unwrap().code(), Some(130), "{how:?}");
        assert_eq!(HostState::now(), before, "{how:?}");
    }
}

#[test]
fn killed_run_is_undone_by_restore() {
    let _alone = alone();
    if skip() {
        return;
    }
    let before = HostState::now();
    let mut running = running();
    signal(&running, Signal::KILL);
    running.0.wait().unwrap();
    assert_ne!(HostState::now(), before);

    // Nobody measures on a host that is not as it was.
    let refused = density(&["--workload", "phase", "--engine", "off"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(
        !refused.status.success() && said.contains("--restore"),
        "{said}"
    );

    let restored = density(&["--restore"]).output().unwrap();
    let said = String::from_utf8_lossy(&restored.stderr);
    assert!(restored.status.success(), "{said}");
    assert_eq!(HostState::now(), before);
}
