//! Names that say nothing, or say it twice.

use crate::functions::functions;
use crate::mask::{Masked, find_word, leading_identifier, line_of};
use crate::tree::SourceFile;
use crate::violation::Violation;

const EMPTY_ENDINGS: [&str; 7] = [
    "Manager", "Helper", "Helpers", "Util", "Utils", "Context", "Data",
];
const EMPTY_FILES: [&str; 8] = [
    "util.rs",
    "utils.rs",
    "helper.rs",
    "helpers.rs",
    "misc.rs",
    "manager.rs",
    "context.rs",
    "data.rs",
];

/// Rule `telling-names`: a type or a file is named after the one thing it is.
pub(crate) fn telling_names(file: &SourceFile) -> Vec<Violation> {
    let rule = "telling-names";
    let code = Masked::new(&file.text).code;
    let mut found = Vec::new();
    for keyword in ["struct", "enum", "trait", "type", "union"] {
        for at in find_word(&code, keyword) {
            let name = leading_identifier(&code[at + keyword.len()..]);
            if let Some(ending) = EMPTY_ENDINGS.iter().find(|ending| name.ends_with(*ending)) {
                let message =
                    format!("{keyword} {name}: name what it is, \"{ending}\" says nothing");
                found.push(Violation::new(
                    rule,
                    &file.path,
                    line_of(&code, at),
                    message,
                ));
            }
        }
    }
    if EMPTY_FILES.contains(&file.file_name()) {
        let message = format!("{}: a file is named after its one noun", file.file_name());
        found.push(Violation::new(rule, &file.path, 1, message));
    }
    found
}

/// Rule `behaviour-names`: a test's name reads as the behaviour it shows.
pub(crate) fn behaviour_names(file: &SourceFile) -> Vec<Violation> {
    functions(&Masked::new(&file.text).code)
        .into_iter()
        .filter(|function| function.is_test && function.name.starts_with("test_"))
        .map(|function| {
            let message = format!("{}: name the behaviour, without `test_`", function.name);
            Violation::new("behaviour-names", &file.path, function.line, message)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(found: &[Violation]) -> Vec<usize> {
        found.iter().map(|violation| violation.line).collect()
    }

    #[test]
    fn names_that_say_nothing_are_caught() {
        let text = "pub struct VmManager;\nenum Ok { A }\ntrait PageHelper {}\ntype X = Y;\nstruct IoUtils<T>(T);\n\
                    use event_manager::EventManager;\n// struct CommentManager\n";
        assert_eq!(
            lines(&telling_names(&SourceFile::new("a.rs", text))),
            [1, 5, 3]
        );
        assert_eq!(
            lines(&telling_names(&SourceFile::new("vmm/src/utils.rs", ""))),
            [1]
        );
    }

    #[test]
    fn a_test_prefix_is_caught_only_on_tests() {
        let text = "#[test]\nfn test_merge() {}\n#[test]\nfn merges() {}\nfn test_bed() {}\n";
        assert_eq!(lines(&behaviour_names(&SourceFile::new("a.rs", text))), [2]);
    }
}
