//! The host's part of the density benchmark: what it changes is as before, whatever ends it.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use memmap2::MmapMut;
use rustix::time::{ClockId, clock_gettime};
use samepage_tests::cgroup::Hierarchy;
use samepage_tests::density::host::journal::ProcessId;
use samepage_tests::density::host::left_over::restore_left_over_in;
use samepage_tests::density::host::setting::Root;
use samepage_tests::density::host::{
    Detail, Group, HostError, HostSettings, MmapLockWatch, Restored, Sampler, Setting,
};
use samepage_tests::density::model::{Engine, Thp};
use samepage_tests::wait::wait_until;
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(60);
/// Directory of the fake host of [`a_run_that_is_killed`].
const ROOT: &str = "SAMEPAGE_TEST_ROOT";
/// Set for [`a_process_that_maps`].
const MAPS: &str = "SAMEPAGE_TEST_MAPS";
/// What [`a_process_that_takes_memory`] takes.
const TAKEN: &str = "SAMEPAGE_TEST_TAKEN_BYTES";
const TAKEN_BYTES: u64 = 64 * MIB;
/// CPU time that it takes, however fast the host is.
const LEAST_CPU_TIME: Duration = Duration::from_millis(100);
const MIB: u64 = 1 << 20;

/// A directory with the files of a host that has some of KSM's settings.
fn fake_host() -> TempDir {
    let host = tempfile::tempdir().expect("a directory");
    for (setting, value) in [
        (Setting::KsmRun, "0"),
        (Setting::KsmAdvisorMode, "none"),
        (Setting::KsmPagesToScan, "123"),
        (Setting::KsmSleepMillisecs, "45"),
        (Setting::KsmUseZeroPages, "0"),
        (Setting::KsmMaxPageSharing, "300"),
        (Setting::ThpEnabled, "madvise"),
        (Setting::ThpDefrag, "never"),
        (Setting::MaxMapCount, "65530"),
    ] {
        let path = Root::at(host.path()).path(setting.path());
        fs::create_dir_all(path.parent().expect("a parent")).expect("its directory");
        fs::write(path, value).expect("its value");
    }
    fs::create_dir(host.path().join("run")).expect("a directory");
    host
}

fn values(root: &Root) -> Vec<Option<String>> {
    let read = |setting: Setting| setting.read(root).expect("a value");
    Setting::ALL.into_iter().map(read).collect()
}

fn journal(host: &Path) -> PathBuf {
    host.join("run/samepage-density/journal.json")
}

#[test]
fn settings_are_as_before_after_the_drop() {
    let host = fake_host();
    let root = Root::at(host.path());
    let before = values(&root);
    let mut settings = HostSettings::open_in(&root).expect("nobody else has it");
    assert!(!journal(host.path()).exists(), "nothing has changed yet");
    settings.apply_engine(Engine::KsmFast).expect("set up");
    settings.apply_thp(Thp::Always).expect("set up");
    settings.set(Setting::MaxMapCount, "1000000").expect("set");
    let during = settings.snapshot().expect("values");
    let of = |setting: Setting| {
        let mut all = during.iter();
        all.find(|(path, _)| path == setting.path())
            .map(|(_, value)| value.as_str())
    };
    assert_eq!(of(Setting::KsmRun), Some("1"));
    assert_eq!(of(Setting::KsmPagesToScan), Some("5000"));
    assert_eq!(of(Setting::ThpEnabled), Some("always"));
    assert_eq!(of(Setting::MaxMapCount), Some("1000000"));
    assert_eq!(of(Setting::KsmSmartScan), None, "this host has none");
    assert!(journal(host.path()).exists());
    drop(settings);
    assert_eq!(values(&root), before);
    let left = fs::read_dir(host.path().join("run"))
        .expect("a directory")
        .count();
    assert_eq!(left, 0, "the journal and its directory are gone");
}

#[test]
fn settings_are_as_before_after_a_panic() {
    let host = fake_host();
    let root = Root::at(host.path());
    let before = values(&root);
    let ended = std::panic::catch_unwind(|| {
        let mut settings = HostSettings::open_in(&root).expect("nobody else has it");
        settings.set(Setting::ThpEnabled, "always").expect("set");
        panic!("in the middle of a run");
    });
    assert!(ended.is_err());
    assert_eq!(values(&root), before);
}

#[test]
fn a_second_benchmark_is_refused_while_the_first_one_runs() {
    let host = fake_host();
    let root = Root::at(host.path());
    let first = HostSettings::open_in(&root).expect("nobody else has it");
    let error = HostSettings::open_in(&root).expect_err("the first one has it");
    assert!(matches!(error, HostError::InUse { .. }), "{error}");
    let error = restore_left_over_in(&root).expect_err("nothing is left over");
    assert!(matches!(error, HostError::InUse { .. }), "{error}");
    drop(first);
    HostSettings::open_in(&root).expect("nobody has it any more");
}

