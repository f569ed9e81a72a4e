//! The `samepage` binary under test.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Path of the `samepage` binary of the same profile as the running test or program, built now if needed:
/// cargo builds a dependency's library for a test, but not its binary. `SAMEPAGE_BIN` names
/// another one to test.
///
/// # Panics
/// If it cannot be built.
pub fn samepage() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        if let Some(given) = std::env::var_os("SAMEPAGE_BIN") {
            return given.into();
        }
        // target/<profile>/deps/<test>, or target/<profile>/<program>
        let own = std::env::current_exe().expect("path of the running test");
        let directory = own.parent().expect("directory of the running test");
        let profile_dir = match directory.file_name() {
            Some(name) if name == "deps" => directory.parent().expect("profile directory"),
            _ => directory,
        };
        let profile = match profile_dir.file_name().and_then(|name| name.to_str()) {
            Some("debug") => "dev",
            Some(profile) => profile,
            None => panic!("{}: no profile directory", profile_dir.display()),
        };
        let target_dir = profile_dir.parent().expect("target directory");
        let status = Command::new(env!("CARGO"))
            .args([
                "build",
                "--quiet",
                "--package",
                "samepage",
                "--bin",
                "samepage",
            ])
            .args(["--profile", profile, "--target-dir"])
            .arg(target_dir)
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .status()
            .expect("cargo runs");
        assert!(status.success(), "building samepage: {status}");
        profile_dir.join("samepage")
    })
}
