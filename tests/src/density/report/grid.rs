//! Tables: cells and their two dresses, for a terminal and for Markdown.

use comfy_table::{CellAlignment, LineStyle, Table, TableStyle, presets};

use super::quantity::{Quantity, number};
use super::summary::{Comparison, Moment};
use crate::density::model::Engine;

/// A table with a head.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grid {
    /// Names of the columns.
    pub head: Vec<String>,
    /// The rows, each with a cell for each column.
    pub rows: Vec<Vec<String>>,
    /// Whether all columns but the first hold numbers, which are aligned to the right.
    pub is_of_numbers: bool,
}

/// What stands where there is no figure.
const NONE: &str = "-";

impl Grid {
    /// The figures of `comparison` that `which` chooses: engines beside each other, then the ratio
    /// of Samepage's to the best of kernel KSM's.
    pub fn of_figures(comparison: &Comparison, which: impl Fn(Quantity) -> bool) -> Grid {
        let is_there = |quantity: &Quantity| {
            let mut columns = comparison.columns.iter();
            which(*quantity) && columns.any(|column| column.figures.contains_key(quantity))
        };
        let quantities = Quantity::ALL.iter().copied().filter(is_there);
        let mut rows: Vec<Vec<String>> = quantities
            .map(|quantity| figure_row(comparison, quantity))
            .collect();
        rows.extend(moment_rows(comparison));
        let mut head = vec![comparison.workload.to_string()];
        head.extend(columns(comparison).iter().map(Place::name));
        Grid::of_numbers(head, rows)
    }

    /// A table of words.
    pub fn of_words(head: &[&str], rows: Vec<Vec<String>>) -> Grid {
        let head = head.iter().map(|&name| name.to_owned()).collect();
        Grid {
            head,
            rows,
            is_of_numbers: false,
        }
    }

    /// A table of numbers, beside a first column of words.
    pub fn of_numbers(head: Vec<String>, rows: Vec<Vec<String>>) -> Grid {
        Grid {
            head,
            rows,
            is_of_numbers: true,
        }
    }

    /// For a terminal.
    pub fn terminal(&self) -> String {
        self.drawn(presets::UTF8_HORIZONTAL_ONLY.row_separator(LineStyle::none()))
    }

    /// For a document.
    pub fn markdown(&self) -> String {
        self.drawn(presets::ASCII_MARKDOWN)
    }

    fn drawn(&self, style: TableStyle) -> String {
        let is_markdown = style == presets::ASCII_MARKDOWN;
        let cell = |text: &String| match is_markdown {
            true => text.replace('|', "\\|").replace('\n', " "),
            false => text.clone(),
        };
        let mut table = Table::new();
        table.load_style(style);
        table.set_header(self.head.iter().map(cell));
        for row in &self.rows {
            table.add_row(row.iter().map(cell));
        }
        if self.is_of_numbers {
            for column in table.column_iter_mut().skip(1) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        let lines = table.lines().map(|line| line.trim_end().to_owned());
        let mut lines: Vec<String> = lines.collect();
        if let Some(rule) = lines
            .get_mut(1)
            .filter(|_| is_markdown && self.is_of_numbers)
        {
            *rule = right_aligned(rule);
        }
        lines.join("\n")
    }
}

/// The line below a Markdown table's head, with all columns but the first aligned to the right.
fn right_aligned(rule: &str) -> String {
    let Some((first, others)) = rule.trim_start_matches('|').split_once('|') else {
        return rule.to_owned();
    };
    format!("|{first}|{}", others.replace("-|", ":|"))
}

/// A column of a table of figures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Of(Engine),
    BestKsm,
    Ratio,
}

impl Place {
    fn name(&self) -> String {
        match self {
            Place::Of(engine) => engine.to_string(),
            Place::BestKsm => "best KSM".to_owned(),
            Place::Ratio => "samepage / best KSM".to_owned(),
        }
    }
}

/// The engines that took part; with kernel KSM its best, which stands beside Samepage.
fn columns(comparison: &Comparison) -> Vec<Place> {
    let engines = comparison.columns.iter().map(|column| column.engine);
    let has_ksm = engines.clone().any(Engine::is_ksm);
    let has_ours = engines.clone().any(|engine| engine == Engine::Samepage);
    let mut found: Vec<Place> = engines
        .filter(|engine| *engine != Engine::Samepage)
        .map(Place::Of)
        .collect();
    if has_ksm {
        found.push(Place::BestKsm);
    }
    if has_ours {
        found.push(Place::Of(Engine::Samepage));
    }
    if has_ksm && has_ours {
        found.push(Place::Ratio);
    }
    found
}

fn figure_row(comparison: &Comparison, quantity: Quantity) -> Vec<String> {
    let value = |found: Option<f64>| match found {
        Some(found) => number(found, quantity.unit()),
        None => NONE.to_owned(),
    };
    let mut row = vec![quantity.label()];
    row.extend(columns(comparison).into_iter().map(|place| match place {
        Place::Of(engine) => value(comparison.figure(engine, quantity)),
        Place::BestKsm => best_ksm(comparison, quantity),
        Place::Ratio => match comparison.ratio(quantity) {
            Some(ratio) => format!("{ratio:.2}"),
            None => NONE.to_owned(),
        },
    }));
    row
}

/// The best figure of kernel KSM, with the name of its arm.
pub fn best_ksm(comparison: &Comparison, quantity: Quantity) -> String {
    match comparison.best_ksm(quantity) {
        Some((engine, best)) => {
            let name = engine.to_string();
            let arm = name.trim_start_matches("ksm-");
            format!("{} ({arm})", number(best, quantity.unit()))
        }
        None => NONE.to_owned(),
    }
}

/// Memory at the moments that only this workload has. Engines pass them at different times.
fn moment_rows(comparison: &Comparison) -> Vec<Vec<String>> {
    let all = comparison.columns.iter().flat_map(|column| &column.moments);
    let mut names: Vec<&str> = Vec::new();
    for moment in all {
        if !names.contains(&moment.name.as_str()) {
            names.push(&moment.name);
        }
    }
    let at = |engine: Engine, name: &str| -> Option<&Moment> {
        let moments = &comparison.column(engine)?.moments;
        moments.iter().find(|moment| moment.name == name)
    };
    let row = |name: &&str| {
        let mut row = vec![format!("memory at \"{name}\", MiB")];
        row.extend(columns(comparison).into_iter().map(|place| match place {
            Place::Of(engine) => match at(engine, name) {
                Some(moment) => number(moment.usage_mib, super::quantity::Unit::Mib),
                None => NONE.to_owned(),
            },
            Place::BestKsm | Place::Ratio => NONE.to_owned(),
        }));
        row
    };
    names.iter().map(row).collect()
}
