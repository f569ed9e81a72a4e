//! The files that the rules read: everything git would track, as text.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// How many lines of a source file's own code, without its test module, are too many.
const SOURCE_LINES_MAX: usize = 400;
/// Tests read top-down and repeat themselves on purpose, so they may be longer.
const TEST_LINES_MAX: usize = 600;

/// One file of the repository.
#[derive(Debug, Clone)]
pub(crate) struct SourceFile {
    /// Path below the root of the repository, with forward slashes.
    pub(crate) path: String,
    /// The whole content.
    pub(crate) text: String,
}

impl SourceFile {
    /// A file of this content; rules are tested with made-up ones.
    pub(crate) fn new(path: &str, text: &str) -> Self {
        SourceFile {
            path: path.to_owned(),
            text: text.to_owned(),
        }
    }

    /// The part of the path after the last slash.
    pub(crate) fn file_name(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or(&self.path)
    }

    /// Whether this is Rust source.
    pub(crate) fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    /// Whether the whole file is test code: integration tests, the harness, benches, `tests.rs` and `*_tests.rs`.
    pub(crate) fn is_test_code(&self) -> bool {
        self.path.starts_with("tests/")
            || self.path.contains("/tests/")
            || self.path.contains("/benches/")
            || self.path.ends_with("/tests.rs")
            || self.path.ends_with("_tests.rs")
    }

    /// The number of lines this file may have.
    pub(crate) fn lines_max(&self) -> usize {
        if self.is_test_code() {
            TEST_LINES_MAX
        } else {
            SOURCE_LINES_MAX
        }
    }
}

/// The root of the repository.
pub(crate) fn root() -> PathBuf {
    let tests_crate = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests_crate.parent().unwrap_or(tests_crate).to_owned()
}

/// Reads every text file that is tracked, or would be if it were added now.
///
/// New files count before `git add`, so that a rule fails before the commit and not after it. Without git (a source
/// archive) the directory is walked instead.
pub(crate) fn load() -> Vec<SourceFile> {
    let root = root();
    let mut paths = listed_by_git(&root).unwrap_or_else(|| walked(&root));
    paths.sort();
    paths.dedup();
    paths
        .into_iter()
        .filter_map(|path| {
            // A file deleted but not yet committed is still listed, and a binary one is not ours to read.
            let text = fs::read_to_string(root.join(&path)).ok()?;
            Some(SourceFile { path, text })
        })
        .collect()
}

/// The file at `path` of the loaded tree.
///
/// # Panics
/// If the tree has no such file.
pub(crate) fn file<'a>(tree: &'a [SourceFile], path: &str) -> &'a SourceFile {
    tree.iter()
        .find(|file| file.path == path)
        .unwrap_or_else(|| panic!("the repository has no {path}"))
}

fn listed_by_git(root: &Path) -> Option<Vec<String>> {
    if !root.join(".git").exists() {
        return None;
    }
    let output = Command::new("git")
        .arg("-C")
        .arg(root)
        // A checkout owned by another user (a container's bind mount) is still only read here.
        .args(["-c", "safe.directory=*"])
        .args([
            "ls-files",
            "-z",
            "--cached",
            "--others",
            "--exclude-standard",
        ])
        .output()
        .ok()?;
    if !output.status.success() {
        return None;
    }
    let listing = String::from_utf8_lossy(&output.stdout);
    let paths: Vec<String> = listing
        .split('\0')
        .filter(|path| !path.is_empty())
        .map(str::to_owned)
        .collect();
    (!paths.is_empty()).then_some(paths)
}

fn walked(root: &Path) -> Vec<String> {
    let mut paths = Vec::new();
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        let Ok(entries) = fs::read_dir(&directory) else {
            continue;
        };
        for entry in entries.flatten() {
            let path = entry.path();
            let name = entry.file_name();
            if path.is_dir() && name != "target" && name != ".git" {
                directories.push(path);
            } else if path.is_file() {
                let below_root = path.strip_prefix(root).unwrap_or(&path);
                paths.push(below_root.to_string_lossy().into_owned());
            }
        }
    }
    paths
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn git_and_a_walk_agree_about_the_manifests() {
        let manifests = |paths: Vec<String>| -> Vec<String> {
            let mut kept: Vec<String> = paths
                .into_iter()
                .filter(|path| path.ends_with("Cargo.toml"))
                .collect();
            kept.sort();
            kept
        };
        let walked = manifests(walked(&root()));
        assert!(walked.contains(&"dedup/Cargo.toml".to_owned()));
        if let Some(listed) = listed_by_git(&root()) {
            assert_eq!(manifests(listed), walked);
        }
    }

    #[test]
    fn code_of_tests_is_known_by_its_place() {
        for path in [
            "tests/src/lib.rs",
            "vmm/tests/boot.rs",
            "dedup/src/scan/tests.rs",
            "api/src/route_tests.rs",
            "dedup/benches/b.rs",
        ] {
            assert!(SourceFile::new(path, "").is_test_code(), "{path}");
        }
        assert!(!SourceFile::new("dedup/src/scan.rs", "").is_test_code());
    }
}
