//! The seeds of the fuzz targets, for the tests that run them without a fuzzer.

use std::path::Path;

/// Contents of all seeds of `target`.
///
/// # Panics
/// If there is none.
pub(crate) fn of(target: &str) -> Vec<Vec<u8>> {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let directory = package.join("../tests/fuzz/seeds").join(target);
    let entries = std::fs::read_dir(&directory).expect("a directory of seeds");
    let read = |entry: std::io::Result<std::fs::DirEntry>| {
        let path = entry.expect("a seed").path();
        std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    };
    let seeds: Vec<Vec<u8>> = entries.map(read).collect();
    assert!(!seeds.is_empty(), "no seed in {}", directory.display());
    seeds
}
