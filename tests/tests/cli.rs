//! The command line, as a user sees it: output and exit status.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use samepage_tests::server::Server;
use samepage_tests::tiny_kernel::{ECHO_UNTIL_Q, IDLE, KernelFile, PANIC, SAY_HI_AND_RESET};
use samepage_tests::{binary, kvm};
use serde_json::{Value, json};

/// `samepage run` with a kernel, and what is typed.
fn run(kernel: &KernelFile, typed: &str) -> Output {
    let mut child = Command::new(binary::samepage())
        .args(["run", "--mem-mib", "32", "--kernel", &kernel.argument()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("run samepage");
    let mut stdin = child.stdin.take().expect("its input");
    stdin.write_all(typed.as_bytes()).expect("type");
    drop(stdin);
    child.wait_with_output().expect("its output")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("text")
}

#[test]
fn run_shows_the_console_and_ends_with_the_guest() {
    if !kvm::is_present() {
        return;
    }
    let output = run(&KernelFile::new(SAY_HI_AND_RESET), "");
    assert_eq!(text(&output.stdout), "hi\n");
    assert_eq!(
        text(&output.stderr),
        "samepage: vm ended: the guest asked for a reset\n"
    );
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn run_gives_the_guest_what_is_typed() {
    if !kvm::is_present() {
        return;
    }
    // More than a serial port's buffer takes at once.
    let typed = "0123456789".repeat(30);
    let output = run(&KernelFile::new(ECHO_UNTIL_Q), &format!("{typed}q"));
    assert_eq!(text(&output.stdout), typed);
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn run_tells_the_reason_by_its_exit_status() {
    if !kvm::is_present() {
        return;
    }
    let output = run(&KernelFile::new(PANIC), "");
    assert_eq!(output.status.code(), Some(3), "{}", text(&output.stderr));
    // Arguments that make no VM.
    let none = Command::new(binary::samepage())
        .arg("run")
        .output()
        .unwrap();
    assert_eq!(none.status.code(), Some(1));
    assert!(text(&none.stderr).starts_with("samepage: error: no kernel"));
    let wrong = Command::new(binary::samepage())
        .args(["run", "--colour"])
        .output()
        .unwrap();
    assert_eq!(wrong.status.code(), Some(2));
}

#[test]
fn run_ends_by_signals() {
    if !kvm::is_present() {
        return;
    }
    let kernel = KernelFile::new(ECHO_UNTIL_Q);
    for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        let mut child = Command::new(binary::samepage())
            .args(["run", "--mem-mib", "32", "--kernel", &kernel.argument()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // An echo says that the guest runs.
        child.stdin.as_mut().unwrap().write_all(b"!").unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(code), "{signal:?}");
    }
}

/// `samepage console ID`, with what is typed at once and nothing after that.
fn console(server: &Server, id: &str, typed: &str) -> Child {
    let mut child = Command::new(binary::samepage())
        .args(["console", id, "--api-sock"])
        .arg(server.socket())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("run samepage");
    let mut stdin = child.stdin.take().expect("its input");
    stdin.write_all(typed.as_bytes()).expect("type");
    child
}

#[test]
fn console_is_two_way_and_may_be_left_and_come_back_to() {
    if !kvm::is_present() {
        return;
    }
    let server = Server::start(&[]);
    let file = KernelFile::new(ECHO_UNTIL_Q);
    let kernel = file.argument();
    let launched = server.cli(&["launch", "a", "--kernel", &kernel, "--mem-mib", "32"]);
    assert!(launched.status.success(), "{}", text(&launched.stderr));
    let mut first = console(&server, "a", "hello");
    let mut shown = [0; 5];
    first
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut shown)
        .unwrap();
    assert_eq!(&shown, b"hello");
    // The end of its input is not the end of the stream; leaving is.
    assert_eq!(first.try_wait().unwrap(), None);
    first.kill().unwrap();
    first.wait().unwrap();

    let second = console(&server, "a", "!q").wait_with_output().unwrap();
    assert_eq!(text(&second.stdout), "hello!");
    assert_eq!(second.status.code(), Some(0));
    let history = server.cli(&["console", "a", "--history"]);
    assert_eq!(text(&history.stdout), "hello!");
}

#[test]
fn console_waits_for_a_vm_that_is_not_started_yet() {
    if !kvm::is_present() {
        return;
    }
    let server = Server::start(&[]);
    let file = KernelFile::new(ECHO_UNTIL_Q);
    let kernel = file.argument();
    let arguments = [
        "launch",
        "a",
        "--no-start",
        "--kernel",
        &kernel,
        "--mem-mib",
        "32",
    ];
    assert!(server.cli(&arguments).status.success());
    let console = console(&server, "a", "early q");
    server.done(
        "PUT",
        "/vms/a/actions",
        r#"{"action_type": "InstanceStart"}"#,
    );
    let output = console.wait_with_output().unwrap();
    assert_eq!(text(&output.stdout), "early ");
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn launch_that_cannot_start_leaves_no_vm() {
    if !kvm::is_present() {
        return;
    }
    let server = Server::start(&[]);
    let kernel = KernelFile::new(IDLE);
    // A file that is there and no kernel: found out at start.
    std::fs::write(kernel.path(), "not a kernel").unwrap();
    let launched = server.cli(&["launch", "a", "--kernel", &kernel.argument()]);
    assert_eq!(launched.status.code(), Some(1));
    let error = text(&launched.stderr);
    assert!(
        error.starts_with("samepage: error: ") && error.lines().count() == 1,
        "{error}"
    );
    assert_eq!(text(&server.cli(&["ps", "--json"]).stdout).trim(), "[]");
}

#[test]
fn second_server_on_a_live_socket_is_refused() {
    let server = Server::start(&[]);
    let socket = server.socket();
    let output = server.cli(&["serve", "--api-sock", socket.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.starts_with("samepage: error: api socket "), "{text}");
    assert_eq!(server.call("GET", "/vms", "").json(), json!([]));
}

#[test]
fn commands_work_a_vm_from_launch_to_rm() {
    if !kvm::is_present() {
        return;
    }
    let server = Server::start(&[]);
    let ok = |arguments: &[&str]| -> String {
        let output = server.cli(arguments);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {error}");
        String::from_utf8(output.stdout).unwrap()
    };
    let fails = |arguments: &[&str]| -> String {
        let output = server.cli(arguments);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(
            error.starts_with("samepage: error: ") && error.lines().count() == 1,
            "{error}"
        );
        error
    };
    let vm = [
        "--kernel",
        "builtin:pageload",
        "--mem-mib",
        "32",
        "--merge-domain",
        "ci",
    ];
    ok(&[&["launch", "a"], &vm[..]].concat());
    ok(&[&["launch", "b", "--no-start"], &vm[..]].concat());
    let listed: Value = serde_json::from_str(&ok(&["ps", "--json"])).unwrap();
    assert_eq!(listed[0]["state"], "Running");
    assert_eq!(listed[1]["state"], "Not started");
    assert!(
        ok(&["ps"])
            .lines()
            .nth(1)
            .unwrap()
            .starts_with("a   Running"),
        "{}",
        ok(&["ps"])
    );
    let stats: Value = serde_json::from_str(&ok(&["stats", "--json"])).unwrap();
    assert!(stats["ci"]["pages_shared"].is_u64(), "{stats}");
    assert!(stats["ci"]["vms"]["a"]["pages_merging"].is_u64(), "{stats}");
    let stats: Value = serde_json::from_str(&ok(&["stats", "a", "--json"])).unwrap();
    assert!(stats["pages_merging"].is_u64(), "{stats}");
    assert!(ok(&["stats"]).contains("ci"));
    ok(&["console", "a", "--history"]);

    assert!(fails(&[&["launch", "a"], &vm[..]].concat()).contains("vm a"));
    assert!(fails(&["launch", "c", "--kernel", "/nowhere"]).contains("/nowhere"));
    assert!(fails(&["stop", "c"]).contains("vm c"));
    assert!(fails(&["rm", "a"]).contains("vm a"));
    for (command, state) in [("pause", "Paused"), ("resume", "Running")] {
        ok(&[command, "a"]);
        assert!(ok(&["ps"]).contains(state), "{command}: {}", ok(&["ps"]));
        // Once more changes nothing, and what does not run cannot be asked.
        ok(&[command, "a"]);
        assert!(fails(&[command, "b"]).contains("vm b"));
    }
    ok(&["stop", "a"]);
    assert!(ok(&["ps"]).contains("Ended (stopped)"));
    ok(&["rm", "a"]);
    ok(&["rm", "--force", "b"]);
    assert_eq!(ok(&["ps", "--json"]).trim(), "[]");
}

#[test]
fn watched_stats_are_a_json_object_a_line_until_nobody_reads() {
    if !kvm::is_present() {
        return;
    }
    let server = Server::start(&["--domain", "ci"]);
    let mut child = Command::new(binary::samepage())
        .args(["stats", "--json", "--watch=0.1", "--api-sock"])
        .arg(server.socket())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    for _ in 0..2 {
        let stats: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
        assert_eq!(stats["ci"]["pages_sharing"], 0, "{stats}");
    }
    drop(lines);
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn commands_without_a_server_say_so() {
    let directory = tempfile::tempdir().unwrap();
    let output = Command::new(binary::samepage())
        .args(["ps", "--api-sock"])
        .arg(directory.path().join("none.sock"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(
        error.contains("no server on") && error.contains("samepage serve"),
        "{error}"
    );
}