#[test]
fn an_arm_that_needs_what_the_kernel_lacks_is_refused_and_the_rest_is_put_back() {
    let host = fake_host();
    let root = Root::at(host.path());
    let before = values(&root);
    let mut settings = HostSettings::open_in(&root).expect("nobody else has it");
    let error = settings
        .apply_engine(Engine::KsmAdvisor)
        .expect_err("no advisor");
    let message = error.to_string();
    assert!(message.contains("advisor_target_scan_time"), "{message}");
    settings.restore().expect("put back");
    assert_eq!(values(&root), before);
}

/// The benchmark of [`a_killed_run_is_undone_by_the_next_call`], in a process that can be killed.
#[test]
#[ignore = "a child of another test"]
fn a_run_that_is_killed() {
    let Some(host) = std::env::var_os(ROOT) else {
        return;
    };
    let host = PathBuf::from(host);
    let mut settings = HostSettings::open_in(&Root::at(&host)).expect("nobody else has it");
    settings.apply_engine(Engine::KsmDefaults).expect("set up");
    settings.apply_thp(Thp::Always).expect("set up");
    let files = host.join("files");
    settings.note_directory(&files).expect("noted");
    fs::create_dir(&files).expect("a directory");
    fs::write(files.join("disk"), "image").expect("a file");
    let mut server = Command::new("sleep").arg("1000").spawn().expect("a server");
    settings.note_server(server.id()).expect("noted");
    println!("\nserver {}", server.id());
    server.wait().expect("this process is killed first");
}

fn killed_run(host: &Path) -> ProcessId {
    let mut run: Child = Command::new(std::env::current_exe().expect("this program"))
        .args([
            "--ignored",
            "--exact",
            "a_run_that_is_killed",
            "--nocapture",
        ])
        .env(ROOT, host)
        .stdout(Stdio::piped())
        .spawn()
        .expect("a run");
    let output = BufReader::new(run.stdout.take().expect("its output"));
    let mut lines = output.lines().map(|line| line.expect("text"));
    let server = lines.find_map(|line| line.strip_prefix("server ").map(str::to_owned));
    let pid = server.expect("its server").parse().expect("a pid");
    let server = ProcessId::of(pid).expect("its server runs");
    run.kill().expect("SIGKILL");
    run.wait().expect("its end");
    server
}

#[test]
fn a_killed_run_is_undone_by_the_next_call() {
    let host = fake_host();
    let root = Root::at(host.path());
    let before = values(&root);
    let server = killed_run(host.path());
    assert_ne!(values(&root), before, "nobody has put it back");
    assert!(server.is_alive());
    let error = HostSettings::open_in(&root)
        .expect_err("a run was killed")
        .to_string();
    assert!(error.contains("density --restore"), "{error}");
    let Restored::Done(done) = restore_left_over_in(&root).expect("undone") else {
        panic!("nothing was undone");
    };
    assert!(!server.is_alive(), "{done:?}");
    assert!(!host.path().join("files").exists(), "{done:?}");
    assert_eq!(values(&root), before, "{done:?}");
    let again = restore_left_over_in(&root).expect("nothing to do");
    assert_eq!(again, Restored::Nothing);
    HostSettings::open_in(&root).expect("free again");
}

/// The real host's settings, unless this is not root's, or a benchmark runs.
fn real_settings() -> Option<HostSettings> {
    match HostSettings::open() {
        Ok(settings) => Some(settings),
        Err(error) => {
            eprintln!("skipped: {error}");
            None
        }
    }
}

/// One test for all that the kernel itself must accept: only one can have the host's settings.
#[test]
fn the_kernel_takes_every_arm_and_a_group_counts_what_its_processes_take() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root may change host settings");
        return;
    }
    let Some(mut settings) = real_settings() else {
        return;
    };
    let before = settings.snapshot().expect("values");
    if settings.get(Setting::KsmRun).expect("a value").is_some() {
        for engine in [
            Engine::KsmDefaults,
            Engine::KsmFast,
            Engine::Samepage,
            Engine::Off,
            // Last: it lets nobody set the pace, so that what was must be put back in order.
            Engine::KsmAdvisor,
        ] {
            match settings.apply_engine(engine) {
                Ok(()) => {}
                // Linux 6.7 and older.
                Err(HostError::Missing { path, .. }) => eprintln!("no {}", path.display()),
                Err(error) => panic!("{engine}: {error}"),
            }
            // May be changed only while nothing is merged, by whichever process of the host.
            let max_sharing = settings.get(Setting::KsmMaxPageSharing).expect("a value");
            if engine == Engine::Off && max_sharing.is_some() {
                settings
                    .set(Setting::KsmMaxPageSharing, "300")
                    .expect("the kernel takes it");
            }
        }
    }
    for thp in [Thp::Always, Thp::Madvise] {
        settings.apply_thp(thp).expect("the kernel takes it");
    }
    if Hierarchy::all().is_ok() {
        a_group_counts_what_its_processes_take(&mut settings);
        waits_on_the_mmap_lock_are_seen(&mut settings);
    }
    settings.restore().expect("put back");
    assert_eq!(settings.snapshot().expect("values"), before);
}

