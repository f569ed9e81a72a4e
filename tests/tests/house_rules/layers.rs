//! Where the modules of a layered crate may import from.

use std::collections::{BTreeMap, VecDeque};

use crate::mask::{Masked, closing, find_word, leading_identifier, line_of, test_module_line};
use crate::tree::SourceFile;
use crate::violation::Violation;

/// A crate whose modules lie in folders by layer.
#[derive(Debug)]
pub(crate) struct Layered {
    /// Where its modules are.
    pub(crate) source: &'static str,
    /// The folders, the highest first. What lies beside them is above all of them.
    pub(crate) layers: &'static [&'static str],
}

/// The crates that have layers.
pub(crate) const LAYERED: [Layered; 1] = [Layered {
    source: "dedup/src/",
    layers: &[
        "protocol", "scan", "merge", "backing", "index", "pages", "base",
    ],
}];

/// What one module names of its own crate.
#[derive(Debug)]
struct Import {
    line: usize,
    /// Segments below the crate's root.
    path: Vec<String>,
}

impl Layered {
    /// Rule `layers`: a module imports from its own layer and from those below it.
    pub(crate) fn upward_imports(&self, tree: &[SourceFile]) -> Vec<Violation> {
        let mut found = Vec::new();
        for file in self.own_files(tree) {
            let module = self.module(file);
            let Some(own) = self.rank(&module) else {
                continue;
            };
            for import in imports(file, &module) {
                let rank = self.rank(&import.path);
                if rank.is_none_or(|rank| rank < own) {
                    let (from, to) = (&module[0], import.path.join("::"));
                    let message = format!("{from} is below crate::{to}, and must not know of it");
                    found.push(Violation::new("layers", &file.path, import.line, message));
                }
            }
        }
        found
    }

    /// Rule `no-import-circles`: no module imports what imports it, by whatever way.
    pub(crate) fn circles(&self, tree: &[SourceFile]) -> Vec<Violation> {
        let files: BTreeMap<Vec<String>, &SourceFile> = self
            .own_files(tree)
            .map(|file| (self.module(file), file))
            .collect();
        let imported = |module: &Vec<String>| -> Vec<Vec<String>> {
            let targets = imports(files[module], module).into_iter();
            targets
                .filter_map(|import| longest_module(&files, import.path))
                .filter(|target| target != module)
                .collect()
        };
        let arrows: BTreeMap<&Vec<String>, Vec<Vec<String>>> = files
            .keys()
            .map(|module| (module, imported(module)))
            .collect();
        let mut found = Vec::new();
        for (module, file) in &files {
            if let Some(way) = way_back(&arrows, module) {
                let names: Vec<String> = way.iter().map(|step| step.join("::")).collect();
                let message = format!("imports itself: {}", names.join(" -> "));
                found.push(Violation::new("no-import-circles", &file.path, 1, message));
            }
        }
        found
    }

    fn own_files<'a>(&self, tree: &'a [SourceFile]) -> impl Iterator<Item = &'a SourceFile> {
        tree.iter()
            .filter(|file| file.is_rust() && file.path.starts_with(self.source))
            .filter(|file| !file.is_test_code() && !file.path.ends_with("/lib.rs"))
    }

    /// The path of a file's module below the crate's root.
    fn module(&self, file: &SourceFile) -> Vec<String> {
        let path = file.path.trim_start_matches(self.source);
        let path = path.trim_end_matches(".rs").trim_end_matches("/mod");
        path.split('/').map(str::to_owned).collect()
    }

    /// The place of a module's layer, counted from the highest; `None` above all of them.
    fn rank(&self, module: &[String]) -> Option<usize> {
        let layer = module.first()?;
        self.layers.iter().position(|name| name == layer)
    }
}

/// What a file names of its own crate outside of its test module.
fn imports(file: &SourceFile, module: &[String]) -> Vec<Import> {
    let code = Masked::new(&file.text).code;
    let own_lines = test_module_line(&code).unwrap_or(usize::MAX);
    let below_root = find_word(&code, "crate").map(|at| (at, "crate", 0));
    let parent_depth = module.len() - 1;
    let below_parent = find_word(&code, "super").map(|at| (at, "super", parent_depth));
    let mut found = Vec::new();
    for (at, word, depth) in below_root.chain(below_parent) {
        let line = line_of(&code, at);
        let Some(rest) = code[at + word.len()..].strip_prefix("::") else {
            continue;
        };
        // `pub(in crate::x)` and paths of attributes do not occur; `super::super` is one of each.
        if line < own_lines {
            let prefix = &module[..depth];
            found.extend(paths(rest).into_iter().map(|path| Import {
                line,
                path: [prefix, &path].concat(),
            }));
        }
    }
    found
}

