//! Plots of bars: memory at rest by kind, and figures of several workloads beside each other.

use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, VPos};

use super::Drawn;
use super::sheet::{
    Area, Caption, Entry, INK, MESH, Swatch, TEXT_PX, at_axis, colour, sheet, text,
};
use crate::density::model::{Engine, Fleet};
use crate::density::report::quantity::{Quantity, Unit, number};
use crate::density::report::summary::{Column, Comparison, size};

type Plane<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

/// Kinds of memory from the bottom of a bar to its top.
const KINDS: [(Quantity, &str, RGBColor); 4] = [
    (Quantity::RestAnon, "anonymous", RGBColor(0x00, 0x72, 0xb2)),
    (Quantity::RestShmem, "pool", RGBColor(0xe6, 0x9f, 0x00)),
    (Quantity::RestKernel, "kernel", RGBColor(0xcc, 0x79, 0xa7)),
    (Quantity::RestFile, "page cache", RGBColor(0x56, 0xb4, 0xe9)),
];
/// What the group holds beside these: memory that is charged and not yet of a kind.
const OTHER: (&str, RGBColor) = ("other", RGBColor(0xbb, 0xbb, 0xbb));

/// A filled part of a bar.
struct Part {
    colour: RGBColor,
    from: f64,
    to: f64,
}

/// Memory at rest by kind, a bar for each engine.
pub(super) fn rest(
    target: &mut String,
    caption: Caption<'_>,
    comparison: &Comparison,
) -> Drawn<()> {
    let rested = comparison.columns.iter();
    let rested = rested.filter(|column| column.figures.contains_key(&Quantity::RestUsage));
    let rested: Vec<&Column> = rested.collect();
    let bars: Vec<Vec<Part>> = rested.iter().map(|column| parts(column)).collect();
    let kinds = KINDS.iter().map(|(_, label, colour)| (*label, *colour));
    let is_used = |colour: RGBColor| bars.iter().flatten().any(|part| part.colour == colour);
    let shown = kinds.chain([OTHER]).filter(|(_, colour)| is_used(*colour));
    let legend: Vec<Entry> = shown
        .map(|(label, colour)| Entry {
            label: label.to_owned(),
            colour,
            swatch: Swatch::Box,
        })
        .collect();
    let area = sheet(target, caption, &legend)?;
    let tops = bars.iter().flatten().map(|part| part.to);
    let mut plane = plane(&area, rested.len() as f64, tops.fold(1.0, f64::max), "MiB")?;
    for (index, (column, bar)) in rested.iter().zip(&bars).enumerate() {
        let left = index as f64;
        for part in bar {
            let corners = [(left + 0.2, part.from), (left + 0.8, part.to)];
            plane.draw_series([Rectangle::new(corners, part.colour.filled())])?;
        }
        let top = bar.last().map_or(0.0, |part| part.to);
        let total = number(top, Unit::Mib);
        above(&plane, &area, (left + 0.5, top), &total)?;
        below(&plane, &area, left + 0.5, &[column.engine.to_string()])?;
    }
    drop(plane);
    area.present()
}

fn parts(column: &Column) -> Vec<Part> {
    let figure = |quantity: &Quantity| column.figures.get(quantity).copied();
    let mut found = Vec::new();
    let mut from = 0.0;
    for (quantity, _, colour) in &KINDS {
        if let Some(mib) = figure(quantity).filter(|mib| *mib > 0.0) {
            found.push(Part {
                colour: *colour,
                from,
                to: from + mib,
            });
            from += mib;
        }
    }
    let usage = figure(&Quantity::RestUsage).unwrap_or(0.0);
    if usage > from {
        found.push(Part {
            colour: OTHER.1,
            from,
            to: usage,
        });
    }
    found
}

