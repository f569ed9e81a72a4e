//! The text of the generated parts of documents.

use std::fmt;

use super::document::PLOTS;
use super::grid::{Grid, best_ksm};
use super::plots::{Kind, Plot};
use super::quantity::{Better, Quantity, number};
use super::summary::{Comparison, Summary, size};
use super::table::incidents;
use crate::density::model::{Engine, Fleet, Thp, Workload};

/// What a part says where the repository keeps no figures.
pub const NO_RUN: &str = "No run is kept yet.";
const NOT_RUN: &str = "This run did not have it.";
const NONE: &str = "-";

/// A generated part of a document.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Date, commit, command and host.
    Run,
    /// The host's settings, engine beside engine.
    Settings,
    /// Guests in the same limit, and their progress, over all workloads.
    Held,
    /// What the oracle found, over all workloads.
    Sharing,
    /// Figures and plots of one workload.
    Results(Workload),
    /// The README's table and plot.
    Headline,
    /// Rows of SPECIFICATION.md.
    Specification,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Part::Run => f.write_str("run"),
            Part::Settings => f.write_str("settings"),
            Part::Held => f.write_str("held"),
            Part::Sharing => f.write_str("sharing"),
            Part::Results(workload) => write!(f, "results {workload}"),
            Part::Headline => f.write_str("headline"),
            Part::Specification => f.write_str("specification"),
        }
    }
}

impl Part {
    /// Every part that there is.
    pub fn all() -> Vec<Part> {
        let results = Workload::ALL.into_iter().map(Part::Results);
        let first = [Part::Run, Part::Settings, Part::Held, Part::Sharing];
        let last = [Part::Headline, Part::Specification];
        first.into_iter().chain(results).chain(last).collect()
    }

    /// Its text.
    pub fn text(self, summary: &Summary) -> String {
        match self {
            Part::Run => run(summary),
            Part::Settings => settings(summary),
            Part::Held => held(summary),
            Part::Sharing => sharing(summary),
            Part::Results(workload) => results(summary, workload),
            Part::Headline => headline(summary),
            Part::Specification => specification(summary),
        }
    }
}

fn run(summary: &Summary) -> String {
    let host = &summary.host;
    let row = |name: &str, value: String| vec![name.to_owned(), value];
    let read_gb = host.memory_read_bytes_per_s / 1e9;
    let rows = vec![
        row("date", summary.day().to_owned()),
        row("commit", format!("`{}`", summary.commit)),
        row("kernel", format!("Linux {}", host.kernel)),
        row("CPU", host.cpu.clone()),
        row("CPUs", host.cpus.to_string()),
        row("memory", size(host.memory_bytes)),
        row("one CPU reads memory at", format!("{read_gb:.1} GB/s")),
        row(
            "first touch of a base page",
            format!("{:.2} us", host.first_touch_us),
        ),
    ];
    let table = Grid::of_words(&["run", ""], rows).markdown();
    format!("The command:\n\n    {}\n\n{table}", summary.command)
}

/// The union of all settings, a column for each engine. Values that differ between an engine's runs
/// stand in one cell.
fn settings(summary: &Summary) -> String {
    let columns = || summary.comparisons.iter().flat_map(|one| &one.columns);
    let mut engines: Vec<Engine> = columns().map(|column| column.engine).collect();
    engines.sort();
    engines.dedup();
    let mut paths: Vec<&str> = Vec::new();
    for (path, _) in columns().flat_map(|column| &column.settings) {
        if !paths.contains(&path.as_str()) {
            paths.push(path);
        }
    }
    let cell = |path: &str, engine: Engine| {
        let own = columns().filter(|column| column.engine == engine);
        let values = own.flat_map(|column| &column.settings);
        let mut found: Vec<&str> = Vec::new();
        for (_, value) in values.filter(|(name, _)| name == path) {
            if !found.contains(&value.as_str()) {
                found.push(value);
            }
        }
        match found.is_empty() {
            true => NONE.to_owned(),
            false => found.join(" / "),
        }
    };
    let row = |path: &&str| {
        let cells = engines.iter().map(|engine| cell(path, *engine));
        std::iter::once(format!("`{path}`")).chain(cells).collect()
    };
    let mut head = vec!["setting".to_owned()];
    head.extend(engines.iter().map(Engine::to_string));
    Grid::of_numbers(head, paths.iter().map(row).collect()).markdown()
}

