//! Faults on demand: whatever fails, and in whatever order things are asked for, no guest reads a
//! wrong word, no VM hangs, and nothing is left behind.
//!
//! One test at a time (`--test-threads=1`): faults, threads and descriptors are the whole process's.

mod guest;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use dedup::{Pace, Run};
use fail::FailScenario;
use guest::{LONG, Lab, skip};
use vmm::{EndReason, ErrorKind, VmConfig, VmId, VmState};

/// Operations in all, by so many clients, on so many VMs.
const OPERATIONS: usize = 10_000;
const CLIENTS: usize = 4;
const VMS: u64 = 10;
/// Longest that no client may get an operation done: several times what an unmerge waits for memory.
/// All of it may take as long as the host needs.
const HANG: Duration = Duration::from_secs(300);
/// Faults that clients switch on and off. Not `fallocate`: pages that were not punched stay
/// allocated until they are filled anew, so a recount would find them.
const POINTS: [&str; 7] = [
    "mmap",
    "madvise",
    "register",
    "userfaultfd",
    "pool_write",
    "pagemap",
    "kvm_create_vm",
];

fn pageload(seed: u64, write: &str) -> VmConfig {
    let mut config = VmConfig::new(vmm::config::BUILTIN_PAGELOAD);
    let args = format!("pageload seed={seed} write={write} writes_per_pass=32 pace_ms=20");
    config.boot_source.boot_args = Some(args);
    config.machine_config.mem_size_mib = 8;
    config.samepage.oom_priority = i32::try_from(seed % 5).expect("small");
    config
}

/// Polls until `done`, at a pace that leaves the machine to the guests.
fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + LONG;
    while !done() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

fn passes(lab: &Lab, vm: &VmId) -> u64 {
    let info = lab.monitor.info(vm).expect("it is there");
    assert_eq!(info.state, VmState::Running, "{vm}");
    info.report.map_or(0, |report| {
        assert_eq!(report.verify_errors, 0, "{vm}");
        report.verify_passes
    })
}

#[test]
fn a_vcpu_thread_that_panics_takes_its_vm_down_and_nothing_else() {
    if skip() {
        return;
    }
    let scenario = FailScenario::setup();
    let lab = Lab::new();
    let [good, bad] = ["good", "bad"].map(|id| lab.start(id, pageload(1, "hot")));
    wait_until("both run", || {
        passes(&lab, &good) > 0 && passes(&lab, &bad) > 0
    });
    fail::cfg("v0:bad", "panic").expect("a fail point");
    match lab.end(&bad) {
        EndReason::Error(text) => assert!(text.contains("panicked"), "{text}"),
        other => panic!("{other:?}"),
    }
    let before = passes(&lab, &good);
    wait_until("the other one goes on", || passes(&lab, &good) > before + 1);
    // Its place can be taken, and the monitor merges on.
    lab.monitor.delete(&bad).expect("it has ended");
    let next = lab.start("next", pageload(2, "hot"));
    wait_until("a new one runs", || passes(&lab, &next) > 0);
    let deadline = Instant::now() + LONG;
    assert!(lab.monitor.engine().wait_full_scans(1, deadline));
    drop(lab);
    scenario.teardown();
}

#[test]
fn nobody_else_waits_for_a_pause_whose_vcpu_does_not_come_to_stand() {
    if skip() {
        return;
    }
    let scenario = FailScenario::setup();
    let lab = Arc::new(Lab::new());
    let slow = lab.start("slow", pageload(1, "hot"));
    wait_until("it runs", || passes(&lab, &slow) > 0);
    // As in a device that waits for storage.
    fail::cfg("v0:slow", "pause").expect("a fail point");
    let (done, superseded) = mpsc::channel();
    let (theirs, vm) = (lab.clone(), slow.clone());
    let asker = thread::spawn(move || {
        let (pausing_lab, pausing_vm) = (theirs.clone(), vm.clone());
        let pause = thread::spawn(move || pausing_lab.monitor.pause(&pausing_vm));
        while !pause.is_finished() {
            assert_eq!(theirs.monitor.list().len(), 1);
            theirs.monitor.resume(&vm).expect("it runs");
        }
        done.send(pause.join().expect("no panic"))
    });
    let paused = superseded.recv_timeout(LONG);
    fail::remove("v0:slow");
    let error = paused.expect("nobody waits").expect_err("its vCPU ran on");
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
    asker.join().expect("no panic").expect("somebody listens");
    let before = passes(&lab, &slow);
    wait_until("it goes on", || passes(&lab, &slow) > before);
    lab.monitor.pause(&slow).expect("now it stands still");
    let state = lab.monitor.info(&slow).expect("it is there").state;
    assert_eq!(state, VmState::Paused);
    drop(lab);
    scenario.teardown();
}

