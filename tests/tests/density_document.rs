//! The density benchmark's documents say what its run found, and nothing else.

use std::fs;
use std::path::Path;

use samepage_tests::density::report::document::{PLOTS, kept, outdated};

const REPOSITORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

#[test]
fn generated_parts_are_those_of_the_figures_that_are_kept() {
    let outdated = outdated(Path::new(REPOSITORY)).unwrap_or_else(|error| panic!("{error}"));
    assert!(
        outdated.is_empty(),
        "{outdated:?}: make them again with `density --from FILE --document .`"
    );
}

#[test]
fn plots_are_of_the_run_whose_figures_are_kept() {
    let root = Path::new(REPOSITORY);
    let Some(summary) = kept(root).unwrap_or_else(|error| panic!("{error}")) else {
        return;
    };
    assert!(!summary.plots.is_empty());
    let mark = format!("commit {}, {}", summary.commit, summary.day());
    for plot in &summary.plots {
        let path = root.join(PLOTS).join(&plot.file);
        let text = fs::read_to_string(&path);
        let text = text.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert!(text.contains(&mark), "{} is of another run", path.display());
    }
}
