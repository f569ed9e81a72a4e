//! Plots of lines: memory and CPU over time, latencies over quantiles.

use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

use super::Drawn;
use super::sheet::{Area, Caption, Entry, INK, MESH, Swatch, TEXT_PX, at_axis, colour, sheet};
use crate::density::model::{Engine, Run, Sample};
use crate::density::report::figures::{
    AT_REST, END, LAST_READY, end_s, mark, measured, merge_cpu_s, mib,
};
use crate::density::report::quantity::Quantity;
use crate::density::report::summary::Comparison;

/// Points of a line at most: more are not seen, and a file stays small.
const POINTS_MAX: usize = 240;
const LOWEST_LATENCY_US: f64 = 0.01;

type Point = (f64, f64);
type Plane<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

/// A line over time, with marks on it.
struct Line {
    engine: Engine,
    points: Vec<Point>,
    last_ready: Option<Point>,
    at_rest: Option<Point>,
    /// Moments that only this workload has.
    others: Vec<(String, Point)>,
}

/// Memory of the group over time.
pub(super) fn memory(target: &mut String, caption: Caption<'_>, runs: &[&Run]) -> Drawn<()> {
    let usage = |sample: &Sample| Some(mib(sample.memory.usage_bytes));
    let lines: Vec<Line> = last_of_each(runs).map(|run| line(run, &usage)).collect();
    over_time(target, caption, &lines, "MiB")
}

/// CPU that merging took so far, over time.
pub(super) fn cpu(target: &mut String, caption: Caption<'_>, runs: &[&Run]) -> Drawn<()> {
    let merging = last_of_each(runs).filter(|run| run.arm.engine != Engine::Off);
    let lines: Vec<Line> = merging
        .map(|run| {
            let so_far = |sample: &Sample| merge_cpu_s(run.arm.engine, sample);
            let before = run.samples.first().and_then(so_far).unwrap_or(0.0);
            line(run, &|sample| Some(so_far(sample)? - before))
        })
        .collect();
    over_time(target, caption, &lines, "CPU seconds")
}

/// Of each engine the last run, in the order of the engines.
fn last_of_each<'a>(runs: &'a [&Run]) -> impl Iterator<Item = &'a Run> {
    let mut engines: Vec<Engine> = runs.iter().map(|run| run.arm.engine).collect();
    engines.sort();
    engines.dedup();
    let last = |engine: Engine| runs.iter().rev().find(move |run| run.arm.engine == engine);
    engines.into_iter().filter_map(last).copied()
}

fn line(run: &Run, of: &dyn Fn(&Sample) -> Option<f64>) -> Line {
    let end = end_s(run);
    let points: Vec<Point> = measured(run)
        .iter()
        .filter_map(|sample| Some((sample.at_s, of(sample)?)))
        .collect();
    let at = |at_s: f64| {
        let behind = points.iter().find(|point| point.0 >= at_s);
        Some((at_s, behind.or(points.last())?.1))
    };
    let usual = [LAST_READY, AT_REST, END];
    let others = run.marks.iter();
    let others = others.filter(|mark| !usual.contains(&mark.name.as_str()) && mark.at_s <= end);
    Line {
        engine: run.arm.engine,
        last_ready: mark(run, LAST_READY).and_then(at),
        at_rest: mark(run, AT_REST).and_then(at),
        others: others
            .filter_map(|mark| Some((mark.name.clone(), at(mark.at_s)?)))
            .collect(),
        points: thinned(&points, POINTS_MAX),
    }
}

/// At most `most` of the points: of each stretch the highest one, so that peaks stay, and both ends.
fn thinned(points: &[Point], most: usize) -> Vec<Point> {
    if points.len() <= most {
        return points.to_vec();
    }
    let stretch = points.len().div_ceil(most - 2);
    let highest = |part: &[Point]| part.iter().copied().max_by(|a, b| a.1.total_cmp(&b.1));
    let mut kept: Vec<Point> = points.first().copied().into_iter().collect();
    kept.extend(points.chunks(stretch).filter_map(highest));
    kept.extend(points.last());
    kept.dedup();
    kept
}

fn over_time(target: &mut String, caption: Caption<'_>, lines: &[Line], unit: &str) -> Drawn<()> {
    let area = sheet(target, caption, &legend_of(lines))?;
    let all = || lines.iter().flat_map(|line| &line.points);
    let right = all().map(|point| point.0).fold(1.0, f64::max);
    let top = all().map(|point| point.1).fold(0.0, f64::max).max(0.01) * 1.05;
    let mut plane = ChartBuilder::on(&area)
        .x_label_area_size(42)
        .y_label_area_size(76)
        .build_cartesian_2d(0.0..right, 0.0..top)?;
    plane
        .configure_mesh()
        .axis_style(INK)
        .bold_line_style(MESH)
        .light_line_style(TRANSPARENT)
        .label_style(("sans-serif", TEXT_PX).into_font().color(&INK))
        .x_desc("seconds since the first launch was asked for")
        .y_desc(unit)
        .y_label_formatter(&|value| at_axis(*value))
        .x_label_formatter(&|value| at_axis(*value))
        .draw()?;
    for line in lines {
        draw_line(&mut plane, line)?;
    }
    drop(plane);
    area.present()
}

