//! What the Cargo files say: who may name whom, and that everything is decided once, in the workspace.

use crate::tree::SourceFile;
use crate::violation::Violation;

/// What a layer must never name, by the start of the package's name. `api -> vmm -> dedup`, and dedup knows no VMM.
const LAYERS: [(&str, &[&str]); 3] = [
    (
        "dedup/Cargo.toml",
        &[
            "kvm",
            "virtio",
            "hyper",
            "tokio",
            "http",
            "clap",
            "event-manager",
            "linux-loader",
            "vm-superio",
            "vmm",
            "samepage",
        ],
    ),
    (
        "vmm/Cargo.toml",
        &["hyper", "tokio", "http", "clap", "samepage"],
    ),
    (
        "resources/pageload/workload/Cargo.toml",
        &[
            "dedup", "vmm", "samepage", "kvm", "virtio", "hyper", "tokio",
        ],
    ),
];

/// One `key = value` line of a TOML file, with the table it is in.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry<'a> {
    line: usize,
    table: &'a str,
    key: &'a str,
    value: &'a str,
}

/// The entries of the plain TOML that Cargo manifests are written in: one entry a line, arrays may go on.
fn entries(text: &str) -> Vec<Entry<'_>> {
    let mut table = "";
    let mut found = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if let Some(header) = line.strip_prefix('[') {
            table = header
                .trim_start_matches('[')
                .split(']')
                .next()
                .unwrap_or("");
        } else if let Some((key, value)) = line.split_once('=')
            && !line.starts_with('#')
        {
            found.push(Entry {
                line: index + 1,
                table,
                key: key.trim(),
                value: value.trim(),
            });
        }
    }
    found
}

/// The dependencies of a manifest: the package's name as written, and its entry.
fn dependencies(text: &str) -> Vec<(&str, Entry<'_>)> {
    let is_dependencies = |table: &str| {
        matches!(
            table.rsplit('.').next(),
            Some("dependencies" | "dev-dependencies" | "build-dependencies")
        ) && !table.starts_with("workspace")
    };
    entries(text)
        .into_iter()
        .filter(|entry| is_dependencies(entry.table))
        .map(|entry| (entry.key.split('.').next().unwrap_or(entry.key), entry))
        .collect()
}

/// The strings of the array that is the value of `key` in `text`, over one line or many.
pub(crate) fn string_array(text: &str, key: &str) -> Vec<String> {
    let code: String = text
        .lines()
        .map(|line| line.split('#').next().unwrap_or("").to_owned() + "\n")
        .collect();
    let Some(array) = code.lines().enumerate().find_map(|(index, line)| {
        let (found, _) = line.split_once('=')?;
        (found.trim() == key).then(|| code.lines().skip(index).collect::<Vec<_>>().join("\n"))
    }) else {
        return Vec::new();
    };
    let array = array.split(']').next().unwrap_or("");
    array
        .split('"')
        .skip(1)
        .step_by(2)
        .map(str::to_owned)
        .collect()
}

/// Rule `one-direction`: a lower layer never names an upper one, nor what only the upper one may know.
pub(crate) fn one_direction(manifest: &SourceFile) -> Vec<Violation> {
    let Some((_, banned)) = LAYERS.iter().find(|(path, _)| *path == manifest.path) else {
        return Vec::new();
    };
    dependencies(&manifest.text)
        .into_iter()
        .filter(|(name, _)| banned.iter().any(|start| name.starts_with(start)))
        .map(|(name, entry)| {
            let message =
                format!("must not depend on {name}: the direction is api -> vmm -> dedup");
            Violation::new("one-direction", &manifest.path, entry.line, message)
        })
        .collect()
}