/// No merging, the best of kernel KSM, Samepage.
fn three(comparison: &Comparison, quantity: Quantity) -> [String; 3] {
    let of = |engine: Engine| match comparison.figure(engine, quantity) {
        Some(value) => number(value, quantity.unit()),
        None => NONE.to_owned(),
    };
    [
        of(Engine::Off),
        best_ksm(comparison, quantity),
        of(Engine::Samepage),
    ]
}

/// A table with a row for each pair, of no merging, the best of kernel KSM, and Samepage.
fn three_columns<'a>(rows: impl Iterator<Item = (&'a Comparison, Quantity)>) -> String {
    let row = |(comparison, quantity): (&Comparison, Quantity)| {
        let mut row = vec![format!(
            "{}: {}",
            comparison.short_title(),
            quantity.label()
        )];
        row.extend(three(comparison, quantity));
        row
    };
    let head = ["", "no merging", "kernel KSM, best", "Samepage"];
    let head = head.map(str::to_owned).to_vec();
    let rows: Vec<Vec<String>> = rows.map(row).collect();
    Grid::of_numbers(head, rows).markdown()
}

/// The pairs of a comparison and a quantity of its own that anybody has a figure for.
fn present<'a>(
    comparisons: &'a [Comparison],
    quantities: impl Fn(&Comparison) -> Vec<Quantity>,
) -> Vec<(&'a Comparison, Quantity)> {
    let of_one = |comparison: &'a Comparison| {
        let mut own = quantities(comparison);
        own.retain(|quantity| {
            let mut columns = comparison.columns.iter();
            columns.any(|column| column.figures.contains_key(quantity))
        });
        own.into_iter().map(move |quantity| (comparison, quantity))
    };
    comparisons.iter().flat_map(of_one).collect()
}

/// How many guests there were at once is a finding only where a limit decided it.
fn is_limited(comparison: &Comparison) -> bool {
    matches!(comparison.fleet, Fleet::UntilFull(_))
}

/// What a workload is about: the figures that stand for it outside of its own tables.
fn claims(comparison: &Comparison) -> Vec<Quantity> {
    let mut found = match comparison.workload {
        Workload::Idle | Workload::Agents | Workload::TwoImages | Workload::Phase => vec![
            Quantity::RestUsage,
            Quantity::LastReady,
            Quantity::MergeCpu,
            Quantity::Progress,
        ],
        Workload::Burst => vec![Quantity::MemorySeconds, Quantity::MergeCpu],
        Workload::Storm => vec![Quantity::GoingOn, Quantity::OomKills],
        Workload::Latency => vec![
            Quantity::SharedP50,
            Quantity::SharedP99,
            Quantity::SharedP999,
            Quantity::SharedMax,
        ],
    };
    if is_limited(comparison) {
        found.insert(0, Quantity::Held);
    }
    found
}

fn held(summary: &Summary) -> String {
    let rows = present(&summary.comparisons, |comparison| {
        let held = is_limited(comparison).then_some(Quantity::Held);
        let others = [
            Quantity::FitRest,
            Quantity::FitPeak,
            Quantity::GoingOn,
            Quantity::Progress,
        ];
        held.into_iter().chain(others).collect()
    });
    if rows.is_empty() {
        return NOT_RUN.to_owned();
    }
    let plots = summary.plots.iter().filter(|plot| plot.workload.is_none());
    let images = images(plots, "density");
    format!("{}\n\n{images}", three_columns(rows.into_iter()))
}

/// What the oracle found in the guests of each comparison. Engines leave contents as they are, so
/// one engine's guests stand for all: the first that was looked at.
fn sharing(summary: &Summary) -> String {
    let quantities = [
        Quantity::Zeros,
        Quantity::SamePlace,
        Quantity::Elsewhere,
        Quantity::ElsewhereRuns,
        Quantity::Ideal,
    ];
    let mut rows = Vec::new();
    for comparison in &summary.comparisons {
        let looked_at = |column: &&_| has_oracle(column);
        let Some(column) = comparison.columns.iter().find(looked_at) else {
            continue;
        };
        let mut row = vec![comparison.short_title()];
        row.extend(quantities.iter().map(|quantity| {
            let value = column.figures.get(quantity);
            value.map_or(NONE.to_owned(), |value| number(*value, quantity.unit()))
        }));
        rows.push(row);
    }
    if rows.is_empty() {
        return NOT_RUN.to_owned();
    }
    let mut head = vec![String::new()];
    head.extend(quantities.iter().map(|quantity| quantity.label()));
    let reached = present(&summary.comparisons, |_| vec![Quantity::ShareReached]);
    let reached = three_columns(reached.into_iter());
    format!("{}\n\n{reached}", Grid::of_numbers(head, rows).markdown())
}

