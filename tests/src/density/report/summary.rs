//! The figures of a report, engine beside engine: what documents are made from and what is kept of
//! a run in the repository.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::figures::{AT_REST, END, Figures, LAST_READY, figures, mib};
use super::plots::Plot;
use super::quantity::{Better, Quantity};
use crate::density::model::{Arm, Engine, Fleet, Host, Report, Run, Sample, Thp, Workload};

/// All that a report says, without its raw samples.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// The command line that repeats it.
    pub command: String,
    /// Commit of the sources.
    pub commit: String,
    /// When it began: RFC 3339, UTC.
    pub date: String,
    /// The machine.
    pub host: Host,
    /// What was compared, in the order of the runs.
    pub comparisons: Vec<Comparison>,
    /// The plots of the report.
    pub plots: Vec<Plot>,
}

/// Runs that differ in who merges, and in nothing else.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// What guests do.
    pub workload: Workload,
    /// The host's huge pages.
    pub thp: Thp,
    /// How many guests.
    pub fleet: Fleet,
    /// Limit of the memory cgroup.
    pub memory_limit_bytes: u64,
    /// What each engine reached, in the order of [`Engine`].
    pub columns: Vec<Column>,
}

/// What one engine reached.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Column {
    /// Who merged.
    pub engine: Engine,
    /// How many runs there were; figures are their medians.
    pub runs: usize,
    /// The figures.
    pub figures: Figures,
    /// Memory at moments that only this workload has.
    pub moments: Vec<Moment>,
    /// The host's settings, by path, in the last of the runs.
    pub settings: Vec<(String, String)>,
    /// How many guests were refused, by the reason, in all runs.
    pub refusals: BTreeMap<String, usize>,
    /// How many guests were ended, by the reason, in all runs.
    pub ends: BTreeMap<String, usize>,
    /// What went wrong, in all runs.
    pub errors: Vec<String>,
}

/// The memory of the group at a moment with a name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Moment {
    /// Name of the mark.
    pub name: String,
    /// Its seconds since the run's begin.
    pub at_s: f64,
    /// Memory of the group in MiB at the last sample until then.
    pub usage_mib: f64,
}

/// The runs of a report that belong together, in the order in which the first of each was made.
pub fn groups(report: &Report) -> Vec<Vec<&Run>> {
    let mut groups: Vec<Vec<&Run>> = Vec::new();
    for run in &report.runs {
        let same = |group: &&mut Vec<&Run>| is_comparable(&group[0].arm, &run.arm);
        match groups.iter_mut().find(same) {
            Some(group) => group.push(run),
            None => groups.push(vec![run]),
        }
    }
    groups
}

fn is_comparable(one: &Arm, other: &Arm) -> bool {
    Arm {
        engine: other.engine,
        ..*one
    } == *other
}

impl Summary {
    /// The summary of `report`.
    pub fn new(report: &Report) -> Summary {
        let groups = groups(report);
        let comparisons: Vec<Comparison> = groups.iter().map(|runs| comparison(runs)).collect();
        Summary {
            command: report.command.clone(),
            commit: report.commit.clone(),
            date: report.date.clone(),
            host: report.host.clone(),
            plots: super::plots::planned(&comparisons),
            comparisons,
        }
    }

    /// The comparisons of one workload.
    pub fn of(&self, workload: Workload) -> impl Iterator<Item = &Comparison> {
        let is_of = move |one: &&Comparison| one.workload == workload;
        self.comparisons.iter().filter(is_of)
    }

    /// The day on which the run began, as `yyyy-mm-dd`.
    pub fn day(&self) -> &str {
        self.date.split('T').next().unwrap_or(&self.date)
    }
}

impl Comparison {
    /// What `engine` reached, if it took part.
    pub fn column(&self, engine: Engine) -> Option<&Column> {
        self.columns.iter().find(|column| column.engine == engine)
    }

    /// One figure of one engine.
    pub fn figure(&self, engine: Engine, quantity: Quantity) -> Option<f64> {
        self.column(engine)?.figures.get(&quantity).copied()
    }

