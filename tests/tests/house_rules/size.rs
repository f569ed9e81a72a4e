//! Limits on files, functions and lines.

use crate::functions::functions;
use crate::mask::{Masked, test_module_line};
use crate::tree::SourceFile;
use crate::violation::Violation;

/// Lines of code in one function, as clippy counts them.
const FUNCTION_LINES_MAX: usize = 70;
/// Columns of one line of text; rustfmt holds code to 100, this holds what it leaves alone.
const COLUMNS_MAX: usize = 120;

/// Rule `short-files`: one noun a file keeps a file short.
pub(crate) fn short_files(file: &SourceFile) -> Vec<Violation> {
    let code = Masked::new(&file.text).code;
    let own_lines = match test_module_line(&code) {
        Some(line) if !file.is_test_code() => line - 1,
        _ => file.text.lines().count(),
    };
    if own_lines <= file.lines_max() {
        return Vec::new();
    }
    let message = format!(
        "{own_lines} lines of its own, at most {} (split by noun)",
        file.lines_max()
    );
    vec![Violation::new("short-files", &file.path, 1, message)]
}

/// Rule `short-functions`.
pub(crate) fn short_functions(file: &SourceFile) -> Vec<Violation> {
    functions(&Masked::new(&file.text).code)
        .into_iter()
        .filter(|function| function.code_lines > FUNCTION_LINES_MAX)
        .map(|function| {
            let message = format!(
                "fn {} has {} lines of code, at most {FUNCTION_LINES_MAX}",
                function.name, function.code_lines
            );
            Violation::new("short-functions", &file.path, function.line, message)
        })
        .collect()
}

/// Rule `short-lines`. Rows of a table, addresses, and literal text in a document cannot be broken and are free.
pub(crate) fn short_lines(file: &SourceFile) -> Vec<Violation> {
    let is_document = file.path.ends_with(".md");
    let is_free = |line: &str| {
        line.contains("://")
            || (is_document && line.starts_with("    "))
            || line
                .trim_start_matches(['/', '!', '#', ' '])
                .starts_with('|')
    };
    file.text
        .lines()
        .enumerate()
        .filter(|(_, line)| line.chars().count() > COLUMNS_MAX && !is_free(line))
        .map(|(index, line)| {
            let message = format!("{} columns, at most {COLUMNS_MAX}", line.chars().count());
            Violation::new("short-lines", &file.path, index + 1, message)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_over_the_limit_is_caught_and_its_test_module_is_free() {
        let own = "fn f() {}\n".repeat(401);
        assert_eq!(
            short_files(&SourceFile::new("vmm/src/bus.rs", &own)).len(),
            1
        );
        assert!(short_files(&SourceFile::new("tests/tests/boot.rs", &own)).is_empty());
        let mostly_tests = format!(
            "fn f() {{}}\n#[cfg(test)]\nmod tests {{\n{}}}\n",
            "// x\n".repeat(900)
        );
        assert!(short_files(&SourceFile::new("vmm/src/bus.rs", &mostly_tests)).is_empty());
    }

    #[test]
    fn a_function_over_the_limit_is_caught_and_comments_are_free() {
        let long = format!("fn long() {{\n{}}}\n", "    step();\n".repeat(71));
        let found = short_functions(&SourceFile::new("a.rs", &long));
        assert_eq!(
            found[0].to_string(),
            "a.rs:1: [short-functions] fn long has 71 lines of code, at most 70"
        );
        let commented = format!("fn f() {{\n{}}}\n", "    // why\n".repeat(71));
        assert!(short_functions(&SourceFile::new("a.rs", &commented)).is_empty());
    }

    #[test]
    fn a_long_line_is_caught_unless_it_cannot_be_broken() {
        let long = "x".repeat(121);
        let text = format!("ok\n{long}\n| {long} |\n//! | {long} |\nsee https://{long}\n");
        let found = short_lines(&SourceFile::new("README.md", &text));
        assert_eq!(found.iter().map(|v| v.line).collect::<Vec<_>>(), [2]);
    }
}
