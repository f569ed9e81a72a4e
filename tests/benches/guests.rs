//! What merging costs running guests: `cargo bench -p samepage-tests --bench guests`.
//!
//! Real VMs in a real monitor run pageload guests that verify and rewrite their memory as fast as
//! they can, with merging and the dirty log on, and with neither. Guests share the cores with the
//! worker, so all that merging takes shows in what they get done.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use pageload_workload::Workload;
use samepage_tests::guests::{healthy_report, launch, pageload, wait_verified};
use serde_json::{Map, Value, json};
use vmm::config::MergeMode;
use vmm::{Monitor, VmId};

/// What the command line asks for.
struct Options {
    json: Option<PathBuf>,
    rounds: usize,
    window: Duration,
    only: Option<String>,
}

fn options() -> Result<Options, String> {
    let mut options = Options {
        json: None,
        rounds: 3,
        window: Duration::from_secs(10),
        only: None,
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = |name: &str| words.next().ok_or(format!("{name}: a value is missing"));
        let number = |name: &str, text: String| -> Result<u64, String> {
            text.parse()
                .map_err(|_| format!("{name}: {text} is no count"))
        };
        match word.as_str() {
            "--bench" => {}
            "--json" => options.json = Some(PathBuf::from(value("--json")?)),
            "--rounds" => {
                let rounds = number("--rounds", value("--rounds")?)?;
                options.rounds = usize::try_from(rounds).unwrap_or(1).max(1);
            }
            "--seconds" => {
                options.window = Duration::from_secs(number("--seconds", value("--seconds")?)?);
            }
            "--only" => options.only = Some(value("--only")?),
            other => {
                return Err(format!(
                    "{other}: unknown (--json FILE, --rounds N, --seconds N, --only CASE)"
                ));
            }
        }
    }
    Ok(options)
}

/// Guests that all do the same.
struct Case {
    name: &'static str,
    guests: u64,
    mem_size_mib: u64,
    writes_per_pass: u64,
}

/// One guest for each core of a small host, at rest and writing; then many that write.
const CASES: [Case; 3] = [
    Case {
        name: "calm.2x64",
        guests: 2,
        mem_size_mib: 64,
        writes_per_pass: 0,
    },
    Case {
        name: "writes.2x64",
        guests: 2,
        mem_size_mib: 64,
        writes_per_pass: 256,
    },
    Case {
        name: "writes.8x64",
        guests: 8,
        mem_size_mib: 64,
        writes_per_pass: 256,
    },
];

impl Case {
    fn workload(&self, seed: u64) -> Workload {
        if self.writes_per_pass == 0 {
            return Workload {
                pace_ms: 0,
                ..Workload::quiet(seed)
            };
        }
        Workload {
            writes_per_pass: self.writes_per_pass,
            ..Workload::writer(seed)
        }
    }
}

type Figures = BTreeMap<&'static str, f64>;

#[expect(clippy::cast_precision_loss, reason = "figures of a report")]
fn float(count: u64) -> f64 {
    count as f64
}

/// Lets time pass: what the guests get done in it is what is measured.
fn wait_for(time: Duration) {
    std::thread::sleep(time);
}

/// Pages verified and pages written by all guests so far.
fn done(monitor: &Monitor, ids: &[VmId]) -> (u64, u64) {
    let reports = ids.iter().filter_map(|id| healthy_report(monitor, id));
    reports.fold((0, 0), |(verified, written), report| {
        (
            verified + report.verified_pages,
            written + report.pages_written,
        )
    })
}

/// CPU time so far of all threads with such a name, in seconds.
fn cpu_s(is_meant: impl Fn(&str) -> bool) -> io::Result<f64> {
    let mut cpu_ns = 0;
    for task in fs::read_dir("/proc/self/task")? {
        let task = task?.path();
        if is_meant(fs::read_to_string(task.join("comm"))?.trim()) {
            let text = fs::read_to_string(task.join("schedstat"))?;
            let first = text.split_whitespace().next().map(str::parse::<u64>);
            cpu_ns += first.and_then(Result::ok).unwrap_or(0);
        }
    }
    Ok(float(cpu_ns) / 1e9)
}