/// Rule `decided-once`: members inherit lints, versions and dependencies from the workspace.
pub(crate) fn decided_once(manifest: &SourceFile) -> Vec<Violation> {
    let rule = "decided-once";
    let mut found = Vec::new();
    let all = entries(&manifest.text);
    let inherits_lints = all
        .iter()
        .any(|entry| entry.table == "lints" && entry.key == "workspace" && entry.value == "true");
    if !inherits_lints {
        found.push(Violation::new(
            rule,
            &manifest.path,
            1,
            "lacks `[lints] workspace = true`",
        ));
    }
    for key in ["version", "edition", "license", "publish"] {
        let inherited = format!("{key}.workspace");
        let own = all
            .iter()
            .find(|entry| entry.table == "package" && entry.key == key);
        let line = own.map_or(1, |entry| entry.line);
        if !all
            .iter()
            .any(|entry| entry.table == "package" && entry.key == inherited)
        {
            let message = format!("lacks `{key}.workspace = true`");
            found.push(Violation::new(rule, &manifest.path, line, message));
        }
    }
    for (name, entry) in dependencies(&manifest.text) {
        let is_inherited = (entry.key.ends_with(".workspace") && entry.value == "true")
            || entry.value.replace(' ', "").contains("workspace=true");
        if !is_inherited {
            let message = format!(
                "dependency {name} is not taken from the workspace: {}",
                entry.value
            );
            found.push(Violation::new(rule, &manifest.path, entry.line, message));
        }
    }
    found
}

/// Rule `one-vm-memory`: two versions would be two types of guest memory that cannot meet.
pub(crate) fn one_vm_memory(lock: &SourceFile) -> Vec<Violation> {
    let lines: Vec<usize> = lock
        .text
        .lines()
        .enumerate()
        .filter(|(_, line)| *line == "name = \"vm-memory\"")
        .map(|(index, _)| index + 1)
        .collect();
    if lines.len() == 1 {
        return Vec::new();
    }
    let message = format!("{} versions of vm-memory, must be exactly one", lines.len());
    vec![Violation::new(
        "one-vm-memory",
        &lock.path,
        lines.last().copied().unwrap_or(1),
        message,
    )]
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "[package]\nversion.workspace = true\nedition.workspace = true\nlicense.workspace = true\n\
                        publish.workspace = true\n[lints]\nworkspace = true\n[dependencies]\nlibc.workspace = true\n\
                        log = { workspace = true, features = [\"std\"] }\n";

    #[test]
    fn a_good_manifest_passes() {
        let manifest = SourceFile::new("dedup/Cargo.toml", GOOD);
        assert_eq!(decided_once(&manifest), []);
        assert_eq!(one_direction(&manifest), []);
    }

    #[test]
    fn an_upward_dependency_is_caught_in_every_table() {
        let text = format!(
            "{GOOD}kvm-ioctls.workspace = true\n[dev-dependencies]\nvmm.workspace = true\n"
        );
        let found = one_direction(&SourceFile::new("dedup/Cargo.toml", &text));
        assert_eq!(found.iter().map(|v| v.line).collect::<Vec<_>>(), [11, 13]);
        let target = "[target.'cfg(unix)'.dependencies]\ntokio.workspace = true\n";
        assert_eq!(
            one_direction(&SourceFile::new("vmm/Cargo.toml", target)).len(),
            1
        );
        assert!(one_direction(&SourceFile::new("api/Cargo.toml", &text)).is_empty());
    }

    #[test]
    fn a_member_that_decides_for_itself_is_caught() {
        let text = GOOD
            .replace("edition.workspace = true", "edition = \"2021\"")
            .replace("[lints]\nworkspace = true\n", "")
            + "serde = \"1\"\n";
        let found = decided_once(&SourceFile::new("api/Cargo.toml", &text));
        assert_eq!(found.len(), 3, "{found:?}");
    }

    #[test]
    fn none_or_two_versions_of_vm_memory_are_caught() {
        let one = "name = \"vm-memory\"\nname = \"vm-memory-x\"\n";
        assert!(one_vm_memory(&SourceFile::new("Cargo.lock", one)).is_empty());
        assert_eq!(
            one_vm_memory(&SourceFile::new("Cargo.lock", &one.repeat(2))).len(),
            1
        );
        assert_eq!(one_vm_memory(&SourceFile::new("Cargo.lock", "")).len(), 1);
    }

    #[test]
    fn arrays_are_read_over_lines_and_comments() {
        let text = "x = []\nallow = [ # why\n  \"MIT\", # \"GPL\"\n  \"ISC\",\n]\ndeny = [\"y\"]\n";
        assert_eq!(string_array(text, "allow"), ["MIT", "ISC"]);
        assert_eq!(
            string_array("members = [\"a\", \"b\"]", "members"),
            ["a", "b"]
        );
        assert!(string_array(text, "none").is_empty());
    }
}
