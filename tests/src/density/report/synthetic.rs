//! A made-up report for tests: every workload and engine, and figures of a plausible size. None of
//! it was measured, so none of it may leave the tests.

use crate::density::model::{
    Arm, Cpu, Engine, Fleet, Guest, Host, Latency, Mark, Memory, MmapLock, Oracle, Quantiles,
    Report, Run, Sample, Thp, Workload,
};

const MIB: f64 = 1_048_576.0;
pub(super) const ENGINES: [Engine; 5] = [
    Engine::Off,
    Engine::KsmDefaults,
    Engine::KsmFast,
    Engine::KsmAdvisor,
    Engine::Samepage,
];
/// Seconds from one launch to the next one.
const LAUNCH_EVERY_S: f64 = 3.0;
/// Seconds that a guest takes to boot.
const BOOT_S: f64 = 5.0;
const REST_S: f64 = 30.0;

/// How an engine does in the made-up world.
struct Manner {
    /// Memory of a guest that nobody merges, and what is left of it once it is merged, in MiB.
    own_mib: f64,
    left_mib: f64,
    /// How long merging lags behind, in seconds.
    lag_s: f64,
    /// Cores that merging takes while guests come.
    cores: f64,
    vmas_each: u64,
    launch_s: f64,
}

fn manner(engine: Engine) -> Manner {
    let (left_mib, lag_s, cores, vmas_each, launch_s) = match engine {
        Engine::Off => (17.0, 1.0, 0.0, 1, 0.08),
        Engine::KsmDefaults => (6.0, 90.0, 0.03, 1, 0.08),
        Engine::KsmFast => (2.0, 12.0, 0.12, 1, 0.08),
        Engine::KsmAdvisor => (2.5, 25.0, 0.07, 1, 0.08),
        Engine::Samepage => (4.5, 4.0, 0.025, 1140, 0.57),
    };
    Manner {
        own_mib: 17.0,
        left_mib,
        lag_s,
        cores,
        vmas_each,
        launch_s,
    }
}

/// A report of all workloads, with huge pages `always` for the first one too.
pub(super) fn report() -> Report {
    let mut runs = Vec::new();
    for workload in Workload::ALL {
        runs.extend(ENGINES.map(|engine| run(arm(workload, engine, Thp::Madvise))));
        if workload == Workload::Idle {
            runs.extend(ENGINES.map(|engine| run(arm(workload, engine, Thp::Always))));
        }
    }
    Report {
        command: "density --preset full".to_owned(),
        commit: "0123456789ab".to_owned(),
        date: "2001-02-03T04:05:06Z".to_owned(),
        host: Host {
            kernel: "6.99".to_owned(),
            cpu: "Imagined CPU".to_owned(),
            cpus: 2,
            memory_bytes: 24 << 30,
            memory_read_bytes_per_s: 1.2e10,
            first_touch_us: 2.2,
        },
        runs,
    }
}

pub(super) fn arm(workload: Workload, engine: Engine, thp: Thp) -> Arm {
    let (fleet, memory_limit_bytes) = match workload {
        Workload::Storm => (Fleet::UntilFull(60), 512 << 20),
        Workload::Agents => (Fleet::Vms(10), 8 << 30),
        _ => (Fleet::Vms(40), 8 << 30),
    };
    Arm {
        workload,
        engine,
        thp,
        fleet,
        memory_limit_bytes,
    }
}