fn has_oracle(column: &super::summary::Column) -> bool {
    column.figures.contains_key(&Quantity::Ideal)
}

fn results(summary: &Summary, workload: Workload) -> String {
    let mut sections = Vec::new();
    for (index, comparison) in summary.comparisons.iter().enumerate() {
        if comparison.workload != workload {
            continue;
        }
        let own = summary.plots.iter();
        let own = own.filter(|plot| plot.comparison == Some(index));
        let key = Grid::of_figures(comparison, Quantity::is_key).markdown();
        let all = Grid::of_figures(comparison, |_| true).markdown();
        sections.push(format!("**{}**\n\n{key}", comparison.title()));
        sections.extend(incident_table(comparison));
        sections.push(images(own, "density"));
        sections.push(format!(
            "<details>\n<summary>All figures</summary>\n\n{all}\n\n</details>"
        ));
    }
    match sections.is_empty() {
        true => NOT_RUN.to_owned(),
        false => sections.join("\n\n"),
    }
}

/// Refusals, ends and errors; none if nothing of that kind happened.
fn incident_table(comparison: &Comparison) -> Option<String> {
    let rows = comparison.columns.iter().flat_map(|column| {
        let lines = incidents(column).into_iter();
        lines.map(|line| vec![column.engine.to_string(), line])
    });
    let rows: Vec<Vec<String>> = rows.collect();
    let head = ["engine", "refused, ended, wrong"];
    (!rows.is_empty()).then(|| Grid::of_words(&head, rows).markdown())
}

/// Links to plots, a line each. `directory` is where they are, seen from the document.
fn images<'a>(plots: impl Iterator<Item = &'a Plot>, directory: &str) -> String {
    let image = |plot: &Plot| {
        let what = plot.title.split(';').next().unwrap_or(&plot.title);
        format!("![{what}]({directory}/{})", plot.file)
    };
    let lines: Vec<String> = plots.map(image).collect();
    lines.join("\n")
}

/// The comparisons that stand for a run where there is no room for all: those at the host's usual
/// setting of huge pages, or else all.
fn usual(summary: &Summary) -> Vec<Comparison> {
    let all = &summary.comparisons;
    let usual = all.iter().filter(|one| one.thp == Thp::Madvise);
    let usual: Vec<Comparison> = usual.cloned().collect();
    match usual.is_empty() {
        true => all.clone(),
        false => usual,
    }
}

fn headline(summary: &Summary) -> String {
    let usual = usual(summary);
    let rows = present(&usual, |comparison| {
        let mut claims = claims(comparison);
        claims.retain(|claim| !matches!(claim, Quantity::MergeCpu | Quantity::SharedP99));
        claims
    });
    let table = three_columns(rows.into_iter());
    let of_kind = |kind: Kind| summary.plots.iter().find(|plot| plot.kind == kind);
    let plot = of_kind(Kind::Memory).or(of_kind(Kind::Held));
    let image = images(plot.into_iter(), PLOTS);
    let day = summary.day();
    format!(
        "Measured on {day}, commit `{}`.\n\n{table}\n\n{image}",
        summary.commit
    )
}

fn specification(summary: &Summary) -> String {
    let row = |(comparison, quantity): (&Comparison, Quantity)| {
        let [off, ksm, ours] = three(comparison, quantity);
        let target = match quantity.better() {
            Better::More => "at least kernel KSM's",
            Better::Less | Better::Neither => "at most kernel KSM's",
        };
        let suffix = match quantity.unit().suffix() {
            "" => String::new(),
            suffix => format!(" {suffix}"),
        };
        vec![
            format!("{}: {}", comparison.short_title(), quantity.name()),
            target.to_owned(),
            format!("`{}`", summary.command),
            format!("{ours}{suffix}; kernel KSM {ksm}, no merging {off}"),
            summary.day().to_owned(),
        ]
    };
    let rows = present(&summary.comparisons, claims);
    let rows: Vec<Vec<String>> = rows.into_iter().map(row).collect();
    if rows.is_empty() {
        return NOT_RUN.to_owned();
    }
    let head = ["claim", "figure", "command", "last result", "date"];
    Grid::of_words(&head, rows).markdown()
}
