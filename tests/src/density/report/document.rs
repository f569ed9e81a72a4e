//! Documents whose figures a run wrote: prose is by hand, what stands between two markers is not.
//!
//! A part begins with a line `<!-- density: NAME -->` and ends with a line `<!-- /density -->`. Its
//! text is made from the summary in `docs/density/figures.json` alone, so that a test can hold the
//! documents to it. Without that file a part says that there is no run.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::parts::{NO_RUN, Part};
use super::plots::plots;
use super::summary::{Comparison, Summary};
use crate::density::model::{Arm, Report, Workload};

/// The file of figures, from the root of the repository.
pub const FIGURES: &str = "docs/density/figures.json";
/// The directory of plots, from the root of the repository.
pub const PLOTS: &str = "docs/density";

/// The documents with generated parts, from the root of the repository.
const DOCUMENTS: [&str; 3] = ["docs/density.md", "README.md", "SPECIFICATION.md"];
const BEGIN: &str = "<!-- density: ";
const BEGIN_END: &str = " -->";
const END: &str = "<!-- /density -->";

/// Why a document could not be made.
#[derive(Debug, Error)]
pub enum DocumentError {
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file of figures is not one.
    #[error("{}: not a summary of the density benchmark: {source}", path.display())]
    Figures {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// The figures that are kept would be lost.
    #[error(
        "{}: has figures of runs that this one lacks: {}; make all of them, or remove the file",
        path.display(),
        lacking.join("; ")
    )]
    Lacking {
        /// The file of figures.
        path: PathBuf,
        /// What it has and the run lacks.
        lacking: Vec<String>,
    },
    /// A marker names no part that there is.
    #[error("{document}:{line}: no part is called {name:?}; parts are {}", names().join(", "))]
    UnknownPart {
        /// Name of the document.
        document: String,
        /// The line, from 1.
        line: usize,
        /// What the marker says.
        name: String,
    },
    /// A part that the document must have is missing.
    #[error("{document}: the marker `{BEGIN}{part}{BEGIN_END}` is missing")]
    MissingPart {
        /// Name of the document.
        document: String,
        /// The part.
        part: Part,
    },
    /// A part stands there twice.
    #[error("{document}:{line}: the part {part} is there already")]
    PartTwice {
        /// Name of the document.
        document: String,
        /// The line, from 1.
        line: usize,
        /// The part.
        part: Part,
    },
    /// A part does not end before the next one or the end of the file.
    #[error("{document}:{line}: the part {part} has no end, `{END}`")]
    Unclosed {
        /// Name of the document.
        document: String,
        /// The line of its begin, from 1.
        line: usize,
        /// The part.
        part: Part,
    },
    /// An end of no part.
    #[error("{document}:{line}: `{END}` ends no part")]
    StrayEnd {
        /// Name of the document.
        document: String,
        /// The line, from 1.
        line: usize,
    },
}

/// Writes the generated parts of the document at `path` from `report`. A directory is taken for
/// the root of the repository, whose [`documents`] are written then.
///
/// # Errors
/// If the file cannot be read or written, if its markers are not those that a document of this name
/// must have, or if kept figures would be lost. The file is unchanged then.
pub fn document(report: &Report, path: &Path) -> Result<(), DocumentError> {
    if path.is_dir() {
        documents(report, path)?;
        return Ok(());
    }
    let summary = Summary::new(report);
    let text = rendered(&read(path)?, &name_of(path), Some(&summary))?;
    write(path, &text)
}

/// Finds out whether [`document()`] will be able to write the document at `path` from a run of `arms`,
/// before an hour is spent on it.
///
/// # Errors
/// As that.
pub fn check(arms: &[Arm], path: &Path) -> Result<(), DocumentError> {
    if !path.is_dir() {
        return rendered(&read(path)?, &name_of(path), None).map(drop);
    }
    outdated(path)?;
    keep_all(path, |kept| arms.iter().any(|arm| kept.is_of(arm)))
}

/// Refuses to replace the figures that the repository at `root` keeps by those of fewer comparisons:
/// an interrupted run would take the place of a whole one.
fn keep_all(root: &Path, has: impl Fn(&Comparison) -> bool) -> Result<(), DocumentError> {
    let Some(summary) = kept(root)? else {
        return Ok(());
    };
    let lacking = summary.comparisons.iter().filter(|one| !has(one));
    let lacking: Vec<String> = lacking.map(Comparison::short_title).collect();
    match lacking.is_empty() {
        true => Ok(()),
        false => Err(DocumentError::Lacking {
            path: root.join(FIGURES),
            lacking,
        }),
    }
}

/// Writes all that the repository at `root` keeps of `report`: figures, plots, and the generated
/// parts of its documents. Plots of an earlier run go. Returns the files.
///
/// # Errors
/// As [`document()`]; no document is written if one of them cannot be made.
pub fn documents(report: &Report, root: &Path) -> Result<Vec<PathBuf>, DocumentError> {
    let summary = Summary::new(report);
    keep_all(root, |kept| {
        report.runs.iter().any(|run| kept.is_of(&run.arm))
    })?;
    let mut texts = Vec::new();
    for document in DOCUMENTS {
        let path = root.join(document);
        let text = rendered(&read(&path)?, &name_of(&path), Some(&summary))?;
        texts.push((path, text));
    }
    let directory = root.join(PLOTS);
    let file_error = |source| DocumentError::File {
        path: directory.clone(),
        source,
    };
    let mut written = plots(report, &directory).map_err(file_error)?;
    for entry in fs::read_dir(&directory).map_err(file_error)? {
        let path = entry.map_err(file_error)?.path();
        let is_plot = path.extension().is_some_and(|ending| ending == "svg");
        if is_plot && !written.contains(&path) {
            fs::remove_file(&path).map_err(file_error)?;
        }
    }
    let figures = root.join(FIGURES);
    write(&figures, &figures_text(&summary, &figures)?)?;
    written.push(figures);
    for (path, text) in texts {
        write(&path, &text)?;
        written.push(path);
    }
    Ok(written)
}

