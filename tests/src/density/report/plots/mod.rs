//! Plots of a report, as SVG files: the same report gives the same bytes.
//!
//! Text stays text, so a file needs no font and is small. Backgrounds are white, because a page
//! that shows a plot may be dark.
//!
//! | module | holds |
//! |---|---|
//! | `sheet` | title, legend, colours, text: what all plots have |
//! | `lines` | memory and CPU over time, latencies |
//! | `bars` | memory by kind, guests held, progress |

mod bars;
mod lines;
mod sheet;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use plotters::drawing::DrawingAreaErrorKind;
use serde::{Deserialize, Serialize};

use super::quantity::Quantity;
use super::summary::{Comparison, Summary, groups};
use crate::density::model::{Fleet, Report, Run, Workload};

/// What drawing gives; it only fails where memory cannot be written to.
type Drawn<T> = Result<T, DrawingAreaErrorKind<io::Error>>;

/// A plot of a report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plot {
    /// Name of its file, without the directory.
    pub file: String,
    /// What it shows, which is also its title.
    pub title: String,
    /// The workload that it belongs to; none if it compares workloads.
    pub workload: Option<Workload>,
    /// What kind it is.
    pub kind: Kind,
    /// The comparison that it shows, by its place in the summary; none if it shows several.
    pub comparison: Option<usize>,
}

/// A kind of plot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Memory of the group over time, a line for each engine.
    Memory,
    /// Memory at rest by kind, a bar for each engine.
    Rest,
    /// CPU for merging over time, a line for each engine.
    Cpu,
    /// Quantiles of the write-latency probe.
    Latency,
    /// Guests in the same limit, by workload.
    Held,
    /// Rounds of work beside those without merging, by workload.
    Progress,
}

/// Writes all plots of `report` into `directory`, which is made if it is missing, and returns their
/// paths. Other files there are left alone.
///
/// # Errors
/// If a file cannot be written; the message names it.
pub fn plots(report: &Report, directory: &Path) -> io::Result<Vec<PathBuf>> {
    let named = |path: &Path, error: io::Error| {
        io::Error::new(error.kind(), format!("{}: {error}", path.display()))
    };
    fs::create_dir_all(directory).map_err(|error| named(directory, error))?;
    let summary = Summary::new(report);
    let groups = groups(report);
    let mut written = Vec::new();
    for plot in &summary.plots {
        let path = directory.join(&plot.file);
        let text = drawn(plot, &summary, &groups).map_err(io::Error::other);
        let text = text.map_err(|error| named(&path, error))?;
        fs::write(&path, text).map_err(|error| named(&path, error))?;
        written.push(path);
    }
    Ok(written)
}

/// The plots that these comparisons have figures for.
pub(super) fn planned(comparisons: &[Comparison]) -> Vec<Plot> {
    let mut found: Vec<Plot> = Vec::new();
    for (index, comparison) in comparisons.iter().enumerate() {
        let kinds = [
            (Kind::Memory, Quantity::MemorySeconds, "memory over time"),
            (Kind::Rest, Quantity::RestUsage, "memory at rest by kind"),
            (Kind::Cpu, Quantity::MergeCpu, "CPU for merging"),
            (Kind::Latency, Quantity::SharedP50, "latency of a write"),
        ];
        for (kind, quantity, what) in kinds {
            if has(comparison, quantity) {
                found.push(Plot {
                    file: file_name(kind, comparison, &found),
                    title: format!("{what}; {}", comparison.title()),
                    workload: Some(comparison.workload),
                    kind,
                    comparison: Some(index),
                });
            }
        }
    }
    for (kind, title) in [
        (Kind::Held, "guests ready at once in the same limit"),
        (
            Kind::Progress,
            "rounds of work, in % of those without merging",
        ),
    ] {
        if comparisons.iter().any(|one| takes_part(kind, one)) {
            found.push(Plot {
                file: format!("{}.svg", word(kind)),
                title: title.to_owned(),
                workload: None,
                kind,
                comparison: None,
            });
        }
    }
    found
}

/// Whether a comparison is in the plot of this kind that compares workloads.
fn takes_part(kind: Kind, comparison: &Comparison) -> bool {
    match kind {
        Kind::Held => matches!(comparison.fleet, Fleet::UntilFull(_)),
        Kind::Progress => has(comparison, Quantity::Progress),
        Kind::Memory | Kind::Rest | Kind::Cpu | Kind::Latency => false,
    }
}

fn has(comparison: &Comparison, quantity: Quantity) -> bool {
    let mut columns = comparison.columns.iter();
    columns.any(|column| column.figures.contains_key(&quantity))
}

fn word(kind: Kind) -> &'static str {
    match kind {
        Kind::Memory => "memory",
        Kind::Rest => "rest",
        Kind::Cpu => "cpu",
        Kind::Latency => "latency",
        Kind::Held => "held",
        Kind::Progress => "progress",
    }
}

/// A name that no plot before it has: fleets and limits of one workload may differ in a report.
fn file_name(kind: Kind, comparison: &Comparison, before: &[Plot]) -> String {
    let stem = format!("{}-{}", word(kind), comparison.file_part());
    let numbered = (2..).map(|number| format!("{stem}-{number}.svg"));
    let mut names = std::iter::once(format!("{stem}.svg")).chain(numbered);
    let is_free = |name: &String| before.iter().all(|plot| plot.file != *name);
    names.find(is_free).unwrap_or_default()
}

fn drawn(plot: &Plot, summary: &Summary, groups: &[Vec<&Run>]) -> Drawn<String> {
    let note = format!(
        "commit {}, {}, Linux {}, {} CPUs",
        summary.commit,
        summary.day(),
        summary.host.kernel,
        summary.host.cpus
    );
    let caption = sheet::Caption {
        title: &plot.title,
        note: &note,
    };
    let mut text = String::new();
    let one = plot.comparison;
    let runs = one.and_then(|index| groups.get(index));
    let comparison = one.and_then(|index| summary.comparisons.get(index));
    match (plot.kind, runs, comparison) {
        (Kind::Memory, Some(runs), _) => lines::memory(&mut text, caption, runs)?,
        (Kind::Cpu, Some(runs), _) => lines::cpu(&mut text, caption, runs)?,
        (Kind::Rest, _, Some(comparison)) => bars::rest(&mut text, caption, comparison)?,
        (Kind::Latency, _, Some(comparison)) => lines::latency(&mut text, caption, comparison)?,
        (kind, _, _) => {
            let all = summary.comparisons.iter();
            let shown: Vec<&Comparison> = all.filter(|one| takes_part(kind, one)).collect();
            let quantity = match kind {
                Kind::Held => Quantity::Held,
                _ => Quantity::Progress,
            };
            bars::by_workload(&mut text, caption, &shown, quantity)?;
        }
    }
    Ok(text)
}
