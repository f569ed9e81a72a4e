//! A made-up report through figures, tables and plots.

use std::fs;

use super::figures::{figures, quantile};
use super::quantity::Quantity;
use super::summary::Summary;
use super::synthetic::{arm, report, run};
use super::{plots, table};
use crate::density::model::{Engine, Mark, Run, Sample, Thp, Workload};

const MIB: u64 = 1 << 20;

/// Three guests' run in round numbers: a sample every second for 10 s.
fn small_run() -> Run {
    let mut run = run(arm(Workload::Idle, Engine::KsmFast, Thp::Madvise));
    run.guests.truncate(3);
    let sample = |second: u32| {
        let mut sample = Sample {
            at_s: f64::from(second),
            guests_ready: 3,
            vmas: 12,
            given_back_pages: 512,
            rounds: 10 * u64::from(second),
            ..Sample::default()
        };
        sample.memory.usage_bytes = MIB * if second < 4 { 300 } else { 100 };
        sample.memory.anon_bytes = 60 * MIB;
        sample.pss_bytes = (second == 6).then_some(30 * MIB);
        sample.cpu.ksmd_s = 50.0 + f64::from(second.min(6));
        sample
    };
    run.samples = (0..=10).map(sample).collect();
    let mark = |name: &str, at_s| Mark {
        name: name.to_owned(),
        at_s,
    };
    run.marks = vec![
        mark("last guest ready", 2.0),
        mark("at rest", 5.0),
        mark("written", 8.0),
        mark("end", 10.0),
    ];
    run
}

fn close(value: Option<&f64>, expected: f64) {
    let value = *value.expect("the figure");
    assert!(
        (value - expected).abs() < 1e-6 * expected.abs().max(1.0),
        "{value} {expected}"
    );
}

#[test]
fn figures_are_those_of_a_small_run() {
    let found = figures(&small_run());
    close(found.get(&Quantity::RestUsage), 100.0);
    close(found.get(&Quantity::RestAnonShmem), 60.0);
    // 8 GiB, of which three guests take 100 MiB.
    close(found.get(&Quantity::FitRest), 245.0);
    close(found.get(&Quantity::PssOfGroup), 50.0);
    close(found.get(&Quantity::BootPeak), 300.0);
    close(found.get(&Quantity::LastReady), 2.0);
    // 3 s of 300 MiB, one between, 6 s of 100 MiB.
    close(found.get(&Quantity::MemorySeconds), 1700.0 / 1024.0);
    close(found.get(&Quantity::MeanUsage), 170.0);
    // The kernel's thread had taken 50 s before.
    close(found.get(&Quantity::MergeCpu), 5.0);
    close(found.get(&Quantity::MergeCpuPerGib), 5.0 * 512.0);
    close(found.get(&Quantity::RestMergeCpu), 100.0 / 3.0);
    close(found.get(&Quantity::VmasEach), 4.0);
    close(found.get(&Quantity::RoundRate), 10.0);
    close(found.get(&Quantity::LaunchSum), 0.24);
    close(found.get(&Quantity::Errors), 0.0);
    assert_eq!(found.get(&Quantity::Refused), None);
    assert_eq!(found.get(&Quantity::SharedP50), None);
}

#[test]
fn a_run_that_found_nothing_has_no_figures_of_it() {
    let mut run = small_run();
    run.samples.clear();
    run.marks.clear();
    run.guests.clear();
    run.oracle = None;
    let found = figures(&run);
    let left: Vec<&Quantity> = found.keys().collect();
    assert_eq!(left, [&Quantity::Peak, &Quantity::Errors]);
}

#[test]
fn quantiles_are_the_nearest_rank() {
    let values: Vec<f64> = (1..=200).rev().map(f64::from).collect();
    assert_eq!(quantile(&values, 500), Some(100.0));
    assert_eq!(quantile(&values, 990), Some(198.0));
    assert_eq!(quantile(&[7.0], 990), Some(7.0));
    assert_eq!(quantile(&[], 500), None);
}

#[test]
fn the_best_of_kernel_ksm_is_the_one_to_beat() {
    let summary = Summary::new(&report());
    let idle = &summary.comparisons[0];
    assert_eq!(
        idle.best_ksm(Quantity::RestUsage).unwrap().0,
        Engine::KsmFast
    );
    assert_eq!(
        idle.best_ksm(Quantity::MergeCpu).unwrap().0,
        Engine::KsmDefaults
    );
    assert_eq!(
        idle.best_ksm(Quantity::GivenBack).unwrap().0,
        Engine::KsmFast
    );
    assert_eq!(idle.best_ksm(Quantity::RestAnon), None);
    let ratio = idle.ratio(Quantity::RestUsage).unwrap();
    let ours = idle.figure(Engine::Samepage, Quantity::RestUsage).unwrap();
    let theirs = idle.figure(Engine::KsmFast, Quantity::RestUsage).unwrap();
    assert!((ratio - ours / theirs).abs() < 1e-9 && ratio > 1.0);
}

