//! The README's ten lines, typed as they stand there.

use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use samepage_tests::http::Connection;
use samepage_tests::wait::wait_until;
use samepage_tests::{binary, kvm, linux};

const REPOSITORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
/// Two Linux guests of one image share four times as much.
const PAGES_SHARING_MIN: u64 = 1000;

/// The lines below "Your own two Linux VMs".
fn ten_lines() -> Vec<String> {
    let readme = Path::new(REPOSITORY).join("README.md");
    let readme = std::fs::read_to_string(readme).expect("the README");
    let (_, section) = readme
        .split_once("\n## Your own two Linux VMs")
        .expect("the section");
    let block = section.lines().skip(1).skip_while(|line| line.is_empty());
    let lines = block.map_while(|line| line.strip_prefix("    "));
    lines.map(str::to_owned).collect()
}

/// A shell that runs a file of commands on a terminal of its own. It ends with the test, and takes
/// the terminal and what runs there with it.
struct Terminal {
    script: Child,
    shown: PathBuf,
}

impl Terminal {
    fn run(commands: &Path, directory: &Path) -> Terminal {
        let shown = directory.join("shown");
        let script = Command::new("script")
            .args(["--quiet", "--flush", "--return", "--command"])
            .arg(format!("bash {}", commands.display()))
            .arg(&shown)
            .current_dir(directory)
            .env_remove("SAMEPAGE_SOCKET")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .expect("run script");
        Terminal { script, shown }
    }

    fn shown(&self) -> String {
        let bytes = std::fs::read(&self.shown).unwrap_or_default();
        String::from_utf8_lossy(&bytes).replace('\r', "")
    }

    fn type_keys(&mut self, keys: &str) {
        let input = self.script.stdin.as_mut().expect("its input");
        input.write_all(keys.as_bytes()).expect("type");
        input.flush().expect("type");
    }

    /// Waits until `done`, and fails the test when the shell ends before.
    fn wait_until(&mut self, what: &str, mut done: impl FnMut(&str) -> bool) {
        wait_until(what, linux::PATIENCE, || {
            let ended = self.script.try_wait().expect("look at the shell");
            let shown = self.shown();
            assert!(ended.is_none(), "ended before {what}: {shown}");
            done(&shown)
        });
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // A no-op if it ended.
        let _ = self.script.kill();
        let _ = self.script.wait();
    }
}

#[test]
fn ten_lines_lead_to_two_linux_vms_that_share_memory_and_leave_nothing() {
    if !kvm::is_present() {
        return;
    }
    let lines = ten_lines();
    assert_eq!(lines.len(), 10, "{lines:?}");
    // What the first line makes is taken as it is: the guest, and the binary under test.
    assert!(lines[0].starts_with("make build guest "), "{}", lines[0]);
    linux::guest();
    let clone = tempfile::tempdir().unwrap();
    let release = clone.path().join("target/release");
    std::fs::create_dir_all(&release).unwrap();
    symlink(binary::samepage(), release.join("samepage")).unwrap();
    let resources = Path::new(REPOSITORY).join("resources");
    symlink(resources, clone.path().join("resources")).unwrap();
    let commands = clone.path().join("commands");
    // A shell that stays, as a user's does, lets the server finish.
    std::fs::write(&commands, lines[1..].join("\n") + "\nwait\n").unwrap();

    let mut terminal = Terminal::run(&commands, clone.path());
    terminal.wait_until("the guest's prompt", |shown| shown.contains("\n/ # "));
    terminal.type_keys("echo $((6*7))-typed\r");
    terminal.wait_until("the answer", |shown| shown.contains("\n42-typed\n"));
    let socket = clone.path().join("target/samepage.sock");
    terminal.wait_until("both share", |_| {
        let merge = Connection::open(&socket).call("GET", "/merge/lab", "");
        let vms = &merge.json()["vms"];
        let merging = |id: &str| vms[id]["pages_merging"].as_u64().expect("a number");
        merging("one").min(merging("two")) >= PAGES_SHARING_MIN
    });
    // Ctrl-A x.
    terminal.type_keys("\x01x");
    let mut status = None;
    wait_until("the lines are through", linux::PATIENCE, || {
        status = terminal.script.try_wait().expect("look at the shell");
        status.is_some()
    });
    let shown = terminal.shown();
    assert_eq!(status.and_then(|status| status.code()), Some(0), "{shown}");
    assert!(!shown.contains("samepage: error"), "{shown}");
    let mut domains = shown.lines().filter(|line| line.starts_with("lab "));
    let columns: Vec<&str> = domains.next().expect(&shown).split_whitespace().collect();
    let [_, "merge", "2", _, sharing, ..] = columns[..] else {
        panic!("{columns:?}");
    };
    assert!(
        sharing.parse::<u64>().unwrap() >= PAGES_SHARING_MIN,
        "{shown}"
    );
    assert!(!socket.exists(), "{shown}");
}
