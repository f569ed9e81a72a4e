//! What a run prints at its end.

use super::grid::Grid;
use super::summary::{Column, Summary};
use crate::density::model::Report;

/// A table for each workload and setting of huge pages: engines beside each other, one figure a
/// row. Below it stands what was refused, ended or went wrong.
pub fn table(report: &Report) -> String {
    let summary = Summary::new(report);
    let mut text = String::new();
    for comparison in &summary.comparisons {
        let grid = Grid::of_figures(comparison, |_| true);
        text += &format!("\n{}\n{}\n", comparison.title(), grid.terminal());
        for column in &comparison.columns {
            for line in incidents(column) {
                text += &format!("  {}: {line}\n", column.engine);
            }
        }
    }
    text
}

/// Refusals, ends and errors of one engine, a line each.
pub fn incidents(column: &Column) -> Vec<String> {
    let refused = column.refusals.iter();
    let refused = refused.map(|(why, guests)| format!("refused {guests}: {why}"));
    let ended = column.ends.iter();
    let ended = ended.map(|(why, guests)| format!("ended {guests}: {why}"));
    let wrong = column.errors.iter();
    let wrong = wrong.map(|error| format!("error: {error}"));
    refused.chain(ended).chain(wrong).collect()
}
