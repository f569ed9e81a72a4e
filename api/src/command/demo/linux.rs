//! Linux guests: they write a file into their memory, and check its checksum again and again.
//!
//! What can be shared among them is mostly Linux itself: kernel text and data, the unpacked
//! initramfs, page tables of zeros.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::guest::Account;
use crate::command::CommandError;

/// How the guest's lines on the console begin.
const MARK: &str = "samepage-demo:";

/// The kernel given, or the one that `resources/guest-linux/build` has made last.
pub(super) fn kernel(given: Option<&Path>) -> Result<PathBuf, CommandError> {
    given_or_built(given, "--kernel", "kernel-", "vmlinux")
}

/// As [`kernel`], for the initial ramdisk.
pub(super) fn initrd(given: Option<&Path>) -> Result<PathBuf, CommandError> {
    given_or_built(given, "--initrd", "initramfs-", "initramfs.cpio")
}

/// The command that the guest's init runs (`samepage.run`, see resources/guest-linux/README.md).
/// It cannot have double quotes.
pub(super) fn boot_args() -> String {
    let script = format!(
        "seq 1 100000 > /data; md5sum /data > /sum; echo {MARK} filled $(cat /sum); n=0; \
         while true; do if md5sum -c -s /sum; then n=$((n+1)); echo {MARK} pass $n; \
         else echo {MARK} error; fi; sleep 1; done"
    );
    format!("console=ttyS0 quiet samepage.run=\"{script}\"")
}

/// By what the guest has printed.
pub(super) fn account(console: &str) -> Account {
    let mut account = Account::default();
    let said = console
        .lines()
        .filter_map(|line| line.trim().strip_prefix(MARK));
    for words in said {
        match words.split_ascii_whitespace().collect::<Vec<_>>()[..] {
            ["filled", ..] => account.passes = Some(0),
            ["pass", number] => account.passes = number.parse().ok().or(account.passes),
            ["error"] => account.errors += 1,
            _ => {}
        }
    }
    account
}

fn given_or_built(
    given: Option<&Path>,
    flag: &str,
    directory_prefix: &str,
    file: &str,
) -> Result<PathBuf, CommandError> {
    if let Some(given) = given {
        return Ok(given.to_owned());
    }
    let cache = cache_dir(|name| std::env::var_os(name).map(PathBuf::from));
    let built = cache
        .as_deref()
        .and_then(|cache| newest(cache, directory_prefix, file));
    built.ok_or_else(|| {
        CommandError::Other(format!(
            "--guest linux: give {flag} FILE, or make one by resources/guest-linux/build"
        ))
    })
}

/// Where `resources/guest-linux/cache.sh` puts what it builds.
fn cache_dir(variable: impl Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
    let given = |name| variable(name).filter(|value| !value.as_os_str().is_empty());
    let samepage = given("SAMEPAGE_CACHE").or_else(|| {
        given("XDG_CACHE_HOME")
            .or_else(|| given("HOME").map(|home| home.join(".cache")))
            .map(|cache| cache.join("samepage"))
    });
    samepage.map(|samepage| samepage.join("guest-linux"))
}

/// `file` in the directory of this prefix that was published last.
fn newest(cache: &Path, directory_prefix: &str, file: &str) -> Option<PathBuf> {
    let entries = std::fs::read_dir(cache).ok()?;
    let built = entries.flatten().filter_map(|entry| {
        let name = entry.file_name();
        let path = entry.path().join(file);
        let is_built = name.to_str()?.starts_with(directory_prefix) && path.is_file();
        let published = entry.metadata().and_then(|metadata| metadata.modified());
        is_built.then(|| (published.unwrap_or(SystemTime::UNIX_EPOCH), path))
    });
    built.max().map(|(_, path)| path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn console_tells_passes_and_errors() {
        assert_eq!(account("samepage-init: ready\r\n").passes, None);
        let filled = "[    1.0] x\r\nsamepage-demo: filled 12ab /data\r\n";
        assert_eq!(account(filled).passes, Some(0));
        let checked = format!(
            "{filled}samepage-demo: pass 1\r\nsamepage-demo: error\r\nsamepage-demo: pass 2\r\n"
        );
        let expected = Account {
            passes: Some(2),
            errors: 1,
        };
        assert_eq!(account(&checked), expected);
        // The history begins in the middle once it is full.
        assert_eq!(
            account("e-demo: pass 7\r\nsamepage-demo: pass 8\r\n").passes,
            Some(8)
        );
    }

    #[test]
    fn boot_arguments_have_one_quoted_command() {
        let boot_args = boot_args();
        assert_eq!(boot_args.matches('"').count(), 2, "{boot_args}");
        assert!(
            boot_args.is_ascii() && boot_args.len() < 1024,
            "{boot_args}"
        );
    }

    #[test]
    fn cache_is_found_as_the_build_script_names_it() {
        let all = |name: &str| match name {
            "SAMEPAGE_CACHE" => Some(PathBuf::from("/s")),
            "XDG_CACHE_HOME" => Some(PathBuf::from("/x")),
            "HOME" => Some(PathBuf::from("/h")),
            _ => None,
        };
        let without = |missing: &'static [&str]| {
            cache_dir(move |name| all(name).filter(|_| !missing.contains(&name)))
        };
        assert_eq!(without(&[]), Some("/s/guest-linux".into()));
        let xdg = without(&["SAMEPAGE_CACHE"]);
        assert_eq!(xdg, Some("/x/samepage/guest-linux".into()));
        let home = without(&["SAMEPAGE_CACHE", "XDG_CACHE_HOME"]);
        assert_eq!(home, Some("/h/.cache/samepage/guest-linux".into()));
    }

    #[test]
    fn newest_complete_build_is_taken() {
        let cache = tempfile::tempdir().unwrap();
        assert_eq!(newest(cache.path(), "kernel-", "vmlinux"), None);
        for (name, has_file, age_secs) in [("a", true, 20), ("b", true, 10), ("c", false, 0)] {
            let directory = cache.path().join(format!("kernel-{name}"));
            std::fs::create_dir(&directory).unwrap();
            if has_file {
                std::fs::write(directory.join("vmlinux"), "").unwrap();
            }
            let published = SystemTime::now() - std::time::Duration::from_secs(age_secs);
            let opened = std::fs::File::open(&directory).unwrap();
            opened.set_modified(published).unwrap();
        }
        let expected = cache.path().join("kernel-b/vmlinux");
        assert_eq!(newest(cache.path(), "kernel-", "vmlinux"), Some(expected));
    }
}
