//! The house rules that neither the compiler nor clippy can hold, as tests over the text of the tree.
//!
//! A rule is a pure function from text to violations, is tested with a bad sample beside it, and has a permanent name
//! under which CONTRIBUTING.md explains it. The tests here only read the tree and apply the rules.
//!
//! | module | what |
//! |---|---|
//! | `tree` | the files of the repository |
//! | `violation` | one broken rule at one place |
//! | `mask` | Rust text without its comments and literals |
//! | `functions` | where the functions of a file are |
//! | `size`, `unsafety`, `names`, `leftovers`, `timing`, `manifests`, `documents`, `licences`, `layers` | the rules |

mod documents;
mod functions;
mod layers;
mod leftovers;
mod licences;
mod manifests;
mod mask;
mod names;
mod size;
mod timing;
mod tree;
mod unsafety;
mod violation;

use tree::SourceFile;
use violation::{Violation, assert_none};

/// Every rule by its permanent name.
const RULES: [&str; 22] = [
    "allowed-licences",
    "behaviour-names",
    "decided-once",
    "figures-have-commands",
    "layers",
    "listed-unsafe",
    "lock-order",
    "marked-unsafe",
    "module-table",
    "named-rules",
    "no-absolute-paths",
    "no-import-circles",
    "no-sleeping-tests",
    "nothing-left-over",
    "one-direction",
    "one-vm-memory",
    "patient-tests",
    "short-files",
    "short-functions",
    "short-lines",
    "telling-names",
    "unreleased-changes",
];

/// Text that others wrote, or that a tool writes: not ours to format.
fn is_ours(file: &SourceFile) -> bool {
    let foreign_endings = [
        ".lock", ".patch", ".config", ".diff", ".json", ".yaml", ".svg",
    ];
    file.path != "LICENSE"
        && !file.path.starts_with("tests/fuzz/seeds/")
        && !foreign_endings
            .iter()
            .any(|ending| file.path.ends_with(ending))
}

fn in_all(
    rule: impl Fn(&SourceFile) -> Vec<Violation>,
    which: impl Fn(&SourceFile) -> bool,
) -> Vec<Violation> {
    let tree = tree::load();
    tree.iter()
        .filter(|file| which(file))
        .flat_map(rule)
        .collect()
}

fn is_crate_root(file: &SourceFile) -> bool {
    file.path.ends_with("src/lib.rs")
}

#[test]
fn the_tree_is_read() {
    let tree = tree::load();
    assert!(tree.iter().filter(|file| file.is_rust()).count() > 10);
    assert!(
        tree.iter()
            .any(|file| file.path == "tests/tests/house_rules/main.rs")
    );
}

#[test]
fn files_are_short() {
    assert_none(&in_all(size::short_files, SourceFile::is_rust));
}

#[test]
fn functions_are_short() {
    assert_none(&in_all(size::short_functions, SourceFile::is_rust));
}

#[test]
fn lines_are_short() {
    assert_none(&in_all(size::short_lines, is_ours));
}

#[test]
fn unsafe_code_is_in_marked_modules() {
    assert_none(&unsafety::Modules::new(&tree::load()).violations());
}

#[test]
fn unsafe_code_is_listed_in_the_architecture() {
    let tree = tree::load();
    let architecture = &tree::file(&tree, "ARCHITECTURE.md").text;
    assert_none(&unsafety::Modules::new(&tree).unlisted(architecture));
}

#[test]
fn nothing_is_left_over() {
    assert_none(&in_all(leftovers::nothing_left_over, is_ours));
}

#[test]
fn no_file_names_a_developers_path() {
    let checkout = tree::root();
    assert_none(&in_all(
        |file| leftovers::no_absolute_paths(file, &checkout),
        |_| true,
    ));
}

#[test]
fn tests_do_not_sleep() {
    assert_none(&in_all(leftovers::no_sleeping_tests, SourceFile::is_rust));
}

#[test]
fn tests_are_patient() {
    assert_none(&in_all(timing::patient_tests, SourceFile::is_rust));
}

#[test]
fn tests_are_named_by_behaviour() {
    assert_none(&in_all(names::behaviour_names, SourceFile::is_rust));
}

#[test]
fn types_and_files_have_telling_names() {
    assert_none(&in_all(names::telling_names, SourceFile::is_rust));
}

#[test]
fn dependencies_have_one_direction() {
    assert_none(&in_all(manifests::one_direction, |file| {
        file.file_name() == "Cargo.toml"
    }));
}

#[test]
fn layers_import_only_what_is_below_them() {
    let tree = tree::load();
    let found = |layered: &layers::Layered| layered.upward_imports(&tree);
    assert_none(&layers::LAYERED.iter().flat_map(found).collect::<Vec<_>>());
}

#[test]
fn no_module_imports_itself() {
    let tree = tree::load();
    let found = |layered: &layers::Layered| layered.circles(&tree);
    assert_none(&layers::LAYERED.iter().flat_map(found).collect::<Vec<_>>());
}

#[test]
fn members_inherit_from_the_workspace() {
    let tree = tree::load();
    let members = manifests::string_array(&tree::file(&tree, "Cargo.toml").text, "members");
    assert!(members.len() >= 4, "read only {members:?} from Cargo.toml");
    let found: Vec<Violation> = members
        .iter()
        .map(|member| tree::file(&tree, &format!("{member}/Cargo.toml")))
        .flat_map(manifests::decided_once)
        .collect();
    assert_none(&found);
}

#[test]
fn there_is_one_version_of_vm_memory() {
    assert_none(&in_all(manifests::one_vm_memory, |file| {
        file.path == "Cargo.lock"
    }));
}

#[test]
fn crates_document_their_modules() {
    assert_none(&in_all(documents::module_table, is_crate_root));
}

#[test]
fn crates_document_their_locks() {
    assert_none(&in_all(documents::lock_order, is_crate_root));
}

#[test]
fn the_changelog_is_open_for_changes() {
    let tree = tree::load();
    assert_none(&documents::unreleased_changes(tree::file(
        &tree,
        "CHANGELOG.md",
    )));
}

#[test]
fn every_figure_names_its_command() {
    let tree = tree::load();
    assert_none(&documents::figures_have_commands(tree::file(
        &tree,
        "SPECIFICATION.md",
    )));
}

#[test]
fn every_rule_is_explained() {
    let tree = tree::load();
    assert_none(&documents::named_rules(
        tree::file(&tree, "CONTRIBUTING.md"),
        &RULES,
    ));
}

#[test]
fn dependencies_have_allowed_licences() {
    let tree = tree::load();
    let allowed = manifests::string_array(&tree::file(&tree, "deny.toml").text, "allow");
    assert!(!allowed.is_empty(), "deny.toml allows no licence");
    let metadata = licences::metadata().unwrap_or_else(|error| panic!("{error}"));
    assert!(
        metadata["packages"]
            .as_array()
            .is_some_and(|packages| packages.len() > 20)
    );
    assert_none(&licences::allowed_licences(&metadata, &allowed));
}