    /// The best figure of all ways to set kernel KSM, which is the one to beat, and whose it is.
    pub fn best_ksm(&self, quantity: Quantity) -> Option<(Engine, f64)> {
        let columns = self.columns.iter().filter(|one| one.engine.is_ksm());
        let values = columns.filter_map(|one| Some((one.engine, *one.figures.get(&quantity)?)));
        match quantity.better() {
            Better::Less => values.min_by(|one, other| one.1.total_cmp(&other.1)),
            // The first of equals, as with `min_by`.
            Better::More => values.min_by(|one, other| other.1.total_cmp(&one.1)),
            Better::Neither => None,
        }
    }

    /// Samepage's figure over the best of kernel KSM's, unless that is zero.
    pub fn ratio(&self, quantity: Quantity) -> Option<f64> {
        let ours = self.figure(Engine::Samepage, quantity)?;
        let (_, best) = self.best_ksm(quantity)?;
        (best > 0.0).then(|| ours / best)
    }

    /// Whether `arm` is one of its columns.
    pub fn is_of(&self, arm: &Arm) -> bool {
        let same = (arm.workload, arm.thp, arm.fleet, arm.memory_limit_bytes);
        (self.workload, self.thp, self.fleet, self.memory_limit_bytes) == same
    }

    /// What it compares, in words.
    pub fn title(&self) -> String {
        let guests = match self.fleet {
            Fleet::Vms(vms) => format!("{vms} guests"),
            Fleet::UntilFull(most) => format!("guests until the limit, at most {most}"),
        };
        let limit = size(self.memory_limit_bytes);
        let (workload, thp) = (self.workload, self.thp);
        format!("{workload}: {guests}, limit {limit}, huge pages {thp}")
    }

    /// The same for the first cell of a row, where every word counts.
    pub fn short_title(&self) -> String {
        let limit = size(self.memory_limit_bytes);
        let guests = match self.fleet {
            Fleet::Vms(vms) => format!("{vms} guests"),
            Fleet::UntilFull(_) => format!("as many guests as {limit} take"),
        };
        let thp = match self.thp {
            Thp::Madvise => "",
            Thp::Always => ", huge pages always",
        };
        format!("{}, {guests}{thp}", self.workload)
    }

    /// Part of a file name that no other comparison of a report with one limit and fleet has.
    pub fn file_part(&self) -> String {
        let thp = match self.thp {
            Thp::Madvise => "",
            Thp::Always => "-thp-always",
        };
        // A storm knows no other fleet.
        let fleet = match self.fleet {
            Fleet::UntilFull(_) if self.workload != Workload::Storm => "-until-full",
            _ => "",
        };
        format!("{}{thp}{fleet}", self.workload)
    }
}

/// Bytes in the largest unit that leaves a number above one.
pub fn size(bytes: u64) -> String {
    let mib = mib(bytes);
    if mib >= 1024.0 {
        format!("{:.1} GiB", mib / 1024.0).replace(".0 ", " ")
    } else {
        format!("{mib:.0} MiB")
    }
}

fn comparison(runs: &[&Run]) -> Comparison {
    let arm = &runs[0].arm;
    let mut by_engine: BTreeMap<Engine, Vec<&Run>> = BTreeMap::new();
    for run in runs {
        by_engine.entry(run.arm.engine).or_default().push(run);
    }
    let columns = by_engine.iter();
    let mut columns: Vec<Column> = columns
        .map(|(engine, runs)| column(*engine, runs))
        .collect();
    against_off(&mut columns);
    Comparison {
        workload: arm.workload,
        thp: arm.thp,
        fleet: arm.fleet,
        memory_limit_bytes: arm.memory_limit_bytes,
        columns,
    }
}

