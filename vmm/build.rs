//! Builds the pageload guest, so that `vmm::pageload` can embed it.
//!
//! The guest is a program for another machine: it is compiled by a cargo of its own, with the flags
//! in its own directory, into a directory below `OUT_DIR`. It has no dependencies from outside this
//! repository, so this works offline. (An artifact dependency would do it all, but is unstable; a
//! committed binary could differ from its source.)

use std::env;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Given explicitly, so that the place of the output does not depend on anyone's cargo configuration.
const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() -> Result<(), Box<dyn Error>> {
    let here = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let sources = here.join("../resources/pageload").canonicalize()?;
    let guest = sources.join("guest");
    for watched in [
        "src",
        "build.rs",
        "link.ld",
        "Cargo.toml",
        "Cargo.lock",
        ".cargo/config.toml",
    ] {
        println!("cargo:rerun-if-changed={}", guest.join(watched).display());
    }
    for watched in ["workload/src", "workload/Cargo.toml"] {
        println!("cargo:rerun-if-changed={}", sources.join(watched).display());
    }
    let target_dir = PathBuf::from(env::var("OUT_DIR")?).join("pageload");
    build(&guest, &target_dir)?;
    let image = target_dir.join(TARGET).join("release/pageload-guest");
    println!("cargo:rustc-env=PAGELOAD_GUEST={}", image.display());
    Ok(())
}

fn build(guest: &Path, target_dir: &Path) -> Result<(), Box<dyn Error>> {
    let mut cargo = Command::new(env::var("CARGO")?);
    cargo
        .current_dir(guest)
        .args([
            "build",
            "--release",
            "--locked",
            "--offline",
            "--target",
            TARGET,
            "--target-dir",
        ])
        .arg(target_dir);
    // What this build was given is not meant for the guest: flags for coverage or sanitizers, a
    // linter in the compiler's place, profile overrides, the variables of this very script.
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        let of_cargo = text.starts_with("CARGO") && text != "CARGO_HOME";
        if of_cargo || text.starts_with("RUSTC_") || text.contains("RUSTFLAGS") {
            cargo.env_remove(name);
        }
    }
    let status = cargo
        .status()
        .map_err(|error| format!("pageload guest: cargo: {error}"))?;
    if !status.success() {
        return Err(format!("pageload guest: cargo ended with {status}").into());
    }
    Ok(())
}
