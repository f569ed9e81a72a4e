//! What the documents must hold: module tables, lock orders, figures with commands.

use crate::mask::{Masked, leading_identifier, skip_attributes};
use crate::tree::SourceFile;
use crate::violation::Violation;

/// The crates whose threads share state, and that must say how.
const WITH_LOCKS: [&str; 3] = ["api/src/lib.rs", "vmm/src/lib.rs", "dedup/src/lib.rs"];

/// Rule `module-table`: a crate's doc has a table with every module, so a reader knows where to look.
pub(crate) fn module_table(root: &SourceFile) -> Vec<Violation> {
    let rule = "module-table";
    let modules = declared_modules(&Masked::new(&root.text).code);
    if modules.is_empty() {
        return Vec::new();
    }
    let doc = crate_doc(&root.text);
    let rows: Vec<&str> = doc
        .iter()
        .copied()
        .filter(|line| line.starts_with('|'))
        .collect();
    if !rows.iter().any(|row| row.to_lowercase().contains("module")) {
        let message = "the crate's doc has no table whose head says `module`";
        return vec![Violation::new(rule, &root.path, 1, message)];
    }
    modules
        .into_iter()
        .filter(|(_, name)| !rows.iter().any(|row| row.contains(&format!("`{name}`"))))
        .map(|(line, name)| {
            let message = format!(
                "module {name} is missing in the crate's module table (write it as `{name}`)"
            );
            Violation::new(rule, &root.path, line, message)
        })
        .collect()
}

/// Rule `lock-order`: a crate's doc says which locks there are, what each guards, and their order.
pub(crate) fn lock_order(root: &SourceFile) -> Vec<Violation> {
    let has_section = crate_doc(&root.text)
        .iter()
        .any(|line| line.starts_with('#') && line.trim_start_matches('#').trim() == "Locks");
    if has_section || !WITH_LOCKS.contains(&root.path.as_str()) {
        return Vec::new();
    }
    vec![Violation::new(
        "lock-order",
        &root.path,
        1,
        "the crate's doc has no section `# Locks`",
    )]
}

/// Rule `unreleased-changes`: CHANGELOG.md opens with what the next release will bring.
pub(crate) fn unreleased_changes(changelog: &SourceFile) -> Vec<Violation> {
    let first = changelog
        .text
        .lines()
        .enumerate()
        .find(|(_, line)| line.starts_with("## "));
    match first {
        Some((_, line)) if line.to_lowercase().contains("unreleased") => Vec::new(),
        found => {
            let line = found.map_or(1, |(index, _)| index + 1);
            let message = "the first section must be `## Unreleased`";
            vec![Violation::new(
                "unreleased-changes",
                &changelog.path,
                line,
                message,
            )]
        }
    }
}

/// Rule `figures-have-commands`: each row of a claims table names the command that measures it, its result and date.
pub(crate) fn figures_have_commands(specification: &SourceFile) -> Vec<Violation> {
    let mut found = Vec::new();
    let mut columns: Option<Columns> = None;
    let mut rows = 0;
    for (index, line) in specification.text.lines().enumerate() {
        if !line.starts_with('|') {
            columns = None;
            continue;
        }
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let Some(known) = &columns else {
            columns = Columns::of_head(&cells);
            continue;
        };
        if cells
            .iter()
            .all(|cell| cell.chars().all(|c| "-: ".contains(c)))
        {
            continue;
        }
        rows += 1;
        for problem in known.problems(&cells) {
            found.push(Violation::new(
                "figures-have-commands",
                &specification.path,
                index + 1,
                problem,
            ));
        }
    }
    if rows == 0 {
        let message =
            "no row in a table with the columns claim, figure, command, last result, date";
        found.push(Violation::new(
            "figures-have-commands",
            &specification.path,
            1,
            message,
        ));
    }
    found
}

/// Where the columns of a claims table are.
#[derive(Debug)]
struct Columns {
    command: usize,
    result: usize,
    date: usize,
}

impl Columns {
    fn of_head(cells: &[&str]) -> Option<Columns> {
        let find = |name: &str| {
            cells
                .iter()
                .position(|cell| cell.eq_ignore_ascii_case(name))
        };
        find("claim")?;
        Some(Columns {
            command: find("command")?,
            result: find("last result")?,
            date: find("date")?,
        })
    }

    fn problems(&self, cells: &[&str]) -> Vec<String> {
        let cell = |at: usize| cells.get(at).copied().unwrap_or("");
        let mut problems = Vec::new();
        if cell(self.command)
            .split('`')
            .nth(1)
            .is_none_or(str::is_empty)
        {
            problems.push(format!(
                "no command in backquotes: {:?}",
                cell(self.command)
            ));
        }
        if cell(self.result).is_empty() {
            problems.push("no last result; write `not measured` where there is none".to_owned());
        }
        let is_measured = cell(self.result) != "not measured";
        if is_measured && !is_date(cell(self.date)) {
            problems.push(format!(
                "a result needs a date as yyyy-mm-dd: {:?}",
                cell(self.date)
            ));
        }
        problems
    }
}