#[test]
fn zeros_that_an_engine_mapped_where_guests_have_nothing_are_not_ideal() {
    let reached = |more_pages: u64| {
        let mut all = report();
        let ours = |run: &&mut Run| run.arm.engine == Engine::Samepage;
        let run = all.runs.iter_mut().find(ours).unwrap();
        let oracle = run.oracle.as_mut().unwrap();
        oracle.touched_pages += more_pages;
        oracle.zero_pages += more_pages;
        let summary = Summary::new(&all);
        let figure = |quantity| summary.comparisons[0].figure(Engine::Samepage, quantity);
        [Quantity::Ideal, Quantity::ShareReached].map(|it| figure(it).unwrap())
    };
    for (without, with) in reached(0).into_iter().zip(reached(256 * 50)) {
        // Figures are kept with six digits.
        assert!((with / without - 1.0).abs() < 1e-5, "{with} for {without}");
    }
}

#[test]
fn repeated_runs_count_by_their_median() {
    let mut all = report();
    let idle_off = all.runs[0].clone();
    all.runs = vec![idle_off.clone(), idle_off.clone(), idle_off];
    for (run, peak_mib) in all.runs.iter_mut().zip([5, 900, 7]) {
        run.peak_bytes = peak_mib * MIB;
    }
    let summary = Summary::new(&all);
    let column = &summary.comparisons[0].columns[0];
    assert_eq!(column.runs, 3);
    close(column.figures.get(&Quantity::Peak), 7.0);
}

#[test]
fn storms_count_who_was_refused_and_who_was_ended() {
    let summary = Summary::new(&report());
    let storm = summary.of(Workload::Storm).next().unwrap();
    let off = storm.column(Engine::Off).unwrap();
    let figure = |quantity| *off.figures.get(&quantity).unwrap();
    assert!(figure(Quantity::Held) > 10.0);
    close(Some(&figure(Quantity::Refused)), 1.0);
    let ended: usize = off.ends.values().sum();
    close(Some(&figure(Quantity::Ended)), ended as f64);
    assert_eq!(off.refusals["no memory is left"], 1);
    let text = table(&report());
    assert!(text.contains("off: refused 1: no memory is left"), "{text}");
}

#[test]
fn the_table_has_each_workload_and_the_ratio() {
    let text = table(&report());
    for workload in Workload::ALL {
        assert!(text.contains(&format!("\n{workload}: ")), "{workload}");
    }
    for word in [
        "ksm-advisor",
        "best KSM",
        "samepage / best KSM",
        "(fast)",
        "diverged",
    ] {
        assert!(text.contains(word), "{word} in {text}");
    }
}

#[test]
fn plots_are_small_and_the_same_for_the_same_report() {
    let directory = tempfile::tempdir().unwrap();
    let report = report();
    let first = plots(&report, directory.path()).unwrap();
    let texts = |paths: &[std::path::PathBuf]| -> Vec<String> {
        paths
            .iter()
            .map(|path| fs::read_to_string(path).unwrap())
            .collect()
    };
    let before = texts(&first);
    assert_eq!(before, texts(&plots(&report, directory.path()).unwrap()));
    assert!(first.len() > 20, "{first:?}");
    for (path, text) in first.iter().zip(&before) {
        assert!(text.len() < 60_000, "{} has {}", path.display(), text.len());
        assert!(
            text.contains("0123456789ab"),
            "{} names no commit",
            path.display()
        );
        assert!(!text.contains("NaN"), "{}", path.display());
    }
    let elsewhere = directory.path().join("file");
    fs::write(&elsewhere, "").unwrap();
    let error = plots(&report, &elsewhere).unwrap_err().to_string();
    assert!(error.contains("file"), "{error}");
}

#[test]
fn a_plot_of_odd_runs_is_drawn_too() {
    let directory = tempfile::tempdir().unwrap();
    let mut odd = report();
    for run in &mut odd.runs {
        run.samples.truncate(2);
        run.marks.truncate(1);
    }
    odd.runs[0].samples.clear();
    plots(&odd, directory.path()).unwrap();
    odd.runs.clear();
    assert_eq!(plots(&odd, directory.path()).unwrap().len(), 0);
}
