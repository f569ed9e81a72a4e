//! Where `unsafe` may be: in few modules, marked where they are declared, listed in ARCHITECTURE.md.

use crate::mask::{Masked, closing, find_word, leading_identifier, line_of, skip_attributes};
use crate::tree::SourceFile;
use crate::violation::Violation;

const RULE: &str = "marked-unsafe";
const ITEM_MARK: &str = "#[expect(";
const FILE_MARK: &str = "#![expect(";
/// Bare-metal code is unsafe all over, so its crate root may carry the mark for the whole crate.
const BARE_METAL: &str = "resources/pageload/guest/";

/// The Rust files of the tree with their code masked once.
#[derive(Debug)]
pub(crate) struct Modules {
    files: Vec<(String, String)>,
}

impl Modules {
    /// Masks the Rust files of `tree`.
    pub(crate) fn new(tree: &[SourceFile]) -> Modules {
        let masked = |file: &SourceFile| (file.path.clone(), Masked::new(&file.text).code);
        Modules {
            files: tree
                .iter()
                .filter(|file| file.is_rust())
                .map(masked)
                .collect(),
        }
    }

    /// Rule `marked-unsafe`: `unsafe` only in marked modules, and the mark only on modules.
    pub(crate) fn violations(&self) -> Vec<Violation> {
        let mut found = Vec::new();
        for (path, code) in &self.files {
            if !self.is_marked(path)
                && let Some(at) =
                    find_word(code, "unsafe").find(|&at| !self.in_marked_module(code, at))
            {
                let message = "`unsafe` in a module that is not marked: move it to a marked one, or declare this one \
                               `#[expect(unsafe_code, reason = \"...\")] mod name;`";
                found.push(Violation::new(RULE, path, line_of(code, at), message));
            }
            for (line, module) in marks(code) {
                if module.is_none() {
                    let message = "only a module may be marked for unsafe code, not an item in it";
                    found.push(Violation::new(RULE, path, line, message));
                }
            }
            for (at, _) in code.match_indices("allow(unsafe_code") {
                let message = "unsafe code is expected with a reason, never allowed";
                found.push(Violation::new(RULE, path, line_of(code, at), message));
            }
            if is_library_root(path)
                && !path.starts_with(BARE_METAL)
                && expectations(code, FILE_MARK).next().is_some()
            {
                let message =
                    "a whole crate is marked for unsafe code: mark the module that needs it";
                found.push(Violation::new(RULE, path, 1, message));
            }
        }
        found
    }

    /// Rule `listed-unsafe`: ARCHITECTURE.md names every product file that holds unsafe code.
    pub(crate) fn unlisted(&self, architecture: &str) -> Vec<Violation> {
        self.files
            .iter()
            .filter(|(path, _)| !SourceFile::new(path, "").is_test_code() && !path.starts_with(BARE_METAL))
            .filter_map(|(path, code)| {
                let at = find_word(code, "unsafe").next()?;
                let message = format!(
                    "unsafe code that ARCHITECTURE.md does not list: add `{path}` to its table \"Unsafe code\""
                );
                (!architecture.contains(&format!("`{path}`")))
                    .then(|| Violation::new("listed-unsafe", path, line_of(code, at), message))
            })
            .collect()
    }

    /// Whether the module in `path`, or one around it, is marked.
    fn is_marked(&self, path: &str) -> bool {
        let Some(code) = self.code(path) else {
            return false;
        };
        if expectations(code, FILE_MARK).next().is_some() {
            return true;
        }
        let Some((parent, name)) = self.parent(path) else {
            return false;
        };
        let declared_marked = self.code(&parent).is_some_and(|code| {
            marks(code).any(|(_, module)| module.as_deref() == Some(name.as_str()))
        });
        declared_marked || self.is_marked(&parent)
    }

    /// Whether the byte at `at` is inside a marked module written out in this very file.
    fn in_marked_module(&self, code: &str, at: usize) -> bool {
        expectations(code, ITEM_MARK).any(|(_, item)| {
            let start = code.len() - item.len();
            let open = item
                .find(['{', ';'])
                .filter(|&end| item.as_bytes()[end] == b'{');
            item.starts_with("mod ")
                && open
                    .and_then(|open| closing(item, open))
                    .is_some_and(|end| (start..start + end).contains(&at))
        })
    }

    fn code(&self, path: &str) -> Option<&str> {
        let (_, code) = self.files.iter().find(|(known, _)| known == path)?;
        Some(code)
    }

    /// The file that declares the module in `path`, and the module's name; `None` for a crate root.
    fn parent(&self, path: &str) -> Option<(String, String)> {
        if is_library_root(path) {
            return None;
        }
        let (directory, file) = path.rsplit_once('/')?;
        let (directory, name) = match file {
            "mod.rs" => directory.rsplit_once('/')?,
            _ => (directory, file.strip_suffix(".rs")?),
        };
        ["/mod.rs", "/lib.rs", "/main.rs", ".rs"]
            .into_iter()
            .map(|end| format!("{directory}{end}"))
            .find(|parent| parent != path && self.code(parent).is_some())
            .map(|parent| (parent, name.to_owned()))
    }
}