/// A made-up run of `arm`.
pub(super) fn run(arm: Arm) -> Run {
    let manner = manner(arm.engine);
    let guests = guests(&arm, &manner);
    let ready = guests.iter().filter_map(|guest| guest.ready_at_s);
    let last_ready_s = ready.fold(0.0, f64::max);
    let rest_s = last_ready_s + manner.lag_s;
    let end_s = rest_s + REST_S;
    let mut samples = Vec::new();
    let mut at_s = 0.0;
    while at_s <= end_s {
        samples.push(sample(&arm, &manner, &guests, at_s));
        at_s += 1.0;
    }
    let usages = samples.iter().map(|sample| sample.memory.usage_bytes);
    let peak_bytes = usages.max().unwrap_or(0);
    let (latency, oracle) = (latency(&arm), oracle(&arm));
    Run {
        settings: settings(&arm),
        marks: marks(&arm, [last_ready_s, rest_s, end_s]),
        oom_kills: u64::from(arm.workload == Workload::Storm && arm.engine == Engine::KsmFast),
        mmap_lock: (arm.engine == Engine::Samepage).then_some(MmapLock {
            write_locks: 91_000,
            waited_s: 0.73,
        }),
        errors: Vec::new(),
        arm,
        guests,
        samples,
        peak_bytes,
        latency,
        oracle,
    }
}

fn guests(arm: &Arm, manner: &Manner) -> Vec<Guest> {
    let most = match arm.fleet {
        Fleet::Vms(vms) => vms,
        Fleet::UntilFull(most) => most,
    };
    let limit_mib = arm.memory_limit_bytes as f64 / MIB;
    let mut guests = Vec::new();
    for index in 0..most {
        let asked_at_s = index as f64 * LAUNCH_EVERY_S;
        let is_refused = (index + 1) as f64 * manner.left_mib > limit_mib;
        let ready_at_s = asked_at_s + manner.launch_s + BOOT_S;
        let ended = match arm.workload {
            Workload::Burst => Some((ready_at_s + 30.0, "lived its time".to_owned())),
            Workload::Storm if index % 5 == 4 => Some((ready_at_s + 90.0, "oom_victim".to_owned())),
            _ => None,
        };
        guests.push(Guest {
            id: format!("vm{index}"),
            asked_at_s,
            launch_s: (!is_refused).then_some(manner.launch_s),
            refusal: is_refused.then(|| "no memory is left".to_owned()),
            ready_at_s: (!is_refused).then_some(ready_at_s),
            ended: ended.filter(|_| !is_refused),
            rounds: if arm.workload == Workload::Agents {
                30
            } else {
                0
            },
        });
        if is_refused {
            break;
        }
    }
    guests
}

fn marks(arm: &Arm, [last_ready_s, rest_s, end_s]: [f64; 3]) -> Vec<Mark> {
    let mark = |name: &str, at_s: f64| Mark {
        name: name.to_owned(),
        at_s,
    };
    let mut marks = vec![mark("last guest ready", last_ready_s)];
    // A burst never rests.
    if arm.workload != Workload::Burst {
        marks.push(mark("at rest", rest_s));
    }
    if arm.workload == Workload::Phase {
        marks.push(mark("diverged", rest_s + 15.0));
    }
    marks.push(mark("end", end_s));
    marks
}

fn bytes(mib: f64) -> u64 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "sizes of this file are small and positive"
    )]
    let bytes = (mib * MIB) as u64;
    bytes
}

