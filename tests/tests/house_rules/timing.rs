//! What a loaded host would fail a test for.

use crate::mask::{Masked, closing, find_word, line_of, test_module_line};
use crate::tree::SourceFile;
use crate::violation::Violation;

/// The shortest deadline of a test, in seconds.
const DEADLINE_SECONDS_MIN: u64 = 60;
/// What makes a time a deadline, where it stands right before the time.
const DEADLINES: [&str; 3] = ["Instant::now() +", "timeout(", ": Duration ="];
const SECONDS: &str = "Duration::from_secs(";

/// Rule `patient-tests`: no test asserts a speed, and a deadline is for a hang alone.
///
/// Milliseconds are free: a test may look for so long that nothing happens.
pub(crate) fn patient_tests(file: &SourceFile) -> Vec<Violation> {
    // What a benchmark measures is a speed, and its times are lengths of what it measures.
    if ["/benches/", "/density/run/", "/density/workloads/"]
        .iter()
        .any(|benchmark| file.path.contains(benchmark))
    {
        return Vec::new();
    }
    let code = Masked::new(&file.text).code;
    let first_line = if file.is_test_code() {
        1
    } else {
        test_module_line(&code).unwrap_or(usize::MAX)
    };
    let short = short_deadlines(&code).map(|(at, seconds)| {
        let least = DEADLINE_SECONDS_MIN;
        let message = format!("a deadline of {seconds} s, at least {least} are a loaded host's");
        (at, message)
    });
    let speeds = asserted_speeds(&code).map(|at| (at, "an asserted speed".to_owned()));
    let mut found: Vec<Violation> = short
        .chain(speeds)
        .map(|(at, message)| (line_of(&code, at), message))
        .filter(|(line, _)| *line >= first_line)
        .map(|(line, message)| Violation::new("patient-tests", &file.path, line, message))
        .collect();
    found.sort_by_key(|violation| violation.line);
    found
}

/// Deadlines in seconds that are too short, and where they are.
fn short_deadlines(code: &str) -> impl Iterator<Item = (usize, u64)> {
    code.match_indices(SECONDS).filter_map(|(at, start)| {
        let before = code[..at].trim_end_matches("std::time::").trim_end();
        let number = code[at + start.len()..].split(')').next()?;
        let seconds: u64 = number.replace('_', "").parse().ok()?;
        let is_deadline = DEADLINES
            .iter()
            .any(|before_it| before.ends_with(before_it));
        (is_deadline && seconds < DEADLINE_SECONDS_MIN).then_some((at, seconds))
    })
}

/// Where an assertion has a time gone by on the lower side.
fn asserted_speeds(code: &str) -> impl Iterator<Item = usize> {
    let asserts = find_word(code, "assert!").chain(find_word(code, "prop_assert!"));
    asserts.filter(|&at| {
        let Some(open) = code[at..].find('(') else {
            return false;
        };
        let end = closing(code, at + open).unwrap_or(code.len());
        let arguments = &code[at + open..end];
        arguments.match_indices("elapsed()").any(|(at, call)| {
            let rest = arguments[at + call.len()..].trim_start();
            rest.starts_with('<')
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(path: &str, text: &str) -> Vec<usize> {
        let found = patient_tests(&SourceFile::new(path, text));
        found.iter().map(|violation| violation.line).collect()
    }

    #[test]
    fn a_deadline_that_a_loaded_host_misses_is_caught() {
        let text = "const TIME: Duration = Duration::from_secs(30);\n\
                    const LONG: Duration = Duration::from_secs(60);\n\
                    let a = Instant::now() + Duration::from_secs(5);\n\
                    let b = Instant::now() + std::time::Duration::from_secs(1_000);\n\
                    let c = done.recv_timeout(Duration::from_secs(10));\n\
                    let at = Duration::from_secs(7);\n\
                    gate.hold(Duration::from_secs(3));\n\
                    let d = done.recv_timeout(Duration::from_millis(50));\n";
        assert_eq!(lines("vmm/tests/a.rs", text), [1, 3, 5]);
        assert_eq!(lines("vmm/src/a.rs", text), [0; 0]);
        let unit = format!("{text}#[cfg(test)]\nmod tests {{\n{text}}}\n");
        assert_eq!(lines("vmm/src/a.rs", &unit), [11, 13, 15]);
    }

    #[test]
    fn an_asserted_speed_is_caught_in_tests_and_free_in_benches() {
        let text = "assert!(\n    begun.elapsed() < TIME, \"{:?}\", begun.elapsed()\n);\n\
                    assert!(begun.elapsed() >= TIME);\n\
                    while begun.elapsed() < TIME {}\n\
                    prop_assert!(1 > 2 || begun.elapsed() <= TIME);\n";
        assert_eq!(lines("tests/tests/a.rs", text), [1, 6]);
        assert_eq!(lines("dedup/benches/a.rs", text), [0; 0]);
    }
}
