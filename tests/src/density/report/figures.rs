//! From what one run found to its figures. Nothing here knows another run.

use std::collections::BTreeMap;

use super::quantity::Quantity;
use crate::density::model::{Engine, Fleet, Guest, Latency, Oracle, Run, Sample, Workload};

/// Mark of the moment at which the last guest of the fleet was ready.
pub const LAST_READY: &str = "last guest ready";
/// Mark of the moment from which on nothing changes but what guests do for ever.
pub const AT_REST: &str = "at rest";
/// Mark of the end of what is measured.
pub const END: &str = "end";

/// Values by what they count. What a run cannot tell is absent.
pub type Figures = BTreeMap<Quantity, f64>;

const PAGE_BYTES: f64 = 4096.0;
const MIB: f64 = 1_048_576.0;
const GIB: f64 = 1_073_741_824.0;

/// All figures of `run`.
pub fn figures(run: &Run) -> Figures {
    let mut found = Figures::new();
    held(run, &mut found);
    memory(run, &mut found);
    rest(run, &mut found);
    fit(run, &mut found);
    launches(run, &mut found);
    merging(run, &mut found);
    mappings(run, &mut found);
    progress(run, &mut found);
    if let Some(oracle) = &run.oracle {
        sharing(run, oracle, &mut found);
    }
    if let Some(latency) = &run.latency {
        latencies(latency, &mut found);
    }
    found.insert(Quantity::Errors, count(run.errors.len()));
    found.retain(|_, value| value.is_finite());
    found
}

/// When the first mark of this name was, in seconds since the run's begin.
pub fn mark(run: &Run, name: &str) -> Option<f64> {
    let mark = run.marks.iter().find(|mark| mark.name == name)?;
    Some(mark.at_s)
}

/// The samples that were taken from `at rest` until the next mark.
///
/// A workload may go on after its rest, as storms do. Samples of its later parts are not at rest.
pub fn at_rest(run: &Run) -> &[Sample] {
    let Some(begin) = mark(run, AT_REST) else {
        return &[];
    };
    let later = run.marks.iter().map(|mark| mark.at_s);
    let end = later
        .filter(|&at_s| at_s > begin)
        .fold(f64::INFINITY, f64::min);
    between(&run.samples, begin, end)
}

/// The samples until the end of what is measured. Later ones see the guests read and stopped.
pub fn measured(run: &Run) -> &[Sample] {
    between(&run.samples, 0.0, end_s(run))
}

/// Seconds since the run's begin until which figures over the whole run count.
pub fn end_s(run: &Run) -> f64 {
    let last = run.samples.last().map_or(0.0, |sample| sample.at_s);
    mark(run, END).unwrap_or(last)
}

/// What a CPU that merges took so far; none where nobody merges.
pub fn merge_cpu_s(engine: Engine, sample: &Sample) -> Option<f64> {
    match engine {
        Engine::Off => None,
        Engine::Samepage => Some(sample.cpu.worker_s),
        Engine::KsmDefaults | Engine::KsmFast | Engine::KsmAdvisor => Some(sample.cpu.ksmd_s),
    }
}

/// The value that `permille` thousandths of `values` do not exceed (nearest rank).
pub fn quantile(values: &[f64], permille: usize) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (sorted.len() * permille).div_ceil(1000).max(1);
    sorted.get(rank - 1).copied()
}

/// Bytes as MiB.
pub fn mib(bytes: u64) -> f64 {
    bytes as f64 / MIB
}

fn pages_mib(pages: u64) -> f64 {
    pages as f64 * PAGE_BYTES / MIB
}

fn count(things: usize) -> f64 {
    things as f64
}

fn between(samples: &[Sample], begin: f64, end: f64) -> &[Sample] {
    let first = samples.partition_point(|sample| sample.at_s < begin);
    let behind = samples.partition_point(|sample| sample.at_s <= end);
    samples.get(first..behind).unwrap_or(&[])
}

fn mean(samples: &[Sample], of: impl Fn(&Sample) -> f64) -> Option<f64> {
    let sum: f64 = samples.iter().map(of).sum();
    (!samples.is_empty()).then(|| sum / count(samples.len()))
}