fn legend_of(lines: &[Line]) -> Vec<Entry> {
    let entries = lines.iter().map(|line| Entry {
        label: line.engine.to_string(),
        colour: colour(line.engine),
        swatch: Swatch::Line,
    });
    let mut legend: Vec<Entry> = entries.collect();
    let mut mark = |label: &str, swatch: Swatch, is_there: bool| {
        if is_there {
            legend.push(Entry {
                label: label.to_owned(),
                colour: INK,
                swatch,
            });
        }
    };
    let any = |has: fn(&Line) -> bool| lines.iter().any(has);
    let is_ready = any(|line| line.last_ready.is_some());
    mark("last guest ready", Swatch::Triangle, is_ready);
    mark(
        "at rest",
        Swatch::Circle,
        any(|line| line.at_rest.is_some()),
    );
    let mut names: Vec<&str> = Vec::new();
    for (name, _) in lines.iter().flat_map(|line| &line.others) {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    mark(&names.join(", "), Swatch::Cross, !names.is_empty());
    legend
}

fn draw_line(plane: &mut Plane<'_, '_>, line: &Line) -> Drawn<()> {
    let colour = colour(line.engine);
    let width = if line.engine == Engine::Samepage {
        3
    } else {
        2
    };
    let points = line.points.iter().copied();
    plane.draw_series(LineSeries::new(points, colour.stroke_width(width)))?;
    let ready = line.last_ready.iter();
    plane.draw_series(ready.map(|point| TriangleMarker::new(*point, 7, colour.filled())))?;
    let rest = line.at_rest.iter();
    plane.draw_series(rest.map(|point| Circle::new(*point, 5, colour.filled())))?;
    let others = line.others.iter();
    plane.draw_series(others.map(|(_, point)| Cross::new(*point, 5, INK.stroke_width(2))))?;
    Ok(())
}

/// Latencies of the probe's writes to shared pages, and of its exits to the monitor, over quantiles.
pub(super) fn latency(
    target: &mut String,
    caption: Caption<'_>,
    comparison: &Comparison,
) -> Drawn<()> {
    let entries = comparison.columns.iter().map(|column| Entry {
        label: column.engine.to_string(),
        colour: colour(column.engine),
        swatch: Swatch::Line,
    });
    let mut legend: Vec<Entry> = entries.collect();
    for (label, swatch) in [("shared pages", Swatch::Circle), ("exits", Swatch::Dashes)] {
        legend.push(Entry {
            label: label.to_owned(),
            colour: INK,
            swatch,
        });
    }
    let area = sheet(target, caption, &legend)?;
    draw_latencies(&area, comparison)?;
    area.present()
}

fn draw_latencies(area: &Area<'_>, comparison: &Comparison) -> Drawn<()> {
    use Quantity::{ExitMax, ExitP50, ExitP99, ExitP999};
    use Quantity::{SharedMax, SharedP50, SharedP99, SharedP999};
    let shared = [SharedP50, SharedP99, SharedP999, SharedMax];
    let exits = [ExitP50, ExitP99, ExitP999, ExitMax];
    let values = |engine: Engine, quantities: [Quantity; 4]| -> Vec<Point> {
        let at = [0.0, 1.0, 2.0, 3.0].into_iter().zip(quantities);
        let found = at.filter_map(|(x, quantity)| Some((x, comparison.figure(engine, quantity)?)));
        found
            .map(|(x, us)| (x, us.max(LOWEST_LATENCY_US)))
            .collect()
    };
    let engines = || comparison.columns.iter().map(|column| column.engine);
    let all = engines().flat_map(|engine| [values(engine, shared), values(engine, exits)]);
    let all: Vec<f64> = all.flatten().map(|point| point.1).collect();
    let low = all.iter().copied().fold(1.0, f64::min) / 1.5;
    let high = all.iter().copied().fold(10.0, f64::max) * 1.5;
    let mut plane = ChartBuilder::on(area)
        .x_label_area_size(42)
        .y_label_area_size(76)
        .build_cartesian_2d(-0.2..3.2, (low..high).log_scale())?;
    let names = ["p50", "p99", "p99.9", "most"];
    plane
        .configure_mesh()
        .axis_style(INK)
        .bold_line_style(MESH)
        .light_line_style(TRANSPARENT)
        .disable_x_mesh()
        .x_labels(4)
        .label_style(("sans-serif", TEXT_PX).into_font().color(&INK))
        .x_desc("share of writes that took at most so long")
        .y_desc("us, logarithmic")
        .x_label_formatter(&|at| {
            let near = |index: &usize| (*index as f64 - at).abs() < 0.01;
            let index = (0..names.len()).find(near);
            index.map_or(String::new(), |index| names[index].to_owned())
        })
        .y_label_formatter(&|us| at_axis(*us))
        .draw()?;
    for engine in engines() {
        let colour = colour(engine);
        let points = values(engine, shared);
        let circles = points.iter();
        plane.draw_series(circles.map(|point| Circle::new(*point, 5, colour.filled())))?;
        plane.draw_series(LineSeries::new(points, colour.stroke_width(2)))?;
    }
    for engine in engines() {
        let points = values(engine, exits);
        let line = colour(engine).stroke_width(2);
        plane.draw_series(DashedLineSeries::new(points, 8, 8, line))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thinned_line_keeps_its_peak_and_its_ends() {
        let points: Vec<Point> = (0..5000)
            .map(|second| (f64::from(second), if second == 1234 { 9.0 } else { 1.0 }))
            .collect();
        let thin = thinned(&points, POINTS_MAX);
        assert!(thin.len() <= POINTS_MAX, "{}", thin.len());
        assert_eq!(thin.first(), points.first());
        assert_eq!(thin.last(), points.last());
        assert!(thin.contains(&(1234.0, 9.0)));
        assert!(thin.windows(2).all(|pair| pair[0].0 < pair[1].0));
        assert_eq!(thinned(&points[..3], POINTS_MAX), points[..3]);
    }
}
