//! `samepage demo`: what it promises to print, and that nothing outlives it.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use samepage_tests::wait::{PATIENCE, wait_until};
use samepage_tests::{binary, kvm};
use serde_json::Value;

/// A demo whose server has its socket below `directory`.
fn demo(directory: &Path, arguments: &[&str]) -> Child {
    Command::new(binary::samepage())
        .arg("demo")
        .args(arguments)
        .env("TMPDIR", directory)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("run samepage")
}

/// Whether a process has `text` in its command line.
fn is_running(text: &str) -> bool {
    let processes = std::fs::read_dir("/proc").expect("/proc");
    processes.flatten().any(|process| {
        let command_line = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&command_line).contains(text)
    })
}

#[test]
fn demo_shares_the_duplicates_and_finds_no_wrong_byte() {
    if !kvm::is_present() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let demo = demo(
        directory.path(),
        &["--vms", "3", "--mem-mib", "32", "--json"],
    );
    let output = demo.wait_with_output().unwrap();
    let progress = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{progress}");
    assert!(progress.contains("merging: memory "), "{progress}");
    assert!(!progress.contains("samepage: error"), "{progress}");
    let stdout = String::from_utf8(output.stdout).unwrap();
    let summary: Value = serde_json::from_str(stdout.lines().last().unwrap()).unwrap();
    let number = |key: &str| {
        let value = summary[key].as_i64();
        value.unwrap_or_else(|| panic!("{key}: {summary}"))
    };
    assert_eq!(number("vms"), 3);
    assert_eq!(summary["guest"], "pageload");
    assert_eq!(number("verify_errors"), 0);
    assert!(number("verify_passes") >= 6, "{summary}");
    let given_back = number("pages_sharing") + number("pages_zero");
    assert!(
        given_back * 100 >= number("duplicate_pages") * 95,
        "{summary}"
    );
    // What the engine claims to save is what the kernel has got back, but for a few pages.
    let measured = number("memory_before_bytes") - number("memory_after_bytes");
    let difference = (measured - number("saved_bytes")).abs();
    assert!(difference < 4 << 20, "measured {measured}: {summary}");
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn demo_takes_everything_with_it_when_it_is_interrupted() {
    if !kvm::is_present() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let directory_text = directory.path().to_str().unwrap();
    for signal in [Signal::INT, Signal::TERM, Signal::KILL] {
        let mut demo = demo(directory.path(), &["--vms", "2", "--mem-mib", "32"]);
        let mut lines = BufReader::new(demo.stdout.take().unwrap()).lines();
        lines
            .find(|line| line.as_ref().unwrap().starts_with("merging"))
            .unwrap()
            .unwrap();
        assert!(is_running(directory_text));
        let pid = Pid::from_raw(i32::try_from(demo.id()).unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
        let status = demo.wait().unwrap();
        if signal == Signal::KILL {
            // Nobody is left to wait for the server, which sees its standard input end.
            wait_until("the server is gone", PATIENCE, || {
                !is_running(directory_text)
            });
        } else {
            assert_eq!(status.code(), Some(130), "{signal:?}");
            assert!(!is_running(directory_text));
            assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
        }
    }
}