/// One figure: comparisons beside each other, and in each a bar for each engine.
pub(super) fn by_workload(
    target: &mut String,
    caption: Caption<'_>,
    comparisons: &[&Comparison],
    quantity: Quantity,
) -> Drawn<()> {
    let columns = || comparisons.iter().flat_map(|one| &one.columns);
    let mut engines: Vec<Engine> = columns()
        .filter(|column| column.figures.contains_key(&quantity))
        .map(|column| column.engine)
        .collect();
    engines.sort();
    engines.dedup();
    let legend: Vec<Entry> = engines
        .iter()
        .map(|engine| Entry {
            label: engine.to_string(),
            colour: colour(*engine),
            swatch: Swatch::Box,
        })
        .collect();
    let area = sheet(target, caption, &legend)?;
    let values = columns().filter_map(|column| column.figures.get(&quantity).copied());
    let top = values.fold(1.0, f64::max);
    let width = 0.84 / engines.len().max(1) as f64;
    let what = match quantity.unit() {
        Unit::Percent => "%",
        _ => "guests",
    };
    let mut plane = plane(&area, comparisons.len() as f64, top, what)?;
    for (index, comparison) in comparisons.iter().enumerate() {
        for (place, engine) in engines.iter().enumerate() {
            let Some(value) = comparison.figure(*engine, quantity) else {
                continue;
            };
            let left = index as f64 + 0.08 + place as f64 * width;
            let corners = [(left, 0.0), (left + width * 0.92, value)];
            plane.draw_series([Rectangle::new(corners, colour(*engine).filled())])?;
            let label = format!("{value:.0}");
            above(&plane, &area, (left + width * 0.46, value), &label)?;
        }
        let names = group_names(comparison);
        below(&plane, &area, index as f64 + 0.5, &names)?;
    }
    drop(plane);
    area.present()
}

/// What stands below the bars of a comparison, a line each.
fn group_names(comparison: &Comparison) -> [String; 2] {
    let fleet = match comparison.fleet {
        Fleet::Vms(vms) => format!("{vms}, "),
        Fleet::UntilFull(_) => format!("{}, ", size(comparison.memory_limit_bytes)),
    };
    let second = format!("{fleet}THP {}", comparison.thp);
    [comparison.workload.to_string(), second]
}

/// Axes for `groups` groups of bars of up to `top`, without names of the groups.
fn plane<'a, 'b>(area: &'a Area<'b>, groups: f64, top: f64, unit: &str) -> Drawn<Plane<'a, 'b>> {
    let mut plane = ChartBuilder::on(area)
        .x_label_area_size(42)
        .y_label_area_size(76)
        .build_cartesian_2d(0.0..groups, 0.0..top * 1.1)?;
    plane
        .configure_mesh()
        .axis_style(INK)
        .bold_line_style(MESH)
        .light_line_style(TRANSPARENT)
        .disable_x_mesh()
        .x_labels(0)
        .label_style(("sans-serif", TEXT_PX).into_font().color(&INK))
        .y_desc(unit)
        .y_label_formatter(&|value| at_axis(*value))
        .draw()?;
    Ok(plane)
}

fn above(plane: &Plane<'_, '_>, area: &Area<'_>, at: (f64, f64), label: &str) -> Drawn<()> {
    let (x, y) = pixel(plane, area, at);
    let style = text(HPos::Center, VPos::Bottom);
    area.draw(&Text::new(label.to_owned(), (x, y - 3), style))
}

fn below(plane: &Plane<'_, '_>, area: &Area<'_>, at: f64, lines: &[String]) -> Drawn<()> {
    let (x, y) = pixel(plane, area, (at, 0.0));
    for (row, line) in (0..).zip(lines) {
        let style = text(HPos::Center, VPos::Top);
        area.draw(&Text::new(line.clone(), (x, y + 6 + 16 * row), style))?;
    }
    Ok(())
}

/// Where a point of the plane is in the area that the plane is on.
fn pixel(plane: &Plane<'_, '_>, area: &Area<'_>, at: (f64, f64)) -> (i32, i32) {
    let (x, y) = plane.plotting_area().map_coordinate(&at);
    let (left, top) = area.get_base_pixel();
    (x - left, y - top)
}
