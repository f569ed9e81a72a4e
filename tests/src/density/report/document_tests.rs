//! A made-up report in the documents of this repository.

use std::fs;

use super::document::{DocumentError, FIGURES, check, document, documents, outdated, rendered};
use super::parts::{NO_RUN, Part};
use super::summary::Summary;
use super::synthetic::report;
use crate::density::model::{Arm, Report, Workload};

/// A repository with the documents of this one.
fn repository() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    fs::create_dir_all(root.path().join("docs/density")).unwrap();
    let ours = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    for document in ["docs/density.md", "README.md", "SPECIFICATION.md"] {
        let text = fs::read_to_string(format!("{ours}/{document}")).unwrap();
        fs::write(root.path().join(document), text).unwrap();
    }
    root
}

#[test]
fn documents_agree_with_the_figures_that_are_kept() {
    let root = repository();
    let report = report();
    let stale = root.path().join("docs/density/stale.svg");
    fs::write(&stale, "").unwrap();
    let written = documents(&report, root.path()).unwrap();
    assert!(!stale.exists());
    assert!(written.contains(&root.path().join(FIGURES)));
    assert!(outdated(root.path()).unwrap().is_empty());
    let path = root.path().join("docs/density.md");
    let text = fs::read_to_string(&path).unwrap();
    let links = text.lines().filter_map(|line| line.strip_prefix("!["));
    let links: Vec<&str> = links
        .filter_map(|link| link.split(['(', ')']).nth(1))
        .collect();
    assert!(links.len() > 20);
    for link in links {
        assert!(root.path().join("docs").join(link).exists(), "{link}");
    }
    // A figure that somebody changed by hand is noticed.
    fs::write(
        &path,
        text.replacen("| memory of the group at rest, MiB", "| memory", 1),
    )
    .unwrap();
    assert_eq!(outdated(root.path()).unwrap(), ["docs/density.md"]);
    document(&report, root.path()).unwrap();
    assert!(outdated(root.path()).unwrap().is_empty());
}

#[test]
fn fewer_runs_do_not_take_the_place_of_more() {
    let root = repository();
    let report = report();
    documents(&report, root.path()).unwrap();
    let files = || {
        let plots = fs::read_dir(root.path().join("docs/density")).unwrap();
        (plots.count(), fs::read(root.path().join(FIGURES)).unwrap())
    };
    let before = files();
    let some = report
        .runs
        .iter()
        .filter(|run| run.arm.workload != Workload::Idle);
    for runs in [Vec::new(), some.cloned().collect::<Vec<_>>()] {
        let arms: Vec<Arm> = runs.iter().map(|run| run.arm).collect();
        let fewer = Report {
            runs,
            ..report.clone()
        };
        let refused = [
            documents(&fewer, root.path()).map(drop).unwrap_err(),
            check(&arms, root.path()).unwrap_err(),
        ];
        for error in refused {
            assert!(error.to_string().contains("idle"), "{error}");
        }
        assert!(files() == before);
    }
    let arms: Vec<Arm> = report.runs.iter().map(|run| run.arm).collect();
    check(&arms, root.path()).unwrap();
    check(&arms, &root.path().join("none.md")).unwrap_err();
}

#[test]
fn without_a_run_documents_say_so() {
    let root = repository();
    for name in ["README.md", "SPECIFICATION.md", "density.md"] {
        let below = if name == "density.md" {
            "docs/density.md"
        } else {
            name
        };
        let text = fs::read_to_string(root.path().join(below)).unwrap();
        let made = rendered(&text, name, None).unwrap();
        assert!(made.contains(NO_RUN), "{made}");
        assert!(!made.contains("density/memory-"), "{made}");
    }
}

#[test]
fn every_part_has_a_text_also_of_an_empty_report() {
    let empty = Report {
        runs: Vec::new(),
        ..report()
    };
    for part in Part::all() {
        assert!(
            !part.text(&Summary::new(&report())).trim().is_empty(),
            "{part}"
        );
        assert!(
            !part.text(&Summary::new(&empty)).trim().is_empty(),
            "{part}"
        );
    }
}

#[test]
fn lines_of_a_part_are_short_enough_for_a_document() {
    let summary = Summary::new(&report());
    for part in Part::all() {
        let text = part.text(&summary);
        let is_free = |line: &&str| line.starts_with('|') || line.starts_with("    ");
        let long = text.lines().filter(|line| !is_free(line));
        let long = long
            .max_by_key(|line| line.chars().count())
            .unwrap_or_default();
        assert!(long.chars().count() <= 120, "{part}: {long}");
    }
}

fn problem(text: &str, document: &str) -> String {
    let summary = Summary::new(&report());
    rendered(text, document, Some(&summary))
        .unwrap_err()
        .to_string()
}

#[test]
fn wrong_markers_are_named() {
    let run = "<!-- density: run -->\n";
    let end = "<!-- /density -->\n";
    assert!(problem("a\n<!-- density: rum -->\n", "x.md").starts_with("x.md:2: no part is called"));
    let twice = problem(&format!("{run}{end}{run}{end}"), "x.md");
    assert_eq!(twice, "x.md:3: the part run is there already");
    let unclosed = problem(run, "x.md");
    assert_eq!(
        unclosed,
        "x.md:1: the part run has no end, `<!-- /density -->`"
    );
    let nested = problem(&format!("{run}<!-- density: held -->\n{end}"), "x.md");
    assert_eq!(nested, unclosed);
    assert_eq!(
        problem(end, "x.md"),
        "x.md:1: `<!-- /density -->` ends no part"
    );
    let missing = problem("text\n", "README.md");
    assert_eq!(
        missing,
        "README.md: the marker `<!-- density: headline -->` is missing"
    );
}

#[test]
fn a_document_with_wrong_markers_stays_as_it_is() {
    let root = repository();
    let readme = root.path().join("README.md");
    fs::write(&readme, "no marker\n").unwrap();
    let density = fs::read_to_string(root.path().join("docs/density.md")).unwrap();
    let error = documents(&report(), root.path()).unwrap_err();
    assert!(
        matches!(error, DocumentError::MissingPart { .. }),
        "{error}"
    );
    let after = fs::read_to_string(root.path().join("docs/density.md")).unwrap();
    assert_eq!(after, density);
    assert!(!root.path().join(FIGURES).exists());
}
