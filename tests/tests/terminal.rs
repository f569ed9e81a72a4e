//! `samepage run` and `samepage console` on a terminal: how they are left, and the terminal after it.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, ExitStatus};

use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, tcgetattr};
use samepage_tests::server::Server;
use samepage_tests::tiny_kernel::{IDLE, KernelFile};
use samepage_tests::wait::{PATIENCE, wait_until};
use samepage_tests::{binary, kvm};
use serde_json::json;

/// A pseudo-terminal and a `samepage` command that has it as its standard input.
struct OnTerminal {
    keys: File,
    /// The terminal itself, kept open so that it can be asked when the command has ended.
    terminal: OwnedFd,
    child: Child,
}

impl OnTerminal {
    fn run(arguments: &[&str]) -> OnTerminal {
        let keys = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a pty");
        grantpt(&keys).expect("grant");
        unlockpt(&keys).expect("unlock");
        let name = ptsname(&keys, Vec::new()).expect("its name");
        let name = name.into_string().expect("text");
        let terminal = OpenOptions::new().read(true).write(true).open(name);
        let terminal = terminal.expect("its terminal");
        let child = Command::new(binary::samepage())
            .args(arguments)
            .stdin(terminal.try_clone().expect("a copy"))
            .spawn()
            .expect("run samepage");
        OnTerminal {
            keys: keys.into(),
            terminal: terminal.into(),
            child,
        }
    }

    fn is_raw(&self) -> bool {
        let modes = tcgetattr(self.terminal.as_fd()).expect("its modes");
        !modes.local_modes.contains(LocalModes::ICANON)
    }

    fn wait_raw(&self) {
        wait_until("the terminal is raw", PATIENCE, || self.is_raw());
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        kill_process(pid.expect("a pid"), signal).expect("signal it");
    }

    fn end(&mut self) -> ExitStatus {
        let mut ended = None;
        wait_until("it ends", PATIENCE, || {
            ended = self.child.try_wait().expect("look at it");
            ended.is_some()
        });
        assert!(!self.is_raw(), "the terminal is left raw");
        ended.expect("a status")
    }
}

impl Drop for OnTerminal {
    fn drop(&mut self) {
        // A no-op if it ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A server with a VM that runs and never reads its console.
fn deaf_vm(kernel: &KernelFile) -> Server {
    let server = Server::start(&[]);
    let config = json!({
        "boot-source": {"kernel_image_path": kernel.argument()},
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 32},
    });
    server.done("PUT", "/vms/deaf", &config.to_string());
    let start = r#"{"action_type": "InstanceStart"}"#;
    server.done("PUT", "/vms/deaf/actions", start);
    server
}

fn console_arguments(server: &Server) -> Vec<String> {
    let socket = server.socket().display().to_string();
    ["--api-sock", &socket, "console", "deaf"]
        .map(str::to_owned)
        .to_vec()
}

fn on_console(server: &Server) -> OnTerminal {
    let arguments = console_arguments(server);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let terminal = OnTerminal::run(&arguments);
    terminal.wait_raw();
    terminal
}

#[test]
fn key_to_leave_works_behind_more_than_the_guest_takes() {
    if !kvm::is_present() {
        return;
    }
    let kernel = KernelFile::new(IDLE);
    let server = deaf_vm(&kernel);
    let argument = kernel.argument();
    let run = ["run", "--kernel", &argument, "--mem-mib", "32"];
    let mut terminals = [OnTerminal::run(&run), on_console(&server)];
    for terminal in &mut terminals {
        terminal.wait_raw();
        terminal.keys.write_all(&[b'p'; 200_000]).expect("paste");
        terminal.keys.write_all(b"\x01x").expect("type");
        assert_eq!(terminal.end().code(), Some(0));
    }
    assert_eq!(
        server.call("GET", "/vms/deaf", "").json()["state"],
        "Running"
    );
}

/// Whether this program, and what it starts, ignores a signal (`proc_pid_status(5)`).
fn ignores(signal: Signal) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").expect("this is Linux");
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = u64::from_str_radix(mask.expect("a mask").trim(), 16).expect("hexadecimal");
    mask >> (signal.as_raw() - 1) & 1 == 1
}

#[test]
fn signals_end_the_command_and_leave_the_terminal_as_it_was() {
    if !kvm::is_present() {
        return;
    }
    let kernel = KernelFile::new(IDLE);
    let server = deaf_vm(&kernel);
    let argument = kernel.argument();
    let mut signals = vec![Signal::INT, Signal::TERM, Signal::QUIT];
    // Under nohup it is ignored, and the commands keep to that.
    if !ignores(Signal::HUP) {
        signals.push(Signal::HUP);
    }
    for signal in signals {
        let run = ["run", "--kernel", &argument, "--mem-mib", "32"];
        let mut terminals = [OnTerminal::run(&run), on_console(&server)];
        for terminal in &mut terminals {
            terminal.wait_raw();
            terminal.signal(signal);
            assert_eq!(terminal.end().code(), Some(128 + signal.as_raw()));
        }
    }
}

#[test]
fn console_whose_server_dies_is_an_error() {
    if !kvm::is_present() {
        return;
    }
    let kernel = KernelFile::new(IDLE);
    let mut server = deaf_vm(&kernel);
    let mut terminal = on_console(&server);
    server.stop(Signal::KILL);
    assert_eq!(terminal.end().code(), Some(1));

    let mut shown = String::new();
    let mut shower = Command::new(binary::samepage());
    let output = shower
        .args(console_arguments(&server))
        .output()
        .expect("run");
    output
        .stderr
        .as_slice()
        .read_to_string(&mut shown)
        .expect("text");
    assert!(shown.contains("no server on"), "{shown}");
}