fn most(samples: &[Sample], of: impl Fn(&Sample) -> u64) -> Option<u64> {
    samples.iter().map(of).max()
}

/// By how much `of` grew in a second, between the first and the last sample.
fn rate(samples: &[Sample], of: impl Fn(&Sample) -> f64) -> Option<f64> {
    let (first, last) = (samples.first()?, samples.last()?);
    let span_s = last.at_s - first.at_s;
    (span_s > 0.0).then(|| (of(last) - of(first)) / span_s)
}

fn put(found: &mut Figures, quantity: Quantity, value: Option<f64>) {
    if let Some(value) = value {
        found.insert(quantity, value);
    }
}

/// How many guests there were at once, and what became of them.
fn held(run: &Run, found: &mut Figures) {
    let is_limited = matches!(run.arm.fleet, Fleet::UntilFull(_));
    let lost = |guest: &&Guest| guest.refusal.is_some() || guest.ended.is_some();
    let any_lost = run.guests.iter().any(|guest| lost(&guest));
    let most_ready = measured(run).iter().map(|sample| sample.guests_ready);
    let most_ready = most_ready.max();
    put(found, Quantity::Held, most_ready.map(count));
    // A burst ends its guests by plan.
    let is_judged = is_limited || any_lost || run.oom_kills > 0;
    if is_judged && run.arm.workload != Workload::Burst {
        let counted = |which: &dyn Fn(&Guest) -> bool| {
            count(run.guests.iter().filter(|guest| which(guest)).count())
        };
        let lived = |guest: &Guest| guest.ready_at_s.is_some() && guest.ended.is_none();
        found.insert(Quantity::GoingOn, counted(&lived));
        found.insert(Quantity::Refused, counted(&|guest| guest.refusal.is_some()));
        found.insert(Quantity::Ended, counted(&|guest| guest.ended.is_some()));
        found.insert(Quantity::OomKills, run.oom_kills as f64);
    }
}

/// How many guests the limit would hold if each of them took its share of what all take now. A
/// fleet that the limit itself ended needs no such guess.
fn fit(run: &Run, found: &mut Figures) {
    let limit = mib(run.arm.memory_limit_bytes);
    let Some(ready) = found.get(&Quantity::Held).copied() else {
        return;
    };
    // Guests of a burst are never all there, and those of `latency` differ in size.
    let is_even = !matches!(run.arm.workload, Workload::Burst | Workload::Latency);
    if !is_even || matches!(run.arm.fleet, Fleet::UntilFull(_)) {
        return;
    }
    for (fit, memory) in [
        (Quantity::FitRest, Quantity::RestUsage),
        (Quantity::FitPeak, Quantity::Peak),
    ] {
        let taken = found.get(&memory).copied().filter(|&taken| taken > 0.0);
        put(
            found,
            fit,
            taken.map(|taken| (limit * ready / taken).floor()),
        );
    }
}

/// Memory over the whole run.
fn memory(run: &Run, found: &mut Figures) {
    found.insert(Quantity::Peak, mib(run.peak_bytes));
    let usage = |sample: &Sample| mib(sample.memory.usage_bytes);
    if let Some(ready_s) = mark(run, LAST_READY) {
        let booting = between(&run.samples, 0.0, ready_s);
        let peak = most(booting, |sample| sample.memory.usage_bytes);
        put(found, Quantity::BootPeak, peak.map(mib));
    }
    let measured = measured(run);
    let area_mib_s: f64 = measured
        .windows(2)
        .map(|pair| (usage(&pair[0]) + usage(&pair[1])) / 2.0 * (pair[1].at_s - pair[0].at_s))
        .sum();
    if let (Some(first), Some(last)) = (measured.first(), measured.last())
        && last.at_s > first.at_s
    {
        let seconds = last.at_s - first.at_s;
        found.insert(Quantity::MemorySeconds, area_mib_s * MIB / GIB);
        found.insert(Quantity::MeanUsage, area_mib_s / seconds);
    }
}