/// The paths that begin at `text`, more than one for a group in braces.
fn paths(text: &str) -> Vec<Vec<String>> {
    let text = text.trim_start();
    if text.starts_with('{') {
        let end = closing(text, 0).unwrap_or(text.len());
        return members(&text[1..end]).into_iter().flat_map(paths).collect();
    }
    let name = leading_identifier(text);
    match text[name.len()..].strip_prefix("::") {
        Some(rest) => paths(rest)
            .into_iter()
            .map(|path| [vec![name.to_owned()], path].concat())
            .collect(),
        None => vec![vec![name.to_owned()]],
    }
}

/// The members of a group, split where no inner group is open.
fn members(group: &str) -> Vec<&str> {
    let mut depth = 0_usize;
    let is_border = |byte: char| {
        match byte {
            '{' => depth += 1,
            '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        byte == ',' && depth == 0
    };
    let members = group.split(is_border).map(str::trim);
    members.filter(|member| !member.is_empty()).collect()
}

/// The module that a path leads into.
fn longest_module(
    files: &BTreeMap<Vec<String>, &SourceFile>,
    mut path: Vec<String>,
) -> Option<Vec<String>> {
    while !path.is_empty() && !files.contains_key(&path) {
        path.pop();
    }
    (!path.is_empty()).then_some(path)
}

/// The shortest way from a module back to itself.
fn way_back<'a>(
    arrows: &'a BTreeMap<&'a Vec<String>, Vec<Vec<String>>>,
    start: &'a Vec<String>,
) -> Option<Vec<&'a Vec<String>>> {
    let mut before: BTreeMap<&Vec<String>, &Vec<String>> = BTreeMap::new();
    let mut queue = VecDeque::from([start]);
    while let Some(module) = queue.pop_front() {
        for next in &arrows[module] {
            if before.contains_key(next) {
                continue;
            }
            before.insert(next, module);
            queue.push_back(next);
        }
    }
    let mut way = vec![start, before.get(start)?];
    while way.last() != Some(&start) {
        way.push(before[way[way.len() - 1]]);
    }
    way.reverse();
    Some(way)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(files: &[(&str, &str)]) -> Vec<SourceFile> {
        let file = |&(path, text): &(&str, &str)| SourceFile::new(path, text);
        files.iter().map(file).collect()
    }

    #[test]
    fn an_import_from_a_higher_layer_is_caught() {
        let found = LAYERED[0].upward_imports(&tree(&[
            ("dedup/src/lib.rs", "use protocol::ring;\n"),
            ("dedup/src/engine.rs", "use crate::protocol::ring::Ring;\n"),
            (
                "dedup/src/merge/a.rs",
                "use crate::base::page;\nuse crate::merge::b;\nuse crate::{base, scan::visit};\n",
            ),
            (
                "dedup/src/base/page.rs",
                "fn f() { crate::engine::start() }\n",
            ),
            (
                "dedup/src/index/c.rs",
                "// use crate::merge\n#[cfg(test)]\nmod tests { use crate::merge::a; }\n",
            ),
            ("dedup/src/index/c/tests.rs", "use crate::merge::a;\n"),
            ("vmm/src/base/x.rs", "use crate::vm::start;\n"),
        ]));
        let places: Vec<_> = found.iter().map(|v| (v.path.as_str(), v.line)).collect();
        assert_eq!(
            places,
            [("dedup/src/merge/a.rs", 3), ("dedup/src/base/page.rs", 1)]
        );
    }

    #[test]
    fn a_circle_is_caught_by_each_module_of_it() {
        let found = LAYERED[0].circles(&tree(&[
            ("dedup/src/base/a.rs", "use crate::base::b::{self, B};\n"),
            ("dedup/src/base/b.rs", "use super::c::C;\n"),
            (
                "dedup/src/base/c.rs",
                "use crate::base::{a::A, d};\nuse crate::base::c::own;\n",
            ),
            ("dedup/src/base/d.rs", "use std::io;\n"),
            ("dedup/src/base/e.rs", "use crate::base::a::A;\n"),
        ]));
        let paths: Vec<_> = found.iter().map(|v| v.path.as_str()).collect();
        assert_eq!(
            paths,
            [
                "dedup/src/base/a.rs",
                "dedup/src/base/b.rs",
                "dedup/src/base/c.rs"
            ]
        );
        assert!(
            found[0]
                .message
                .ends_with("base::a -> base::b -> base::c -> base::a")
        );
    }
}