fn worker_and_vcpus_cpu_s() -> io::Result<(f64, f64)> {
    Ok((
        cpu_s(|name| name == "dedup")?,
        cpu_s(|name| name.contains(":vm"))?,
    ))
}

/// Runs the guests for a while, and says what they got done in a second.
fn measure(case: &Case, merge: MergeMode, window: Duration) -> io::Result<Figures> {
    let domain = "bench".parse().map_err(io::Error::other)?;
    let monitor = Monitor::new(domain, dedup::Settings::default()).map_err(io::Error::other)?;
    let ids: Vec<VmId> = (0..case.guests)
        .map(|number| {
            let mut config = pageload(&case.workload(number + 1), case.mem_size_mib);
            config.samepage.merge = merge;
            launch(&monitor, &format!("vm{number}"), config)
        })
        .collect();
    wait_verified(&monitor, &ids, 2);
    // What can be merged at once is merged by then.
    wait_for(Duration::from_secs(3));
    let (before, cpu_before) = (done(&monitor, &ids), worker_and_vcpus_cpu_s()?);
    let begun = Instant::now();
    let mut sharing_pages = Vec::new();
    while begun.elapsed() < window {
        wait_for(Duration::from_millis(100));
        let stats = monitor.engine().stats();
        sharing_pages.push(stats.pages_sharing + stats.pages_zero);
    }
    let (after, cpu_after) = (done(&monitor, &ids), worker_and_vcpus_cpu_s()?);
    let seconds = begun.elapsed().as_secs_f64();
    let looks = float(sharing_pages.len().max(1) as u64);
    Ok(Figures::from([
        ("verified_pages_per_s", float(after.0 - before.0) / seconds),
        ("written_pages_per_s", float(after.1 - before.1) / seconds),
        (
            "given_back_pages",
            float(sharing_pages.iter().sum()) / looks,
        ),
        (
            "worker_cpu_percent",
            (cpu_after.0 - cpu_before.0) * 100.0 / seconds,
        ),
        // What other processes take of the cores does not show in this one.
        (
            "verified_pages_per_vcpu_s",
            float(after.0 - before.0) / (cpu_after.1 - cpu_before.1),
        ),
        ("full_scans", float(monitor.engine().stats().full_scans)),
    ]))
}

fn median(rounds: &[Figures], key: &str) -> f64 {
    let mut all: Vec<f64> = rounds.iter().map(|figures| figures[key]).collect();
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}

/// Prints a case's medians, and gives them as JSON.
fn report(case: &Case, on: &[Figures], off: &[Figures]) -> Value {
    let mut entry = json!({ "on": {}, "off": {}, "ratio": {} });
    for &key in on.first().map(BTreeMap::keys).into_iter().flatten() {
        let (on, off) = (median(on, key), median(off, key));
        let ratio = (off > 0.0).then_some(on / off);
        let shown = ratio.map_or("-".to_owned(), |ratio| format!("{ratio:.4}"));
        println!(
            "{:12} {key:22} on {on:>14.1}  off {off:>14.1}  ratio {shown:>8}",
            case.name
        );
        entry["on"][key] = on.into();
        entry["off"][key] = off.into();
        entry["ratio"][key] = ratio.map_or(Value::Null, Value::from);
    }
    entry
}

fn bench(options: &Options) -> io::Result<()> {
    let mut cases = Map::new();
    for case in &CASES {
        let only = options.only.as_deref().unwrap_or_default();
        if !case.name.starts_with(only) {
            continue;
        }
        let (mut on, mut off) = (Vec::new(), Vec::new());
        for round in 0..options.rounds {
            eprintln!("{} round {}/{}", case.name, round + 1, options.rounds);
            on.push(measure(case, MergeMode::On, options.window)?);
            off.push(measure(case, MergeMode::Off, options.window)?);
        }
        cases.insert(case.name.to_owned(), report(case, &on, &off));
    }
    let Some(path) = &options.json else {
        return Ok(());
    };
    let text = serde_json::to_string_pretty(&json!({ "guests": cases }))?;
    fs::write(path, text + "\n")
}

fn main() -> ExitCode {
    let outcome = options()
        .map_err(io::Error::other)
        .and_then(|options| bench(&options));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("guests: error: {error}");
            ExitCode::FAILURE
        }
    }
}
