//! Things that belong to the desk of one developer and not into the tree.

use std::path::Path;

use crate::functions::{around, functions};
use crate::mask::{Masked, find_word, is_word, line_of, test_module_line};
use crate::tree::SourceFile;
use crate::violation::Violation;

// Each is put together here, so that this file does not contain what it looks for.
const MARKS: [&str; 4] = [
    concat!("FIX", "ME"),
    concat!("TO", "DO"),
    concat!("XX", "X"),
    concat!("HA", "CK"),
];
const UNFINISHED: [&str; 3] = ["todo!", "unimplemented!", "dbg!"];
const HOMES: [&str; 3] = [
    concat!("/ho", "me/"),
    concat!("/ro", "ot/"),
    concat!("/Us", "ers/"),
];
const TEMPORARY: &str = concat!("/t", "mp/");

/// The functions that may sleep in a test: each polls a condition until a deadline.
const WAITING_PRIMITIVES: [&str; 3] = ["wait_until", "poll_until", "wait_for"];

/// Rule `nothing-left-over`: what is not done is an issue in the tracker, not a mark in the tree.
pub(crate) fn nothing_left_over(file: &SourceFile) -> Vec<Violation> {
    let rule = "nothing-left-over";
    let mut found = Vec::new();
    let (prose, code) = if file.is_rust() {
        let masked = Masked::new(&file.text);
        (masked.comments, masked.code)
    } else {
        (file.text.clone(), String::new())
    };
    for mark in MARKS {
        for at in find_word(&prose, mark) {
            found.push(Violation::new(
                rule,
                &file.path,
                line_of(&prose, at),
                format!("leftover {mark}"),
            ));
        }
    }
    for call in UNFINISHED {
        let bytes = code.as_bytes();
        for (at, _) in code.match_indices(call) {
            if at == 0 || !is_word(bytes[at - 1]) {
                found.push(Violation::new(
                    rule,
                    &file.path,
                    line_of(&code, at),
                    format!("leftover {call}"),
                ));
            }
        }
    }
    found
}

/// Rule `no-sleeping-tests`: a test polls a condition with a deadline and never hopes that some time is enough.
pub(crate) fn no_sleeping_tests(file: &SourceFile) -> Vec<Violation> {
    let code = Masked::new(&file.text).code;
    let first_line = if file.is_test_code() {
        1
    } else {
        test_module_line(&code).unwrap_or(usize::MAX)
    };
    let functions = functions(&code);
    find_word(&code, "sleep")
        // A method of that name is the code under test, and wakes by its own rules.
        .filter(|&at| !code[..at].ends_with('.'))
        .filter(|&at| {
            code[at..]
                .trim_start_matches("sleep")
                .trim_start()
                .starts_with('(')
        })
        .map(|at| line_of(&code, at))
        .filter(|&line| line >= first_line)
        .filter(|&line| {
            !around(&functions, line)
                .is_some_and(|function| WAITING_PRIMITIVES.contains(&function.name.as_str()))
        })
        .map(|line| {
            let message = format!(
                "sleep in a test outside of {}",
                WAITING_PRIMITIVES.join(", ")
            );
            Violation::new("no-sleeping-tests", &file.path, line, message)
        })
        .collect()
}

/// Rule `no-absolute-paths`: nothing in the tree may depend on where one developer keeps it.
///
/// `checkout` is where the tree is now; a path below it in a file was pasted from a terminal.
pub(crate) fn no_absolute_paths(file: &SourceFile, checkout: &Path) -> Vec<Violation> {
    let checkout = checkout.to_string_lossy();
    let mut found = Vec::new();
    for (index, line) in file.text.lines().enumerate() {
        let developer = HOMES
            .into_iter()
            .find(|home| starts_a_path(line, home))
            .or_else(|| deep_temporary(line).then_some(TEMPORARY))
            .or_else(|| {
                (checkout.len() > 3 && starts_a_path(line, &checkout)).then_some(&*checkout)
            });
        if let Some(path) = developer {
            let message = format!("a developer's path, {path}...: find it at run time");
            found.push(Violation::new(
                "no-absolute-paths",
                &file.path,
                index + 1,
                message,
            ));
        }
    }
    found
}