/// The documents of the repository at `root` whose generated parts are not those of its figures.
///
/// # Errors
/// If a file cannot be read, or if a document's markers are not those that it must have.
pub fn outdated(root: &Path) -> Result<Vec<&'static str>, DocumentError> {
    let summary = kept(root)?;
    let mut found = Vec::new();
    for document in DOCUMENTS {
        let path = root.join(document);
        let text = read(&path)?;
        if rendered(&text, &name_of(&path), summary.as_ref())? != text {
            found.push(document);
        }
    }
    Ok(found)
}

/// The figures that the repository at `root` keeps; none if it keeps none yet.
///
/// # Errors
/// If the file is there and is no summary.
pub fn kept(root: &Path) -> Result<Option<Summary>, DocumentError> {
    let path = root.join(FIGURES);
    if !path.exists() {
        return Ok(None);
    }
    let summary = serde_json::from_str(&read(&path)?);
    let summary = summary.map_err(|source| DocumentError::Figures { path, source })?;
    Ok(Some(summary))
}

/// The text of a document with its parts replaced. `document` is the file's name.
///
/// # Errors
/// If a marker is unknown, missing, there twice, or without its end.
pub fn rendered(
    text: &str,
    document: &str,
    summary: Option<&Summary>,
) -> Result<String, DocumentError> {
    let mut made = String::new();
    let mut found: Vec<Part> = Vec::new();
    let mut open: Option<(usize, Part)> = None;
    for (index, line) in text.lines().enumerate() {
        let number = index + 1;
        let document = || document.to_owned();
        if line.trim() == END {
            let Some((_, part)) = open.take() else {
                let document = document();
                let line = number;
                return Err(DocumentError::StrayEnd { document, line });
            };
            made += &part_text(part, summary);
        }
        if let Some(name) = marker(line) {
            let part = begun(name, number, &document(), &found)?;
            if let Some((line, part)) = open {
                let document = document();
                return Err(DocumentError::Unclosed {
                    document,
                    line,
                    part,
                });
            }
            found.push(part);
            open = Some((number, part));
            made += &format!("{line}\n");
        } else if open.is_none() {
            made += &format!("{line}\n");
        }
    }
    let document = document.to_owned();
    if let Some((line, part)) = open {
        return Err(DocumentError::Unclosed {
            document,
            line,
            part,
        });
    }
    let required = required(&document);
    match required.into_iter().find(|part| !found.contains(part)) {
        Some(part) => Err(DocumentError::MissingPart { document, part }),
        None => Ok(made),
    }
}

/// The part that a marker names, if it may begin there.
fn begun(name: &str, line: usize, document: &str, before: &[Part]) -> Result<Part, DocumentError> {
    let document = document.to_owned();
    let Some(part) = Part::all()
        .into_iter()
        .find(|part| part.to_string() == name)
    else {
        let name = name.to_owned();
        return Err(DocumentError::UnknownPart {
            document,
            line,
            name,
        });
    };
    if before.contains(&part) {
        return Err(DocumentError::PartTwice {
            document,
            line,
            part,
        });
    }
    Ok(part)
}

fn part_text(part: Part, summary: Option<&Summary>) -> String {
    let text = match summary {
        Some(summary) => part.text(summary),
        None => NO_RUN.to_owned(),
    };
    // Markdown takes what follows a comment's line for part of the comment's block.
    format!("\n{}\n\n", text.trim())
}

fn marker(line: &str) -> Option<&str> {
    line.trim().strip_prefix(BEGIN)?.strip_suffix(BEGIN_END)
}

/// The parts that a document of this name must have.
fn required(document: &str) -> Vec<Part> {
    match document {
        "README.md" => vec![Part::Headline],
        "SPECIFICATION.md" => vec![Part::Specification],
        "density.md" => {
            let results = Workload::ALL.into_iter().map(Part::Results);
            [Part::Run, Part::Settings, Part::Held, Part::Sharing]
                .into_iter()
                .chain(results)
                .collect()
        }
        _ => Vec::new(),
    }
}

fn names() -> Vec<String> {
    Part::all().iter().map(ToString::to_string).collect()
}

fn name_of(path: &Path) -> String {
    let name = path.file_name().unwrap_or(path.as_os_str());
    name.to_string_lossy().into_owned()
}

fn figures_text(summary: &Summary, path: &Path) -> Result<String, DocumentError> {
    let text = serde_json::to_string_pretty(summary);
    let text = text.map_err(|source| DocumentError::Figures {
        path: path.to_owned(),
        source,
    })?;
    Ok(text + "\n")
}

fn read(path: &Path) -> Result<String, DocumentError> {
    fs::read_to_string(path).map_err(|source| DocumentError::File {
        path: path.to_owned(),
        source,
    })
}

fn write(path: &Path, text: &str) -> Result<(), DocumentError> {
    fs::write(path, text).map_err(|source| DocumentError::File {
        path: path.to_owned(),
        source,
    })
}
