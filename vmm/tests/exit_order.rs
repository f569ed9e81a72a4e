//! The scenario of the 2009 patch "ksm: fix oom deadlock", with real VMs: an unmerge starves for
//! memory inside a VM, and the end of that very VM is all that could feed it.
//!
//! Built with the feature `lock-before-free`, in which an exit takes the region lock before it gives
//! its memory back, the same test must find the deadlock.

mod guest;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use dedup::Run;
use fail::FailScenario;
use guest::{Lab, skip};
use vmm::{EndReason, VmConfig, VmId};

/// How long a loaded host may take for anything here; only a deadlock is longer.
const DEADLINE: Duration = Duration::from_secs(120);
/// How long an allocation waits for memory. Where there must be a deadlock, nobody need wait so long
/// for it.
const STARVING: Duration = if cfg!(feature = "lock-before-free") {
    Duration::from_secs(10)
} else {
    DEADLINE
};

/// Resident pages whose return feeds whoever starves: half of what each VM holds for itself.
const FED_PAGES: u64 = 1000;

/// Memory that there is none of until a VM's worth comes back.
#[derive(Debug, Default)]
struct Starving {
    is_asked: AtomicBool,
    is_deadlocked: AtomicBool,
}

impl Starving {
    /// Waits for memory as an allocation waits in the kernel: without a look at any flag. Only who
    /// asks first; by then there is memory, or the test has failed.
    fn wait_for_memory(&self, before_pages: u64) {
        if self.is_asked.swap(true, Ordering::SeqCst) {
            return;
        }
        if !wait_for(STARVING, || resident_pages() + FED_PAGES < before_pages) {
            // The test goes on, to fail instead of hanging.
            self.is_deadlocked.store(true, Ordering::SeqCst);
        }
    }
}

/// Pages of this process in memory, by `/proc/self/statm`.
fn resident_pages() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("statm is there");
    let resident = statm.split(' ').nth(1).expect("its second number");
    resident.parse().expect("a number")
}

fn poll_until(condition: impl FnMut() -> bool) -> bool {
    wait_for(DEADLINE, condition)
}

fn wait_for(time: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + time;
    while !condition() {
        if Instant::now() > deadline {
            return false;
        }
        thread::sleep(Duration::from_millis(1));
    }
    true
}

fn pageload(seed: u64) -> VmConfig {
    let mut config = VmConfig::new(vmm::config::BUILTIN_PAGELOAD);
    let args = format!("pageload seed={seed} shared=40 zero=10 private=50 passes=0 pace_ms=5");
    config.boot_source.boot_args = Some(args);
    config.machine_config.mem_size_mib = 16;
    config
}

#[test]
#[cfg_attr(feature = "lock-before-free", should_panic(expected = "deadlock"))]
fn an_unmerge_that_starves_inside_a_vm_is_fed_by_the_end_of_that_vm() {
    if skip() {
        #[cfg(feature = "lock-before-free")]
        panic!("no VM, no deadlock");
        #[cfg(not(feature = "lock-before-free"))]
        return;
    }
    let _scenario = FailScenario::setup();
    let lab = Lab::new();
    let engine = lab.monitor.engine();
    // Nothing moves until both are there, so that the unmerge comes to the first one first.
    engine.set_run(Run::Stop).expect("stopping needs no memory");
    let [victim, other] =
        [("victim", 1), ("other", 2)].map(|(name, seed)| lab.start(name, pageload(seed)));
    let report = |vm: &VmId| {
        lab.monitor
            .info(vm)
            .expect("info")
            .report
            .unwrap_or_default()
    };
    let have_verified = || {
        [&victim, &other]
            .iter()
            .all(|vm| report(vm).verify_passes > 0)
    };
    assert!(
        poll_until(have_verified),
        "both guests have filled their memory"
    );
    engine.set_run(Run::Merge).expect("merging needs no memory");
    assert!(
        poll_until(|| engine.stats().pages_sharing > 1000),
        "{:?}",
        engine.stats()
    );
    engine.set_run(Run::Stop).expect("stopping needs no memory");

    let memory = Arc::new(Starving::default());
    let before_pages = resident_pages();
    let starving = Arc::clone(&memory);
    // What an unmerge gets its copies by; stopped as it is, nobody else calls it.
    fail::cfg_callback("madvise", move || starving.wait_for_memory(before_pages)).expect("a point");
    thread::scope(|scope| {
        let unmerge = scope.spawn(|| engine.set_run(Run::Unmerge));
        let is_asked = || memory.is_asked.load(Ordering::SeqCst);
        assert!(poll_until(is_asked), "the unmerge asks for memory");
        lab.monitor.stop(&victim).expect("it runs");
        assert_eq!(lab.end(&victim), EndReason::Stopped);
        let unmerged = unmerge.join().expect("the unmerge ends");
        assert!(
            !memory.is_deadlocked.load(Ordering::SeqCst),
            "deadlock: the exit waits for the unmerge, which waits for its memory"
        );
        unmerged.expect("the other VM got its copies");
    });
    assert_eq!(engine.stats().pages_sharing, 0);
    let passes = report(&other).verify_passes;
    assert!(
        poll_until(|| report(&other).verify_passes > passes + 1),
        "the other VM goes on"
    );
    assert_eq!(report(&other).verify_errors, 0);
    lab.monitor.stop(&other).expect("it runs");
    assert_eq!(lab.end(&other), EndReason::Stopped);
    assert!(poll_until(|| engine.stats().slots == 0), "slots are left");
}