fn is_date(text: &str) -> bool {
    let digits =
        |part: &str, count: usize| part.len() == count && part.bytes().all(|b| b.is_ascii_digit());
    let parts: Vec<&str> = text.split('-').collect();
    parts.len() == 3 && digits(parts[0], 4) && digits(parts[1], 2) && digits(parts[2], 2)
}

/// Rule `named-rules`: every rule that these tests hold is explained in CONTRIBUTING.md under its name.
pub(crate) fn named_rules(contributing: &SourceFile, names: &[&str]) -> Vec<Violation> {
    names
        .iter()
        .filter(|name| !contributing.text.contains(&format!("`{name}`")))
        .map(|name| {
            let message = format!("rule `{name}` is held by a test and explained nowhere");
            Violation::new("named-rules", &contributing.path, 1, message)
        })
        .collect()
}

/// The lines of the `//!` comment of a file, without the marker.
fn crate_doc(text: &str) -> Vec<&str> {
    text.lines()
        .filter_map(|line| line.trim_start().strip_prefix("//!"))
        .map(str::trim)
        .collect()
}

/// The modules that a crate root declares outside of its tests, with their lines.
fn declared_modules(code: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let mut is_test_only = false;
    for (index, line) in code.lines().enumerate() {
        let line = line.trim();
        is_test_only |= line.starts_with("#[cfg(test)]");
        let item = skip_attributes(line);
        if let Some(rest) = item.strip_prefix("mod ")
            && !is_test_only
        {
            found.push((index + 1, leading_identifier(rest).to_owned()));
        }
        if !item.is_empty() {
            is_test_only = false;
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_module_table_or_row_is_caught() {
        let without = "//! Doc.\nmod a;\n";
        assert_eq!(
            module_table(&SourceFile::new("dedup/src/lib.rs", without)).len(),
            1
        );
        let text = "//! | module | what |\n//! |---|---|\n//! | `a` | x |\nmod a;\npub(crate) mod b;\n\
                    #[cfg(test)]\nmod tests;\n#[expect(unsafe_code, reason = \"x\")]\npub mod c;\n";
        let found = module_table(&SourceFile::new("dedup/src/lib.rs", text));
        assert_eq!(found.iter().map(|v| v.line).collect::<Vec<_>>(), [5, 9]);
        assert!(
            module_table(&SourceFile::new(
                "x/src/lib.rs",
                "//! One file.\nfn f() {}\n"
            ))
            .is_empty()
        );
    }

    #[test]
    fn a_missing_lock_section_is_caught() {
        assert_eq!(
            lock_order(&SourceFile::new("vmm/src/lib.rs", "//! Locks are fun.\n")).len(),
            1
        );
        assert!(
            lock_order(&SourceFile::new(
                "vmm/src/lib.rs",
                "//! # Locks\n//! None.\n"
            ))
            .is_empty()
        );
        assert!(lock_order(&SourceFile::new("tests/src/lib.rs", "//! x\n")).is_empty());
    }

    #[test]
    fn a_changelog_that_starts_with_a_release_is_caught() {
        let found = unreleased_changes(&SourceFile::new(
            "CHANGELOG.md",
            "# C\n\n## 0.1.0\n## Unreleased\n",
        ));
        assert_eq!(found[0].line, 3);
        assert!(
            unreleased_changes(&SourceFile::new("CHANGELOG.md", "# C\n## [Unreleased]\n"))
                .is_empty()
        );
    }

    #[test]
    fn a_figure_without_command_or_date_is_caught() {
        let text = "| Claim | Figure | Command | Last result | Date |\n|---|---|---|---|---|\n\
                    | a | 1 | `make demo` | 2 | 2026-11-22 |\n| b | 1 | by hand | 2 | 2026-11-22 |\n\
                    | c | 1 | `x` | not measured | |\n| d | 1 | `x` | 3 | soon |\n\ntext\n\n| other | table |\n|---|---|\n\
                    | x | y |\n";
        let found = figures_have_commands(&SourceFile::new("SPECIFICATION.md", text));
        assert_eq!(found.iter().map(|v| v.line).collect::<Vec<_>>(), [4, 6]);
        assert_eq!(
            figures_have_commands(&SourceFile::new("SPECIFICATION.md", "none")).len(),
            1
        );
    }

    #[test]
    fn an_unexplained_rule_is_caught() {
        let contributing = SourceFile::new("CONTRIBUTING.md", "- `short-files`: ...");
        assert_eq!(
            named_rules(&contributing, &["short-files", "lock-order"]).len(),
            1
        );
    }
}
