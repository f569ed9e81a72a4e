//! Our engine beside kernel KSM over the same memory: `cargo bench -p dedup --bench versus_ksm`.
//!
//! Needs root. Every KSM setting, `vm.max_map_count`, and what a virtual host does with free pages
//! are restored at the end.
#![expect(unsafe_code, reason = "plays the guest: writes to mapped memory")]

mod advised;
mod exits;
mod host;
mod measure;
mod peer;
mod random;
mod report;
mod workload;

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use dedup::PAGE_SIZE_BYTES;
use host::{Prepared, warm_up};
use measure::Figures;
use peer::{Ksm, Off, Peer, Samepage, alone};
use report::Report;
use workload::Workload;

const MIB_PAGES: usize = 256;

/// More than any workload and its pool take.
const WARM_UP_PAGES: usize = 4096 * MIB_PAGES;

/// What the command line asks for.
struct Options {
    json: Option<PathBuf>,
    rounds: usize,
    only: Option<String>,
    quick: bool,
    /// Leaves kernel KSM out: it takes most of the time.
    ours: bool,
}

fn options() -> Result<Options, String> {
    let mut options = Options {
        json: None,
        rounds: 3,
        only: None,
        quick: false,
        ours: false,
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = |name: &str| words.next().ok_or(format!("{name}: a value is missing"));
        match word.as_str() {
            "--bench" => {}
            "--json" => options.json = Some(PathBuf::from(value("--json")?)),
            "--rounds" => {
                let text = value("--rounds")?;
                options.rounds = text
                    .parse()
                    .map_err(|_| format!("--rounds: {text} is no count"))?;
            }
            "--only" => options.only = Some(value("--only")?),
            "--quick" => options.quick = true,
            "--ours" => options.ours = true,
            other => {
                return Err(format!(
                    "{other}: unknown (--json FILE, --rounds N, --only WORKLOAD, --quick, --ours)"
                ));
            }
        }
    }
    Ok(options)
}

/// One workload at one size.
struct Case {
    name: &'static str,
    measure: Measure,
    workload: Workload,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Measure {
    Merge,
    Calm,
    /// At the pace of an advisor, with this target.
    Advised {
        target_ms: u32,
    },
    Churn,
    Unmerge,
    Exit,
    /// The distribution over many exits; ours only.
    Exits,
}

fn case(name: &'static str, measure: Measure, workload: Workload) -> Case {
    Case {
        name,
        measure,
        workload,
    }
}

/// Memory to be merged, all regions of a case together 2 GiB at most.
fn merge_cases(scale: usize) -> Vec<Case> {
    let merge = |name, workload| case(name, Measure::Merge, workload);
    let few = |make: fn(usize, usize) -> Workload| make(2, 256 * MIB_PAGES / scale);
    let many = |make: fn(usize, usize) -> Workload| make(16, 128 * MIB_PAGES / scale);
    vec![
        merge("clones.2x256", few(Workload::clones)),
        merge("clones.16x128", many(Workload::clones)),
        merge("shuffled.2x256", few(Workload::shuffled)),
        merge("shuffled.16x128", many(Workload::shuffled)),
        merge("image.2x256", few(Workload::image)),
        merge("image.16x128", many(Workload::image)),
        merge("zeros.2x256", few(Workload::zeros)),
        merge("zeros.16x128", many(Workload::zeros)),
        merge("patchy.2x256", few(Workload::patchy)),
        merge("patchy.16x128", many(Workload::patchy)),
        merge("clones-huge.2x256", few(Workload::clones).huge()),
        merge("clones-huge.16x128", many(Workload::clones).huge()),
    ]
}

/// Memory that is merged already.
fn merged_cases(scale: usize) -> Vec<Case> {
    let clones = |regions, mib| Workload::clones(regions, mib * MIB_PAGES / scale);
    let advised = |name, target_ms| {
        let workload = clones(7, 64).with_a_stranger();
        case(name, Measure::Advised { target_ms }, workload)
    };
    vec![
        case("calm", Measure::Calm, clones(8, 64)),
        advised("advisor.2s", 2000),
        advised("advisor.quarter", 250),
        case("churn", Measure::Churn, clones(4, 64)),
        case("unmerge", Measure::Unmerge, clones(4, 64)),
        case("exit", Measure::Exit, clones(6, 128)),
        case("exits.2x64", Measure::Exits, clones(2, 64)),
        case("exits.16x128", Measure::Exits, clones(16, 128)),
    ]
}

fn run(case: &Case, peer: &mut dyn Peer, quick: bool) -> io::Result<Figures> {
    let window = Duration::from_secs(if quick { 2 } else { 8 });
    if let Measure::Advised { target_ms } = case.measure {
        return advised::advised(peer, &case.workload, target_ms, window);
    }
    let merged = measure::merge(peer, &case.workload.oracle())?;
    match case.measure {
        Measure::Merge | Measure::Advised { .. } => Ok(merged),
        Measure::Calm => measure::calm(peer, &case.workload, window),
        Measure::Churn => measure::churn(Some(peer), &peer.region_starts(), &case.workload, window),
        Measure::Unmerge => measure::unmerge(peer),
        Measure::Exit | Measure::Exits => Ok(measure::exit(peer, 4)),
    }
}

fn bench(options: &Options) -> io::Result<()> {
    let _alone = alone()?;
    let _prepared = Prepared::new()?;
    warm_up(WARM_UP_PAGES * PAGE_SIZE_BYTES / if options.quick { 4 } else { 1 })?;
    let mut report = Report::default();
    let scale = if options.quick { 4 } else { 1 };
    for case in merge_cases(scale).into_iter().chain(merged_cases(scale)) {
        if options
            .only
            .as_ref()
            .is_some_and(|only| !case.name.starts_with(only.as_str()))
        {
            continue;
        }
        for round in 0..options.rounds {
            eprintln!("{} round {}/{}", case.name, round + 1, options.rounds);
            if case.measure == Measure::Exits {
                let count = if options.quick { 100 } else { 1000 };
                report.add(case.name, "samepage", exits::exits(&case.workload, count)?);
                continue;
            }
            let ours = run(&case, &mut Samepage::new(&case.workload)?, options.quick)?;
            report.add(case.name, "samepage", ours);
            if !options.ours {
                let ksm = run(&case, &mut Ksm::new(&case.workload)?, options.quick)?;
                report.add(case.name, "ksm", ksm);
            }
            if case.measure == Measure::Churn {
                let off = Off::new(&case.workload)?;
                let window = Duration::from_secs(if options.quick { 2 } else { 8 });
                let figures = measure::churn(None, &off.region_starts(), &case.workload, window)?;
                report.add(case.name, "off", figures);
            }
        }
        report.print(case.name);
    }
    options
        .json
        .as_ref()
        .map_or(Ok(()), |path| report.write(path))
}

fn main() -> ExitCode {
    let outcome = options()
        .map_err(io::Error::other)
        .and_then(|options| measure::end_by_signals().and_then(|()| bench(&options)));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("versus_ksm: error: {error}");
            ExitCode::FAILURE
        }
    }
}