#[test]
fn a_stop_gives_a_start_up_and_does_not_wait_for_one_that_hangs() {
    if skip() {
        return;
    }
    let scenario = FailScenario::setup();
    let lab = Arc::new(Lab::new());
    let late: VmId = "late".parse().expect("an id");
    let created = lab.monitor.create(late.clone(), pageload(1, "hot"));
    created.expect("a good configuration");
    let (here, arrived) = mpsc::channel();
    let (go_on, told) = mpsc::channel::<()>();
    let told = Mutex::new(told);
    // As in a file whose storage does not answer.
    let hang = move || {
        here.send(()).expect("somebody listens");
        let told = told.lock().expect("nobody panicked");
        told.recv_timeout(LONG).expect("the test goes on");
    };
    fail::cfg_callback("kvm_create_vm", hang).expect("a fail point");
    let (theirs, vm) = (lab.clone(), late.clone());
    let start = thread::spawn(move || theirs.monitor.start(&vm));
    arrived.recv_timeout(LONG).expect("it is being started");
    let error = lab.monitor.stop(&late).expect_err("it hangs");
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
    fail::remove("kvm_create_vm");
    go_on.send(()).expect("it waits");
    let error = start.join().expect("no panic").expect_err("it was stopped");
    assert!(error.to_string().contains("was stopped"), "{error}");
    let state = lab.monitor.info(&late).expect("it is there").state;
    assert_eq!(state, VmState::NotStarted);
    lab.monitor.start(&late).expect("nobody stops it now");
    wait_until("it runs", || passes(&lab, &late) > 0);
    drop(lab);
    scenario.teardown();
}

#[test]
fn every_system_call_of_a_merge_may_fail_and_merging_goes_on_when_they_succeed_again() {
    if skip() {
        return;
    }
    let scenario = FailScenario::setup();
    let lab = Lab::new();
    let eager = Pace {
        pages_to_scan: 4096,
        sleep_millisecs: 1,
        ..Pace::default()
    };
    lab.monitor.engine().set_pace(eager);
    // What guests write to all the time is not merged: their shared pages have to rest.
    let vms = [1, 2].map(|seed| lab.start(&format!("vm{seed}"), pageload(seed, "hot")));
    wait_until("both run", || vms.iter().all(|vm| passes(&lab, vm) > 0));
    let engine = lab.monitor.engine();
    let within = |time| Instant::now() + time;
    for point in [
        "mmap",
        "madvise",
        "userfaultfd",
        "pool_write",
        "fallocate",
        "pagemap",
    ] {
        engine.set_run(Run::Unmerge).expect("nothing fails yet");
        fail::cfg(point, "return").expect("a fail point");
        engine.set_run(Run::Merge).expect("guests do not mind");
        assert!(engine.wait_full_scans(3, within(LONG)), "{point}");
        let before = vms.each_ref().map(|vm| passes(&lab, vm));
        wait_until("no guest is stopped by it", || {
            vms.iter()
                .zip(before)
                .all(|(vm, before)| passes(&lab, vm) > before)
        });
        if point == "madvise" {
            engine.set_run(Run::Unmerge).expect_err("no copies");
            assert_eq!(engine.run(), Run::Stop);
            engine.set_run(Run::Merge).expect("merging goes on");
        }
        fail::remove(point);
        wait_until("pages are merged again", || {
            engine.stats().pages_sharing > 200
        });
    }
    drop(lab);
    scenario.teardown();
}