fn is_library_root(path: &str) -> bool {
    path.ends_with("/src/lib.rs") || path.ends_with("/src/main.rs")
}

/// The line of each mark on an item, and the name of the module it marks (`None` where it marks something else).
fn marks(code: &str) -> impl Iterator<Item = (usize, Option<String>)> + '_ {
    expectations(code, ITEM_MARK).map(|(at, item)| {
        let module = item
            .strip_prefix("mod ")
            .map(|rest| leading_identifier(rest).to_owned());
        (line_of(code, at), module)
    })
}

/// Where `code` expects unsafe code by an attribute that starts with `start`, and the text after that attribute and
/// those that follow it.
fn expectations<'a>(code: &'a str, start: &'a str) -> impl Iterator<Item = (usize, &'a str)> {
    code.match_indices(start).filter_map(|(at, _)| {
        let end = closing(code, at + start.len() - "[expect(".len())?;
        find_word(&code[at..end], "unsafe_code").next()?;
        Some((at, skip_attributes(&code[end + 1..])))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const USES_UNSAFE: &str = "fn f() { unsafe { g() } }\n";

    fn violations(files: &[(&str, &str)]) -> Vec<String> {
        let tree: Vec<SourceFile> = files
            .iter()
            .map(|(path, text)| SourceFile::new(path, text))
            .collect();
        Modules::new(&tree)
            .violations()
            .iter()
            .map(ToString::to_string)
            .collect()
    }

    #[test]
    fn unsafe_in_an_unmarked_module_is_caught() {
        let found = violations(&[
            ("vmm/src/lib.rs", "mod bus;\n"),
            ("vmm/src/bus.rs", USES_UNSAFE),
        ]);
        assert_eq!(found.len(), 1);
        assert!(found[0].starts_with("vmm/src/bus.rs:1: [marked-unsafe]"));
    }

    #[test]
    fn a_mark_covers_the_module_and_those_below_it() {
        let root = "#[expect(\n    unsafe_code,\n    reason = \"ioctls\"\n)]\n/// Docs.\npub(crate) mod kvm;\n";
        let found = violations(&[
            ("vmm/src/lib.rs", root),
            ("vmm/src/kvm.rs", "mod vcpu;\n"),
            ("vmm/src/kvm/vcpu.rs", USES_UNSAFE),
        ]);
        assert!(found.is_empty(), "{found:?}");
    }

    #[test]
    fn an_inline_marked_module_covers_only_itself() {
        let text =
            "#[expect(unsafe_code, reason = \"x\")]\nmod raw { fn f() { unsafe { g() } } }\n";
        assert!(violations(&[("vmm/src/a.rs", text)]).is_empty());
        let outside = format!("{text}{USES_UNSAFE}");
        assert!(violations(&[("vmm/src/a.rs", &outside)])[0].starts_with("vmm/src/a.rs:3:"));
    }

    #[test]
    fn marks_on_functions_and_crates_and_allows_are_caught() {
        let on_function = format!("#[expect(unsafe_code, reason = \"x\")]\n{USES_UNSAFE}");
        assert_eq!(violations(&[("vmm/src/a.rs", &on_function)]).len(), 2);
        let on_crate = format!("#![expect(unsafe_code, reason = \"x\")]\n{USES_UNSAFE}");
        assert_eq!(violations(&[("vmm/src/lib.rs", &on_crate)]).len(), 1);
        assert!(violations(&[("resources/pageload/guest/src/main.rs", &on_crate)]).is_empty());
        assert!(violations(&[("tests/tests/leaks.rs", &on_crate)]).is_empty());
        assert_eq!(
            violations(&[("a/src/b.rs", "#[allow(unsafe_code)]\nmod x;\n")]).len(),
            1
        );
    }

    #[test]
    fn the_word_in_a_comment_or_a_lint_name_is_not_unsafe_code() {
        let text = "// unsafe\n#![deny(unsafe_code)]\nconst A: &str = \"unsafe\";\n";
        assert!(violations(&[("vmm/src/a.rs", text)]).is_empty());
    }

    #[test]
    fn an_unlisted_unsafe_file_is_caught() {
        let modules = Modules::new(&[SourceFile::new("vmm/src/kvm/vcpu.rs", USES_UNSAFE)]);
        assert_eq!(modules.unlisted("| `vmm/src/kvm/vm.rs` |").len(), 1);
        assert!(
            modules
                .unlisted("| `vmm/src/kvm/vcpu.rs` | ioctls |")
                .is_empty()
        );
    }
}
