//! Licences of the dependencies, against the same allow list that cargo-deny reads.
//!
//! cargo-deny needs its own binary and a network; this needs neither, so it runs everywhere the tests do.

use std::process::Command;

use serde_json::Value;

use crate::tree::root;
use crate::violation::Violation;

const RULE: &str = "allowed-licences";

/// Rule `allowed-licences`: judges the packages in the output of `cargo metadata`.
pub(crate) fn allowed_licences(metadata: &Value, allowed: &[String]) -> Vec<Violation> {
    let empty = Vec::new();
    let packages = metadata["packages"].as_array().unwrap_or(&empty);
    packages
        .iter()
        .filter_map(|package| {
            let expression = package["license"].as_str().unwrap_or("");
            let name = package["name"].as_str().unwrap_or("?");
            let version = package["version"].as_str().unwrap_or("?");
            let message =
                format!("{name} {version} has licence {expression:?}, not allowed by deny.toml");
            (!is_allowed(expression, allowed))
                .then(|| Violation::new(RULE, "deny.toml", 1, message))
        })
        .collect()
}

/// What `cargo metadata` says about this workspace, from what is already on the disk.
///
/// # Errors
/// Cargo's own message, where it cannot be run or lacks a package.
pub(crate) fn metadata() -> Result<Value, String> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let output = Command::new(cargo)
        .args(["metadata", "--offline", "--locked", "--format-version", "1"])
        // Packages for other systems are never built here, so they need not be on the disk.
        .arg(format!("--filter-platform={}-unknown-linux-gnu", std::env::consts::ARCH))
        .current_dir(root())
        .output()
        .map_err(|error| format!("cargo metadata: {error}"))?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    serde_json::from_slice(&output.stdout).map_err(|error| format!("cargo metadata: {error}"))
}

/// Whether an SPDX expression can be met with allowed licences only.
///
/// `AND` binds tighter than `OR`; the slash is Cargo's old way to write `OR`. `WITH` makes one licence of two words.
fn is_allowed(expression: &str, allowed: &[String]) -> bool {
    let spaced = expression
        .replace('(', " ( ")
        .replace(')', " ) ")
        .replace('/', " OR ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut at = 0;
    let result = any_of(&words, &mut at, allowed);
    at == words.len() && result == Some(true)
}

fn any_of(words: &[&str], at: &mut usize, allowed: &[String]) -> Option<bool> {
    let mut result = all_of(words, at, allowed)?;
    while words.get(*at) == Some(&"OR") {
        *at += 1;
        result |= all_of(words, at, allowed)?;
    }
    Some(result)
}

fn all_of(words: &[&str], at: &mut usize, allowed: &[String]) -> Option<bool> {
    let mut result = one_licence(words, at, allowed)?;
    while words.get(*at) == Some(&"AND") {
        *at += 1;
        result &= one_licence(words, at, allowed)?;
    }
    Some(result)
}

fn one_licence(words: &[&str], at: &mut usize, allowed: &[String]) -> Option<bool> {
    let word = *words.get(*at)?;
    *at += 1;
    if word == "(" {
        let inside = any_of(words, at, allowed)?;
        let closes = words.get(*at) == Some(&")");
        *at += 1;
        return closes.then_some(inside);
    }
    let mut name = word.to_owned();
    if words.get(*at) == Some(&"WITH") {
        name = format!("{name} WITH {}", words.get(*at + 1)?);
        *at += 2;
    }
    Some(allowed.contains(&name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed() -> Vec<String> {
        [
            "MIT",
            "Apache-2.0",
            "Apache-2.0 WITH LLVM-exception",
            "Unicode-3.0",
        ]
        .map(str::to_owned)
        .to_vec()
    }

    #[test]
    fn an_expression_is_met_with_allowed_licences_only() {
        for good in [
            "MIT",
            "GPL-3.0 OR MIT",
            "GPL-3.0/Apache-2.0",
            "(MIT OR GPL-2.0) AND Unicode-3.0",
            "Apache-2.0 WITH LLVM-exception OR X",
            "X AND Y OR MIT",
        ] {
            assert!(is_allowed(good, &allowed()), "{good}");
        }
        for bad in [
            "",
            "GPL-3.0",
            "MIT AND GPL-3.0",
            "(MIT",
            "MIT OR",
            "MIT MIT",
            "MIT AND (X OR Y)",
        ] {
            assert!(!is_allowed(bad, &allowed()), "{bad}");
        }
    }

    #[test]
    fn a_package_without_an_allowed_licence_is_caught() {
        let metadata = serde_json::json!({"packages": [
            {"name": "good", "version": "1.0.0", "license": "MIT"},
            {"name": "bad", "version": "2.0.0", "license": "AGPL-3.0"},
            {"name": "unknown", "version": "3.0.0", "license": null},
        ]});
        let found = allowed_licences(&metadata, &allowed());
        assert_eq!(found.len(), 2);
        assert!(found[0].message.contains("bad 2.0.0"));
    }
}