/// Numbers that tell nothing and can be had again (xorshift64).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}

/// One random operation; true if it was done. Being refused is fine; an error of the monitor's own
/// that nobody injected is not.
fn operate(lab: &Lab, dice: &mut Dice) -> bool {
    let monitor = &lab.monitor;
    let id: VmId = format!("vm{}", dice.roll(VMS)).parse().expect("an id");
    let write = ["none", "hot", "merged"][usize::try_from(dice.roll(3)).expect("small")];
    let done = match dice.roll(100) {
        0..20 => monitor.create(id, pageload(dice.roll(1000), write)),
        20..40 => monitor.start(&id),
        40..50 => monitor.pause(&id),
        50..60 => monitor.resume(&id),
        60..68 => monitor.stop(&id),
        68..80 => monitor.delete(&id),
        80..84 => {
            let run = match dice.roll(8) {
                0 => Run::Stop,
                1 => Run::Unmerge,
                _ => Run::Merge,
            };
            // Fails for the injected faults, or by somebody else's order.
            drop(monitor.engine().set_run(run));
            Ok(())
        }
        84..86 => {
            let mib = [None, None, Some(20), Some(30)];
            let mib = mib[usize::try_from(dice.roll(4)).expect("small")];
            monitor.set_memory_budget(mib.map(|mib| mib << 20));
            monitor.set_unmerge_victims(dice.roll(4) == 0);
            Ok(())
        }
        86..90 => {
            let point = POINTS[usize::try_from(dice.roll(7)).expect("small")];
            let fault = ["off", "2%return", "20%return"];
            let fault = fault[usize::try_from(dice.roll(3)).expect("small")];
            fail::cfg(point, fault).expect("a fail point");
            Ok(())
        }
        90..94 => {
            // Gives guests and worker the time to do something.
            let soon = Instant::now() + Duration::from_millis(50);
            if monitor.engine().wait_full_scans(2, soon) {
                monitor.wait_ended(&id, soon);
            }
            Ok(())
        }
        _ => {
            assert!(monitor.memory().use_bytes > 0);
            monitor.info(&id).map(|info| {
                let errors = info.report.map_or(0, |report| report.verify_errors);
                assert_eq!(errors, 0, "{id}: {info:?}");
                if let VmState::Ended(reason) = info.state {
                    let expected = [EndReason::Stopped, EndReason::OomVictim];
                    assert!(expected.contains(&reason), "{id}: {reason}");
                }
            })
        }
    };
    if let Err(error) = &done {
        let is_injected = error.to_string().contains("os error 12")
            || error.to_string().contains("Cannot allocate memory");
        assert!(
            error.kind() != ErrorKind::Internal || is_injected,
            "{error}"
        );
    }
    done.is_ok()
}

/// All operations. Returns how many were done, and the most pages that were ever shared.
fn run_clients(lab: &Arc<Lab>, seed: u64) -> (usize, u64) {
    let left = Arc::new(AtomicUsize::new(OPERATIONS));
    let (tell_ended, ended) = mpsc::channel();
    // Not a scope, which would wait for a client that hangs.
    let clients = [(); CLIENTS].map(|()| (Arc::clone(lab), Arc::clone(&left), tell_ended.clone()));
    drop(tell_ended);
    let clients = (1..).zip(clients).map(|(client, (lab, left, ended))| {
        thread::spawn(move || {
            let mut dice = Dice(seed * 8 + client);
            let take = |left: usize| left.checked_sub(1);
            while left
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take)
                .is_ok()
            {
                let is_done = operate(&lab, &mut dice);
                let sharing = lab.monitor.engine().stats().pages_sharing;
                // Nobody listens when the test has failed.
                if ended.send((is_done, sharing)).is_err() {
                    return;
                }
            }
        })
    });
    let clients: Vec<thread::JoinHandle<()>> = clients.collect();
    let (mut done, mut most_sharing) = (0, 0);
    loop {
        match ended.recv_timeout(HANG) {
            Ok((is_done, sharing)) => {
                done += usize::from(is_done);
                most_sharing = most_sharing.max(sharing);
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
            Err(mpsc::RecvTimeoutError::Timeout) => panic!("an operation hangs"),
        }
    }
    for client in clients {
        client.join().expect("no client panicked");
    }
    (done, most_sharing)
}