/// Maps and unmaps memory in several threads from the first line of its input to the input's end.
#[test]
#[ignore = "a child of another test"]
fn a_process_that_maps() {
    if std::env::var_os(MAPS).is_none() {
        return;
    }
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).expect("the start");
    let is_over = AtomicBool::new(false);
    let maps: u64 = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    let mut maps = 0;
                    while !is_over.load(Ordering::Relaxed) {
                        let mut map = MmapMut::map_anon(1 << 20).expect("memory");
                        map[0] = 1;
                        maps += 1;
                    }
                    maps
                })
            })
            .collect();
        std::io::stdin().read_line(&mut line).expect("the end");
        is_over.store(true, Ordering::Relaxed);
        threads
            .into_iter()
            .map(|thread| thread.join().expect("no panic"))
            .sum()
    });
    println!("\nmaps {maps}");
}

fn waits_on_the_mmap_lock_are_seen(settings: &mut HostSettings) {
    let group = Group::new(256 * MIB, settings).expect("a group");
    let mut child = group
        .command(std::env::current_exe().expect("this program"))
        .args(["--ignored", "--exact", "a_process_that_maps", "--nocapture"])
        .env(MAPS, "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("a child");
    let output = BufReader::new(child.stdout.take().expect("its output"));
    let mut lines = output.lines().map(|line| line.expect("text"));
    // Before that it may still be the shell.
    assert!(lines.any(|line| line.starts_with("running")));
    match MmapLockWatch::start(child.id(), &group) {
        Err(error) => eprintln!("not seen: {error}"),
        Ok(mut watch) => {
            let mut input = child.stdin.take().expect("its input");
            input.write_all(b"go\n").expect("it runs");
            wait_until("a thread has waited", PATIENCE, || {
                watch.total().expect("counters").waited_s > 0.0
            });
            drop(input);
            let maps = lines.find_map(|line| line.strip_prefix("maps ").map(str::to_owned));
            let maps: u64 = maps.expect("a count").parse().expect("a number");
            let seen = watch.total().expect("counters");
            // One to map, one to unmap.
            assert!(seen.write_locks >= 2 * maps, "{maps} maps, {seen:?}");
            eprintln!("{maps} maps, {seen:?}, {} lost", watch.lost());
        }
    }
    drop(child.stdin.take());
    child.wait().expect("its end");
}

#[test]
#[ignore = "a child of another test"]
fn a_process_that_takes_memory() {
    let Ok(bytes) = std::env::var(TAKEN) else {
        return;
    };
    let memory = vec![1_u8; bytes.parse().expect("a number")];
    // Several of the ticks that the kernel counts a process's time in.
    let cpu = || Duration::try_from(clock_gettime(ClockId::ProcessCPUTime)).expect("a time");
    while cpu() < LEAST_CPU_TIME {
        assert!(memory.iter().all(|&byte| byte == 1));
    }
    std::io::stdin()
        .read_line(&mut String::new())
        .expect("the end");
    assert!(memory.iter().all(|&byte| byte == 1));
}

fn a_group_counts_what_its_processes_take(settings: &mut HostSettings) {
    let group = Group::new(256 * MIB, settings).expect("a group");
    let directory = group.directory().to_owned();
    let mut child = group
        .command(std::env::current_exe().expect("this program"))
        .args(["--ignored", "--exact", "a_process_that_takes_memory"])
        .env(TAKEN, TAKEN_BYTES.to_string())
        .stdin(Stdio::piped())
        .spawn()
        .expect("a child");
    let usage = group.usage();
    wait_until("the child has taken its memory", PATIENCE, || {
        usage.memory().expect("counters").anon_bytes >= TAKEN_BYTES
    });
    let mut sampler = Sampler::new(child.id(), &group, Instant::now()).expect("a sampler");
    let mut sample = sampler.look(Detail::Full).expect("it runs");
    wait_until("the kernel tells of its CPU time", PATIENCE, || {
        sample = sampler.look(Detail::Full).expect("it runs");
        sample.cpu.server_s > 0.0
    });
    let memory = sample.memory;
    assert!(memory.usage_bytes >= memory.anon_bytes, "{sample:?}");
    assert!(memory.kernel_bytes > 0, "page tables: {sample:?}");
    let pss_bytes = sample.pss_bytes.expect("asked for");
    assert!(
        (TAKEN_BYTES..2 * TAKEN_BYTES).contains(&pss_bytes),
        "{sample:?}"
    );
    assert!(usage.peak_bytes().expect("counters") >= TAKEN_BYTES);
    assert_eq!(usage.oom_kills().expect("counters"), 0);
    assert!(
        sample.vmas > 10 && sample.context_switches > 0,
        "{sample:?}"
    );
    let quick = sampler.look(Detail::Quick).expect("it runs");
    assert_eq!(quick.pss_bytes, None);
    drop(child.stdin.take());
    child.wait().expect("its end");
    group.remove().expect("its processes have ended");
    assert!(!directory.exists());
}