fn column(engine: Engine, runs: &[&Run]) -> Column {
    let of_runs: Vec<Figures> = runs.iter().map(|run| figures(run)).collect();
    let guests = || runs.iter().flat_map(|run| &run.guests);
    let errors = runs.iter().flat_map(|run| run.errors.iter().cloned());
    let last = runs.last();
    Column {
        engine,
        runs: runs.len(),
        figures: medians(&of_runs),
        moments: last.map(|run| moments(run)).unwrap_or_default(),
        settings: last.map(|run| run.settings.clone()).unwrap_or_default(),
        refusals: counted(guests().filter_map(|guest| guest.refusal.as_deref())),
        ends: counted(guests().filter_map(|guest| Some(guest.ended.as_ref()?.1.as_str()))),
        errors: errors.collect(),
    }
}

fn medians(of_runs: &[Figures]) -> Figures {
    let mut found = Figures::new();
    for quantity in Quantity::ALL {
        let values = of_runs.iter().filter_map(|one| one.get(quantity).copied());
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        if let (Some(low), Some(high)) = (
            values.get(values.len().saturating_sub(1) / 2),
            values.get(values.len() / 2),
        ) {
            found.insert(*quantity, rounded((low + high) / 2.0));
        }
    }
    found
}

/// Figures that only exist beside those without merging.
fn against_off(columns: &mut [Column]) {
    let Some(off) = columns.iter().find(|column| column.engine == Engine::Off) else {
        return;
    };
    let off = off.figures.clone();
    for column in columns.iter_mut() {
        let own = column.figures.clone();
        let both = |quantity| Some((*own.get(&quantity)?, *off.get(&quantity)?));
        if let Some((ours, theirs)) = both(Quantity::RoundRate).filter(|(_, theirs)| *theirs > 0.0)
        {
            let progress = rounded(100.0 * ours / theirs);
            column.figures.insert(Quantity::Progress, progress);
        }
        if column.engine != Engine::Off
            && let Some((ours, theirs)) = both(Quantity::RestUsage)
        {
            let saved = rounded(100.0 * (1.0 - ours / theirs));
            column.figures.insert(Quantity::SavedOfOff, saved);
        }
        if column.engine != Engine::Off {
            leave_out_mapped_zeros(&mut column.figures, &off);
        }
    }
}

/// Takes pages of zeros off the ideal that guests did not touch. An engine that maps a block as a
/// whole has the kernel's zero page in it where its guest has nothing, and an oracle that reads guests
/// from outside cannot tell the one from the other. So a guest has as many of them as without merging.
fn leave_out_mapped_zeros(own: &mut Figures, off: &Figures) {
    let of = |figures: &Figures| {
        let quantities = [Quantity::Zeros, Quantity::Held].map(|it| figures.get(&it).copied());
        quantities[0].zip(quantities[1]).filter(|it| it.1 > 0.0)
    };
    let (Some((zeros, guests)), Some((off_zeros, off_guests))) = (of(own), of(off)) else {
        return;
    };
    let mapped = (zeros - off_zeros / off_guests * guests).max(0.0);
    let Some(&ideal) = own.get(&Quantity::Ideal) else {
        return;
    };
    let left = ideal - mapped;
    if left <= 0.0 {
        return;
    }
    own.insert(Quantity::Ideal, rounded(left));
    if let Some(share) = own.get_mut(&Quantity::ShareReached) {
        *share = rounded(*share * ideal / left);
    }
}

/// Six digits that count: more are noise, and would make the kept file longer.
fn rounded(value: f64) -> f64 {
    format!("{value:.5e}").parse().unwrap_or(value)
}

fn counted<'a>(reasons: impl Iterator<Item = &'a str>) -> BTreeMap<String, usize> {
    let mut found = BTreeMap::new();
    for reason in reasons {
        *found.entry(reason.to_owned()).or_default() += 1;
    }
    found
}

fn moments(run: &Run) -> Vec<Moment> {
    let own = run
        .marks
        .iter()
        .filter(|mark| ![LAST_READY, AT_REST, END].contains(&mark.name.as_str()));
    own.filter_map(|mark| {
        let until = |sample: &&Sample| sample.at_s <= mark.at_s;
        let sample = run.samples.iter().take_while(until).last()?;
        Some(Moment {
            name: mark.name.clone(),
            at_s: rounded(mark.at_s),
            usage_mib: rounded(mib(sample.memory.usage_bytes)),
        })
    })
    .collect()
}