fn entries(directory: &str) -> usize {
    std::fs::read_dir(directory).expect(directory).count()
}

fn held() -> (usize, usize) {
    (entries("/proc/self/task"), entries("/proc/self/fd"))
}

/// With all guests at a stand, the engine's counters must be those of a recount.
fn recount(lab: &Lab) {
    let (monitor, engine) = (&lab.monitor, lab.monitor.engine());
    monitor.set_memory_budget(None);
    engine
        .set_run(Run::Merge)
        .expect("nothing stands against merging");
    // One at least is left to count, and can be started after all that.
    lab.start("last", pageload(7, "hot"));
    let mut alive = Vec::new();
    for vm in monitor.list() {
        let errors = vm.report.map_or(0, |report| report.verify_errors);
        assert_eq!(errors, 0, "{vm:?}");
        if monitor.pause(&vm.id).is_ok() {
            alive.push(vm.id);
        } else if vm.state.is_alive() {
            // The guard was just about to end it.
            lab.end(&vm.id);
        }
    }
    // What was written last is noticed, and what was handed over is finished.
    let is_scanned = engine.wait_full_scans(8, Instant::now() + LONG);
    assert!(is_scanned, "{} VMs: {:?}", alive.len(), engine.stats());
    engine.set_run(Run::Stop).expect("stopping needs nothing");
    // The batch in hand is finished first.
    wait_until("the engine's counters are those of a recount", || {
        let stats = engine.stats();
        let merging = |vm| monitor.merge_stats(vm).expect("it is there").pages_merging;
        let merging: u64 = alive.iter().map(merging).sum();
        let pool_bytes = engine.process_memory().pool_bytes().expect("its size");
        let counted = (
            stats.pages_shared + stats.pages_sharing,
            stats.slots,
            stats.pool_bytes,
        );
        counted == (merging, alive.len() as u64, pool_bytes)
    });
    engine.set_run(Run::Merge).expect("merging goes on");
}

#[test]
fn ten_thousand_random_operations_with_faults_hang_nobody_and_leave_nothing() {
    if skip() {
        return;
    }
    let scenario = FailScenario::setup();
    let before = held();
    let lab = Lab::new();
    let eager = Pace {
        pages_to_scan: 4096,
        sleep_millisecs: 1,
        ..Pace::default()
    };
    lab.monitor.engine().set_pace(eager);
    let seed = std::env::var("SAMEPAGE_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()));
    println!("SAMEPAGE_SEED={seed}");
    let begun = Instant::now();
    let lab = Arc::new(lab);
    let (done, most_sharing) = run_clients(&lab, seed);
    let lab = Arc::into_inner(lab).expect("the clients are gone");
    POINTS.into_iter().for_each(fail::remove);
    println!(
        "{OPERATIONS} operations in {:?}: {done} done, {} VMs ended by the guard, \
         at most {most_sharing} pages sharing",
        begun.elapsed(),
        lab.monitor.memory().oom_victims,
    );
    recount(&lab);
    for vm in lab.monitor.list() {
        if vm.state.is_alive() {
            lab.monitor.stop(&vm.id).expect("it stops");
        }
        lab.monitor.delete(&vm.id).expect("it goes");
    }
    let engine = lab.monitor.engine();
    wait_until("the worker finished every slot", || {
        engine.stats().slots == 0
    });
    wait_until("nothing is left in the pool", || {
        let stats = engine.stats();
        let pool_bytes = engine.process_memory().pool_bytes().expect("its size");
        (stats.pages_shared, stats.vmas, pool_bytes) == (0, 0, 0)
    });
    drop(lab);
    wait_until("threads and descriptors are as before", || held() == before);
    scenario.teardown();
}
