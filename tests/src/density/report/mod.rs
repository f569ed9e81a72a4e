//! What runs of the density benchmark found, for readers: figures, tables, plots and documents.
//!
//! Everything here is a function of the report, so that `density --from FILE` gives the same bytes
//! as the run itself did. Raw samples stay in the report. The repository keeps the figures alone,
//! in `docs/density/figures.json`, and a test holds the documents to them.
//!
//! | module | holds |
//! |---|---|
//! | [`quantity`] | names, units and directions of all figures |
//! | [`figures`] | from one run to its figures |
//! | [`summary`] | from a report to the figures of all engines, side by side |
//! | [`grid`] | tables, for a terminal and for Markdown |
//! | [`agreement`] | whether the benchmark's own numbers add up |
//! | [`mod@table`] | what a run prints at its end |
//! | [`mod@plots`] | the SVG files |
//! | [`mod@document`] | the generated parts of documents |
//! | [`parts`] | the text of each of these parts |

pub mod agreement;
pub mod document;
#[cfg(test)]
mod document_tests;
pub mod figures;
pub mod grid;
pub mod parts;
pub mod plots;
pub mod quantity;
pub mod summary;
#[cfg(test)]
mod synthetic;
pub mod table;
#[cfg(test)]
mod tests;

pub use agreement::disagreements;
pub use document::{DocumentError, check as check_document, document, documents};
pub use plots::plots;
pub use summary::Summary;
pub use table::table;