fn sample(arm: &Arm, manner: &Manner, guests: &[Guest], at_s: f64) -> Sample {
    let lives = |guest: &&Guest| match &guest.ended {
        Some((ended_s, _)) => *ended_s > at_s,
        None => true,
    };
    let is_ready = |guest: &&Guest| guest.ready_at_s.is_some_and(|ready_s| ready_s <= at_s);
    let running = |guest: &&Guest| guest.launch_s.is_some() && guest.asked_at_s <= at_s;
    let ready: Vec<&Guest> = guests.iter().filter(is_ready).filter(lives).collect();
    let running = guests.iter().filter(running).filter(lives).count();
    let merged = |guest: &&&Guest| {
        let ready_s = guest.ready_at_s.unwrap_or(f64::INFINITY);
        ready_s + manner.lag_s <= at_s
    };
    let merged = ready.iter().filter(merged).count();
    let given_back_mib = merged as f64 * (manner.own_mib - manner.left_mib);
    let all_mib = running as f64 * manner.own_mib - given_back_mib;
    let wobble_mib = 2.0 * (at_s / 3.0).sin().abs();
    let is_ours = arm.engine == Engine::Samepage;
    let pool_mib = if is_ours { 0.2 * all_mib } else { 0.0 };
    let kernel_mib = 0.1 * all_mib + if is_ours { 0.5 * merged as f64 } else { 0.0 };
    let anon_mib = (all_mib * 0.9 - pool_mib).max(0.0);
    let usage_mib = anon_mib + pool_mib + kernel_mib + 6.0 + wobble_mib;
    let merge_s = at_s * manner.cores;
    Sample {
        at_s,
        memory: Memory {
            usage_bytes: bytes(usage_mib),
            anon_bytes: bytes(anon_mib),
            shmem_bytes: bytes(pool_mib),
            file_bytes: bytes(6.0),
            kernel_bytes: bytes(kernel_mib),
        },
        mem_available_bytes: (20 << 30) - bytes(usage_mib),
        pss_bytes: ((at_s / 10.0).fract() < 0.05).then(|| bytes(anon_mib + pool_mib + 4.0)),
        cpu: Cpu {
            worker_s: if is_ours { merge_s } else { 0.0 },
            // The kernel's thread is older than the run.
            ksmd_s: 100.0 + if arm.engine.is_ksm() { merge_s } else { 0.0 },
            vcpus_s: at_s * 1.5,
            server_s: at_s * 1.6,
        },
        context_switches: bytes(at_s * 1e-3),
        vmas: 40 + manner.vmas_each * u64::try_from(merged).expect("guests"),
        guests_running: running,
        guests_ready: ready.len(),
        rounds: match arm.workload {
            Workload::Agents | Workload::TwoImages => {
                bytes((at_s - manner.cores * at_s) / MIB * 4.0)
            }
            _ => 0,
        },
        given_back_pages: bytes(given_back_mib) / 4096,
        shared_pages: bytes(given_back_mib) / 4096 / 12,
    }
}

fn settings(arm: &Arm) -> Vec<(String, String)> {
    let run = if arm.engine.is_ksm() { "1" } else { "0" };
    let pages = match arm.engine {
        Engine::KsmFast => "5000",
        _ => "100",
    };
    [
        ("/sys/kernel/mm/ksm/run", run.to_owned()),
        ("/sys/kernel/mm/ksm/pages_to_scan", pages.to_owned()),
        (
            "/sys/kernel/mm/transparent_hugepage/enabled",
            arm.thp.to_string(),
        ),
    ]
    .map(|(path, value)| (path.to_owned(), value))
    .to_vec()
}

fn latency(arm: &Arm) -> Option<Latency> {
    let slow = match arm.engine {
        Engine::Off => 1.0,
        Engine::Samepage => 40.0,
        _ => 3.0,
    };
    let quantiles = |slow: f64| Quantiles {
        count: 100_000,
        p50_us: 0.08 * slow.sqrt(),
        p99_us: 6.0 * slow,
        p999_us: 40.0 * slow,
        max_us: 4_000.0 + 400.0 * slow,
    };
    (arm.workload == Workload::Latency).then(|| Latency {
        shared: quantiles(slow),
        private: quantiles(1.0),
        exit: quantiles(2.0),
        busy_vcpus: 40,
    })
}

fn oracle(arm: &Arm) -> Option<Oracle> {
    let guests = 40;
    (arm.workload != Workload::Burst).then_some(Oracle {
        guests,
        touched_pages: guests * 4352,
        zero_pages: guests * 300,
        unique_contents: 5000 + guests * 100,
        same_place_pages: guests * 2100,
        saved_by_place_pages: guests * 2050,
        elsewhere_pages: guests * 1700,
        elsewhere_runs: guests * 900,
    })
}