/// Memory at rest, by kind, and the same by other ways to count it.
fn rest(run: &Run, found: &mut Figures) {
    let samples = at_rest(run);
    let usage = mean(samples, |sample| mib(sample.memory.usage_bytes));
    let anon = mean(samples, |sample| mib(sample.memory.anon_bytes));
    let shmem = mean(samples, |sample| mib(sample.memory.shmem_bytes));
    let ready = mean(samples, |sample| count(sample.guests_ready));
    let kernel = mean(samples, |sample| mib(sample.memory.kernel_bytes));
    let file = mean(samples, |sample| mib(sample.memory.file_bytes));
    let both = anon.zip(shmem).map(|(anon, shmem)| anon + shmem);
    put(found, Quantity::RestUsage, usage);
    let each = usage.zip(ready).map(|(usage, ready)| usage / ready);
    put(found, Quantity::RestUsageEach, each);
    put(found, Quantity::RestAnonShmem, both);
    put(found, Quantity::RestAnon, anon);
    put(found, Quantity::RestShmem, shmem);
    put(found, Quantity::RestKernel, kernel);
    put(found, Quantity::RestFile, file);
    let available = mean(samples, |sample| mib(sample.mem_available_bytes));
    let before = run.samples.first();
    let fall = available.zip(before);
    let fall = fall.map(|(now, before)| mib(before.mem_available_bytes) - now);
    put(found, Quantity::AvailableFall, fall);
    // PSS is looked at less often, so it is set beside the samples that have it.
    let with_pss = samples.iter().filter_map(|sample| {
        let memory = sample.memory;
        Some((sample.pss_bytes?, memory.anon_bytes + memory.shmem_bytes))
    });
    let with_pss: Vec<(u64, u64)> = with_pss.collect();
    if !with_pss.is_empty() {
        let looks = count(with_pss.len());
        let pss: f64 = with_pss.iter().map(|(pss, _)| mib(*pss)).sum();
        let group: f64 = with_pss.iter().map(|(_, group)| mib(*group)).sum();
        found.insert(Quantity::RestPss, pss / looks);
        found.insert(Quantity::PssOfGroup, 100.0 * pss / group);
    }
}

/// How long guests took to be accepted, and to be ready.
fn launches(run: &Run, found: &mut Figures) {
    put(found, Quantity::LastReady, mark(run, LAST_READY));
    let launches = run.guests.iter().filter_map(|guest| guest.launch_s);
    let launches: Vec<f64> = launches.collect();
    let ready = run
        .guests
        .iter()
        .filter_map(|guest| Some(guest.ready_at_s? - guest.asked_at_s));
    let ready: Vec<f64> = ready.collect();
    if !launches.is_empty() {
        found.insert(Quantity::LaunchSum, launches.iter().sum());
    }
    let in_ms = |value: Option<f64>| value.map(|seconds| 1000.0 * seconds);
    put(found, Quantity::LaunchP50, in_ms(quantile(&launches, 500)));
    put(found, Quantity::LaunchP99, in_ms(quantile(&launches, 990)));
    put(found, Quantity::ReadyP50, quantile(&ready, 500));
    put(found, Quantity::ReadyP99, quantile(&ready, 990));
}

/// CPU time, and what was given back for it.
fn merging(run: &Run, found: &mut Figures) {
    let engine = run.arm.engine;
    let until_s = mark(run, AT_REST).unwrap_or(end_s(run));
    let until_rest = between(&run.samples, 0.0, until_s);
    let resting = at_rest(run);
    let vcpus = |sample: &Sample| sample.cpu.vcpus_s;
    if let (Some(first), Some(last)) = (until_rest.first(), until_rest.last()) {
        found.insert(Quantity::VcpuCpu, vcpus(last) - vcpus(first));
    }
    let server = rate(resting, |sample| sample.cpu.server_s);
    put(
        found,
        Quantity::RestServerCpu,
        server.map(|rate| 100.0 * rate),
    );
    if engine == Engine::Off {
        return;
    }
    let cpu = |sample: &Sample| merge_cpu_s(engine, sample).unwrap_or(0.0);
    let span = until_rest.first().zip(until_rest.last());
    let spent_s = span.map(|(first, last)| cpu(last) - cpu(first));
    put(found, Quantity::MergeCpu, spent_s);
    let at_rest = rate(resting, cpu).map(|rate| 100.0 * rate);
    put(found, Quantity::RestMergeCpu, at_rest);
    // A run without a rest, such as a burst, is judged by what it had on the way.
    let settled = if resting.is_empty() {
        until_rest
    } else {
        resting
    };
    let given_back = mean(settled, |sample| pages_mib(sample.given_back_pages));
    let kept = mean(settled, |sample| pages_mib(sample.shared_pages));
    put(found, Quantity::GivenBack, given_back);
    put(found, Quantity::Kept, kept);
    let per_gib = spent_s.zip(given_back.filter(|&mib| mib > 0.0));
    let per_gib = per_gib.map(|(spent_s, mib)| spent_s * GIB / (mib * MIB));
    put(found, Quantity::MergeCpuPerGib, per_gib);
}