/// Whether `line` has `path` at the start of a path, and not in the middle of a longer one.
fn starts_a_path(line: &str, path: &str) -> bool {
    line.match_indices(path)
        .any(|(at, _)| !continues_a_path(line, at))
}

fn continues_a_path(line: &str, at: usize) -> bool {
    at.checked_sub(1)
        .map(|before| line.as_bytes()[before])
        .is_some_and(|byte| is_word(byte) || b"./-}*".contains(&byte))
}

/// Whether `line` names a file in a fixed directory below the temporary one.
///
/// A socket right in it is a fair example for a README; a directory of files there is somebody's leftover.
fn deep_temporary(line: &str) -> bool {
    line.match_indices(TEMPORARY).any(|(at, _)| {
        let name = line[at + TEMPORARY.len()..]
            .trim_start_matches(|c: char| c.is_alphanumeric() || "._-".contains(c));
        name.starts_with('/') && !continues_a_path(line, at)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(found: &[Violation]) -> Vec<usize> {
        found.iter().map(|violation| violation.line).collect()
    }

    #[test]
    fn marks_are_caught_in_comments_and_scripts() {
        let [first, second, third, fourth] = MARKS;
        let rust = format!(
            "// {first}: later\n/* {second} */ fn f() {{}}\nlet s = \"{third}\";\n// {third}X\n// {fourth}\n"
        );
        assert_eq!(
            lines(&nothing_left_over(&SourceFile::new("a.rs", &rust))),
            [1, 2, 5]
        );
        let script = format!("echo\n# {second}\nmktemp -d a.{third}{third}\n");
        assert_eq!(
            lines(&nothing_left_over(&SourceFile::new(
                "resources/build",
                &script
            ))),
            [2]
        );
    }

    #[test]
    fn unfinished_code_is_caught() {
        let text = "fn f() { todo!() }\nfn g() { unimplemented!(\"x\") }\nfn h() { dbg!(1); my_dbg!(2) }\n";
        assert_eq!(
            lines(&nothing_left_over(&SourceFile::new("a.rs", text))),
            [1, 2, 3]
        );
    }

    #[test]
    fn a_sleep_is_caught_in_tests_and_free_in_a_waiting_primitive() {
        let text = "fn wait_until() {\n    thread::sleep(X);\n}\n\
                    #[test]\nfn merges() {\n    std::thread::sleep(X);\n    gate.sleep(X);\n}\n";
        assert_eq!(
            lines(&no_sleeping_tests(&SourceFile::new(
                "tests/tests/a.rs",
                text
            ))),
            [6]
        );
        assert!(no_sleeping_tests(&SourceFile::new("dedup/src/a.rs", text)).is_empty());
        let unit =
            "fn pace() { sleep(X) }\n#[cfg(test)]\nmod tests {\n    fn t() { sleep(X) }\n}\n";
        assert_eq!(
            lines(&no_sleeping_tests(&SourceFile::new("dedup/src/a.rs", unit))),
            [4]
        );
    }

    #[test]
    fn developer_paths_are_caught() {
        let [home, root, users] = HOMES;
        let checkout = Path::new("/srv/checkouts/tree");
        let text = format!(
            "{home}ann/x\nsee {root}.cargo\n{users}ann\n$guest{root}x\n{TEMPORARY}api.sock\n{TEMPORARY}mine/x.log\n\
             cd /srv/checkouts/tree\n"
        );
        let found = no_absolute_paths(&SourceFile::new("README.md", &text), checkout);
        assert_eq!(lines(&found), [1, 2, 3, 6, 7]);
    }
}
