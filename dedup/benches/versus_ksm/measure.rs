//! What is measured, the same way for both engines.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};
use std::thread;
use std::time::{Duration, Instant};

use dedup::PAGE_SIZE_BYTES;

use crate::peer::{Peer, write_word};
use crate::random::Random;
use crate::workload::{Oracle, Workload};

/// Figures of one engine in one round, by their key in the report.
pub(crate) type Figures = BTreeMap<String, f64>;

const MERGE_SECONDS_MAX: u64 = 180;

#[expect(clippy::cast_precision_loss, reason = "figures of a report")]
pub(crate) fn float(count: u64) -> f64 {
    count as f64
}

#[expect(clippy::cast_precision_loss, reason = "figures of a report")]
fn float_signed(count: i64) -> f64 {
    count as f64
}

/// Set by a signal.
static INTERRUPTED: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);

/// Lets SIGINT and SIGTERM end the measurement in hand instead of the process, so that kernel
/// KSM gets its settings back.
pub(crate) fn end_by_signals() -> io::Result<()> {
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&INTERRUPTED))?;
    }
    Ok(())
}

/// An error once a signal came.
pub(crate) fn go_on() -> io::Result<()> {
    if INTERRUPTED.load(Ordering::Relaxed) {
        return Err(io::Error::other("interrupted"));
    }
    Ok(())
}

/// Lets time pass. What is measured is what an engine does in it, so there is no condition.
pub(crate) fn wait_for(time: Duration) {
    thread::sleep(time);
}

/// Starts the engine and waits for 99 % of what the oracle allows.
pub(crate) fn merge(peer: &mut dyn Peer, oracle: &Oracle) -> io::Result<Figures> {
    let target = oracle.duplicate_pages * 99 / 100;
    let (cpu_before_ns, begun) = (peer.cpu_ns()?, Instant::now());
    peer.start()?;
    let until = begun + Duration::from_secs(MERGE_SECONDS_MAX);
    while peer.progress()?.given_back_pages < target && Instant::now() < until {
        go_on()?;
        wait_for(Duration::from_micros(500));
    }
    let wall_s = begun.elapsed().as_secs_f64();
    let cpu_s = float(peer.cpu_ns()? - cpu_before_ns) / 1e9;
    let reached = peer.progress()?;
    // A little longer for the last percent: what is saved is asked when all is done.
    wait_for(Duration::from_secs_f64((wall_s * 0.5).clamp(0.2, 5.0)));
    let settled = peer.progress()?;
    let ideal_bytes = float(oracle.duplicate_pages * PAGE_SIZE_BYTES as u64);
    let mut figures = Figures::from([
        (
            "merged_pages_per_cpu_s".to_owned(),
            float(reached.merged_pages) / cpu_s,
        ),
        ("wall_to_99pct_s".to_owned(), wall_s),
        ("merge_cpu_s".to_owned(), cpu_s),
        (
            "reached_fraction".to_owned(),
            float(reached.given_back_pages) / float(oracle.duplicate_pages),
        ),
        (
            "saved_fraction_of_ideal".to_owned(),
            float_signed(settled.saved_bytes) / ideal_bytes,
        ),
    ]);
    figures.extend(settled.vmas.map(|vmas| ("vmas".to_owned(), float(vmas))));
    Ok(figures)
}

/// The engine's CPU once all is merged, while a share of the pages is written to each second.
pub(crate) fn calm(
    peer: &mut dyn Peer,
    workload: &Workload,
    window: Duration,
) -> io::Result<Figures> {
    let mut figures = Figures::new();
    let pages: usize = workload.regions.iter().map(Vec::len).sum();
    let gib = float((pages * PAGE_SIZE_BYTES) as u64) / float(1 << 30);
    for (name, per_mille) in [("0", 0), ("0.1", 1), ("1", 10)] {
        // Let the engine notice that it is calm.
        dirty(
            peer,
            workload,
            pages * per_mille / 1000,
            Duration::from_secs(3),
        )?;
        let before_ns = peer.cpu_ns()?;
        let begun = Instant::now();
        dirty(peer, workload, pages * per_mille / 1000, window)?;
        let cpu_s = float(peer.cpu_ns()? - before_ns) / 1e9;
        let per_gib = cpu_s / begun.elapsed().as_secs_f64() / gib;
        figures.insert(format!("rest_cpu_per_gib.{name}"), per_gib);
    }
    Ok(figures)
}

/// Writes to `pages_per_s` random pages each second, spread evenly.
fn dirty(
    peer: &dyn Peer,
    workload: &Workload,
    pages_per_s: usize,
    window: Duration,
) -> io::Result<()> {
    const SLICES_PER_S: u32 = 50;
    let starts = peer.region_starts();
    let mut random = Random::new(3);
    let begun = Instant::now();
    let mut slice = 0;
    while begun.elapsed() < window {
        go_on()?;
        for _ in 0..pages_per_s / SLICES_PER_S as usize {
            let region = random.below(starts.len());
            let page = random.below(workload.regions[region].len());
            write_word(
                starts[region],
                page,
                511,
                random.below(usize::MAX >> 12) as u64,
            );
            peer.wrote(region, page);
        }
        slice += 1;
        wait_for((Duration::from_secs(1) / SLICES_PER_S * slice).saturating_sub(begun.elapsed()));
    }
    Ok(())
}

/// Latency of writes to a tenth of the pages, for ever rewritten, in microseconds.
pub(crate) fn churn(
    peer: Option<&dyn Peer>,
    starts: &[*mut u64],
    workload: &Workload,
    window: Duration,
) -> io::Result<Figures> {
    let mut latencies_ns: Vec<u64> = Vec::with_capacity(1 << 22);
    let begun = Instant::now();
    let mut round = 0;
    'measured: loop {
        round += 1;
        for (region, &start) in starts.iter().enumerate() {
            for page in (0..workload.regions[region].len()).step_by(10) {
                let written = Instant::now();
                write_word(start, page, 100, round);
                latencies_ns.push(u64::try_from(written.elapsed().as_nanos()).unwrap_or(u64::MAX));
                if let Some(peer) = peer {
                    peer.wrote(region, page);
                }
            }
            if begun.elapsed() > window {
                break 'measured;
            }
        }
        go_on()?;
        wait_for(Duration::from_millis(20));
    }
    latencies_ns.sort_unstable();
    let at = |per_mille: usize| {
        float(latencies_ns[(latencies_ns.len() - 1) * per_mille / 1000]) / 1000.0
    };
    Ok(Figures::from([
        ("write_latency_us.p50".to_owned(), at(500)),
        ("write_latency_us.p99".to_owned(), at(990)),
        ("write_latency_us.p999".to_owned(), at(999)),
    ]))
}

/// How fast everything becomes private again.
pub(crate) fn unmerge(peer: &mut dyn Peer) -> io::Result<Figures> {
    let merged = peer.progress()?.merged_pages;
    let begun = Instant::now();
    peer.unmerge()?;
    let per_s = float(merged) / begun.elapsed().as_secs_f64();
    Ok(Figures::from([("unmerge_pages_per_s".to_owned(), per_s)]))
}

/// How long a merged region takes to go while the engine scans.
pub(crate) fn exit(peer: &mut dyn Peer, exits: usize) -> Figures {
    let mut times_ms: Vec<f64> = (0..exits)
        .map(|_| {
            let begun = Instant::now();
            peer.exit_one();
            begun.elapsed().as_secs_f64() * 1e3
        })
        .collect();
    times_ms.sort_by(f64::total_cmp);
    Figures::from([("exit_ms".to_owned(), times_ms[times_ms.len() / 2])])
}