/// Mappings, context switches, the mmap lock.
fn mappings(run: &Run, found: &mut Figures) {
    let resting = at_rest(run);
    let vmas = mean(resting, |sample| sample.vmas as f64);
    let ready = mean(resting, |sample| count(sample.guests_ready));
    put(found, Quantity::RestVmas, vmas);
    let each = vmas.zip(ready).map(|(vmas, ready)| vmas / ready);
    put(found, Quantity::VmasEach, each);
    let most_vmas = most(measured(run), |sample| sample.vmas);
    put(found, Quantity::MostVmas, most_vmas.map(|vmas| vmas as f64));
    let switches = rate(measured(run), |sample| sample.context_switches as f64);
    put(found, Quantity::ContextSwitches, switches);
    if let Some(lock) = &run.mmap_lock {
        found.insert(Quantity::MmapWriteLocks, lock.write_locks as f64);
        found.insert(Quantity::MmapWaited, lock.waited_s);
    }
}

/// Rounds of work in a second, from the moment at which all guests are ready.
fn progress(run: &Run, found: &mut Figures) {
    let begin_s = mark(run, LAST_READY).unwrap_or(0.0);
    let working = between(&run.samples, begin_s, end_s(run));
    let rounds = rate(working, |sample| sample.rounds as f64);
    put(
        found,
        Quantity::RoundRate,
        rounds.filter(|&rate| rate > 0.0),
    );
}

/// What was given back beside what an ideal engine would give back.
fn sharing(run: &Run, oracle: &Oracle, found: &mut Figures) {
    let ideal_pages = oracle.touched_pages.saturating_sub(oracle.unique_contents);
    found.insert(Quantity::Ideal, pages_mib(ideal_pages));
    found.insert(Quantity::SamePlace, pages_mib(oracle.same_place_pages));
    found.insert(Quantity::Elsewhere, pages_mib(oracle.elsewhere_pages));
    found.insert(Quantity::ElsewhereRuns, oracle.elsewhere_runs as f64);
    found.insert(Quantity::Zeros, pages_mib(oracle.zero_pages));
    // The oracle reads guests at the end, so it is set beside the last sample and not a mean.
    if run.arm.engine != Engine::Off
        && ideal_pages > 0
        && let Some(last) = measured(run).last()
    {
        let share = last.given_back_pages as f64 / ideal_pages as f64;
        found.insert(Quantity::ShareReached, 100.0 * share);
    }
}

fn latencies(latency: &Latency, found: &mut Figures) {
    let (shared, exit) = (&latency.shared, &latency.exit);
    if shared.count > 0 {
        found.insert(Quantity::SharedP50, shared.p50_us);
        found.insert(Quantity::SharedP99, shared.p99_us);
        found.insert(Quantity::SharedP999, shared.p999_us);
        found.insert(Quantity::SharedMax, shared.max_us);
    }
    if exit.count > 0 {
        found.insert(Quantity::ExitP50, exit.p50_us);
        found.insert(Quantity::ExitP99, exit.p99_us);
        found.insert(Quantity::ExitP999, exit.p999_us);
        found.insert(Quantity::ExitMax, exit.max_us);
    }
    found.insert(Quantity::BusyVcpus, count(latency.busy_vcpus));
}
