//! One place where the tree breaks one rule.

use std::fmt;

/// A broken rule, printed as `path:line: [rule] message` so that editors can jump to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Violation {
    /// Path below the root of the repository.
    pub(crate) path: String,
    /// Line in the file, counted from 1.
    pub(crate) line: usize,
    /// The rule's permanent name, as listed in CONTRIBUTING.md.
    pub(crate) rule: &'static str,
    /// What is wrong, with the offending value, and what to do instead.
    pub(crate) message: String,
}

impl Violation {
    /// Describes a breach of `rule` at `path:line`.
    pub(crate) fn new(
        rule: &'static str,
        path: &str,
        line: usize,
        message: impl Into<String>,
    ) -> Self {
        Violation {
            path: path.to_owned(),
            line,
            rule,
            message: message.into(),
        }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Violation {
            path,
            line,
            rule,
            message,
        } = self;
        write!(f, "{path}:{line}: [{rule}] {message}")
    }
}

/// Fails the calling test with one line per violation.
///
/// # Panics
/// If there is any.
#[track_caller]
pub(crate) fn assert_none(violations: &[Violation]) {
    let lines: Vec<String> = violations.iter().map(ToString::to_string).collect();
    assert!(
        lines.is_empty(),
        "{} broken house rule(s), explained in CONTRIBUTING.md:\n{}\n",
        lines.len(),
        lines.join("\n")
    );
}
