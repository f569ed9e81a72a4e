//! What all plots have: a white sheet with a title, a legend and a note of where it is from.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::Drawn;
use crate::density::model::Engine;
use crate::density::report::quantity::{Unit, number};

/// Where a plot is drawn.
pub(super) type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Size of all plots, in pixels.
const SIZE: (u32, u32) = (800, 440);
const MARGIN: i32 = 16;
const TITLE_PX: i32 = 15;
/// Size of all text but the title.
pub(super) const TEXT_PX: i32 = 13;
const ROW_PX: i32 = 22;
/// Colour of text and of marks: black on white is hard, this is dark enough.
pub(super) const INK: RGBColor = RGBColor(0x22, 0x22, 0x22);
const FAINT: RGBColor = RGBColor(0x66, 0x66, 0x66);
/// Colour of the lines behind the data.
pub(super) const MESH: RGBColor = RGBColor(0xdd, 0xdd, 0xdd);

/// What is written above a plot, and below it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Caption<'a> {
    pub(super) title: &'a str,
    pub(super) note: &'a str,
}

/// How the legend shows an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Swatch {
    Line,
    Dashes,
    Box,
    Triangle,
    Circle,
    Cross,
}

/// An entry of the legend.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) label: String,
    pub(super) colour: RGBColor,
    pub(super) swatch: Swatch,
}

/// The colour of an engine: of the palette by Okabe and Ito, which colour-blind people can tell
/// apart. The engine to be judged has the one that is farthest from the others.
pub(super) fn colour(engine: Engine) -> RGBColor {
    match engine {
        Engine::Off => RGBColor(0x77, 0x77, 0x77),
        Engine::KsmDefaults => RGBColor(0x56, 0xb4, 0xe9),
        Engine::KsmFast => RGBColor(0x00, 0x72, 0xb2),
        Engine::KsmAdvisor => RGBColor(0x00, 0x9e, 0x73),
        Engine::Samepage => RGBColor(0xd5, 0x5e, 0x00),
    }
}

/// A number at an axis: these are round, so zeros behind the point say nothing.
pub(super) fn at_axis(value: f64) -> String {
    let text = number(value, Unit::Seconds);
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

/// Text of the usual size at an anchor.
pub(super) fn text(horizontal: HPos, vertical: VPos) -> TextStyle<'static> {
    ("sans-serif", TEXT_PX)
        .into_font()
        .color(&INK)
        .pos(Pos::new(horizontal, vertical))
}

/// Draws the caption and the legend, and returns the area between them and the note.
pub(super) fn sheet<'a>(
    target: &'a mut String,
    caption: Caption<'_>,
    legend: &[Entry],
) -> Drawn<Area<'a>> {
    let root = SVGBackend::with_string(target, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let title = ("sans-serif", TITLE_PX).into_font().style(FontStyle::Bold);
    let title = title.color(&INK).pos(Pos::new(HPos::Left, VPos::Top));
    root.draw(&Text::new(caption.title.to_owned(), (MARGIN, 12), title))?;
    let legend_bottom = draw_legend(&root, legend)?;
    let (width, height) = root.dim_in_pixel();
    let right = i32::try_from(width).unwrap_or(i32::MAX) - MARGIN;
    let bottom = i32::try_from(height).unwrap_or(i32::MAX) - 8;
    let note = ("sans-serif", 11).into_font().color(&FAINT);
    let note = note.pos(Pos::new(HPos::Right, VPos::Bottom));
    root.draw(&Text::new(caption.note.to_owned(), (right, bottom), note))?;
    let below = root.margin(legend_bottom, 26, 4, MARGIN);
    Ok(below)
}

/// Draws the legend below the title, in as many rows as it needs, and returns where it ends.
fn draw_legend(root: &Area<'_>, legend: &[Entry]) -> Drawn<i32> {
    let (width, _) = root.dim_in_pixel();
    let right = i32::try_from(width).unwrap_or(i32::MAX) - MARGIN;
    let (mut x, mut y) = (MARGIN, 48);
    for entry in legend {
        let letters = i32::try_from(entry.label.chars().count()).unwrap_or(0);
        let entry_width = 30 + letters * 7 + 8;
        if x + entry_width > right && x > MARGIN {
            (x, y) = (MARGIN, y + ROW_PX);
        }
        draw_swatch(root, entry, (x, y))?;
        let style = text(HPos::Left, VPos::Center);
        root.draw(&Text::new(entry.label.clone(), (x + 30, y), style))?;
        x += entry_width;
    }
    Ok(y + ROW_PX)
}

fn draw_swatch(root: &Area<'_>, entry: &Entry, (x, y): (i32, i32)) -> Drawn<()> {
    let colour = entry.colour;
    let line = colour.stroke_width(3);
    match entry.swatch {
        Swatch::Line => root.draw(&PathElement::new([(x, y), (x + 24, y)], line)),
        Swatch::Dashes => {
            let dash = |from: i32| PathElement::new([(x + from, y), (x + from + 6, y)], line);
            [0, 9, 18]
                .iter()
                .try_for_each(|from| root.draw(&dash(*from)))
        }
        Swatch::Box => {
            let corners = [(x + 4, y - 7), (x + 20, y + 7)];
            root.draw(&Rectangle::new(corners, colour.filled()))
        }
        Swatch::Triangle => root.draw(&TriangleMarker::new((x + 14, y + 2), 6, colour.filled())),
        Swatch::Circle => root.draw(&Circle::new((x + 14, y), 5, colour.filled())),
        Swatch::Cross => root.draw(&Cross::new((x + 14, y), 5, colour.stroke_width(2))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_at_an_axis_have_no_zeros_behind_the_point() {
        let texts = [0.0, 0.25, 0.5, 2.0, 20.0, 100.0, 12_000.0].map(at_axis);
        assert_eq!(texts, ["0", "0.25", "0.5", "2", "20", "100", "12,000"]);
    }
}
