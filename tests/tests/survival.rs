//! Merge domains as processes: what survives what, and what an end leaves behind.

use std::path::Path;

use rustix::process::{Signal, kill_process};
use samepage_tests::domains::{
    State, config, create, describe, is_alive, kill, launch, open_stream, remove, wait_crashed,
    wait_states,
};
use samepage_tests::kvm;
use samepage_tests::server::Server;
use samepage_tests::tiny_kernel::{ECHO_UNTIL_Q, IDLE, KernelFile};
use samepage_tests::wait::{PATIENCE, wait_until};
use serde_json::json;

#[test]
fn vms_outlive_the_front_door_and_the_next_one_finds_them() {
    if !kvm::is_present() {
        return;
    }
    let (state, kernel) = (State::empty(), KernelFile::new(ECHO_UNTIL_Q));
    let mut server = state.serve();
    launch(&server, "a", &kernel, Some("ci"));
    create(&server, "later", &kernel, Some("ci"));
    let monitor = state.monitor("ci");
    server.stop(Signal::KILL);
    assert!(is_alive(monitor));

    let server = state.serve();
    assert_eq!(state.monitor("ci"), monitor);
    wait_states(&server, &[("a", "Running"), ("later", "Not started")]);
    let same = server.call("GET", "/vms/a/config", "").body;
    let taken = server.call("PUT", "/vms/a", std::str::from_utf8(&same).expect("text"));
    assert_eq!(taken.status, 409, "{}", taken.fault());
    // An adopted monitor ends with its last VM as one that was started here.
    for id in ["a", "later"] {
        remove(&server, id);
    }
    wait_until("the monitor ends", PATIENCE, || !is_alive(monitor));
    assert!(state.domains().is_empty());
}

#[test]
fn a_front_door_that_is_stopped_leaves_its_vms_running_too() {
    if !kvm::is_present() {
        return;
    }
    let (state, kernel) = (State::empty(), KernelFile::new(IDLE));
    let mut server = state.serve();
    launch(&server, "a", &kernel, None);
    let monitor = state.monitor("vm:a");
    assert_eq!(server.stop(Signal::TERM).code(), Some(0));
    assert!(is_alive(monitor));
}

#[test]
fn a_monitor_that_is_killed_takes_its_own_vms_and_no_others() {
    if !kvm::is_present() {
        return;
    }
    let (state, kernel) = (State::empty(), KernelFile::new(IDLE));
    let server = state.serve();
    launch(&server, "dead", &kernel, Some("a"));
    launch(&server, "well", &kernel, Some("b"));
    let other = state.monitor("b");
    kill(state.monitor("a"));
    wait_crashed(&server, "dead");
    let dead = server.call("GET", "/vms/dead", "").json();
    assert_eq!(dead["state"], "Ended");
    let why = dead["end_message"].as_str().expect("text");
    assert!(why.contains("SIGKILL"), "{why}");
    wait_states(&server, &[("dead", "Ended"), ("well", "Running")]);
    assert_eq!(state.monitor("b"), other);
    // Its configuration stays until it is removed, and it cannot be asked to do anything.
    let config = server.call("GET", "/vms/dead/config", "").json();
    assert_eq!(config["samepage"]["merge_domain"], "a");
    let start = json!({ "action_type": "InstanceStart" }).to_string();
    assert_eq!(server.call("PUT", "/vms/dead/actions", &start).status, 400);
    server.done("DELETE", "/vms/dead", "");
    wait_states(&server, &[("well", "Running")]);
    assert!(!state.directory_of("a").exists());
}

#[test]
fn what_a_console_showed_last_outlives_its_monitor() {
    if !kvm::is_present() {
        return;
    }
    let (state, kernel) = (State::empty(), KernelFile::new(ECHO_UNTIL_Q));
    let server = state.serve();
    launch(&server, "a", &kernel, Some("ci"));
    let mut stream = open_stream(&server, "a");
    stream.send(b"last words").expect("type");
    let history = || server.call("GET", "/vms/a/console", "").body;
    wait_until("the guest has echoed", PATIENCE, || {
        history() == b"last words" && state.has_tail("ci", "a", b"last words")
    });
    kill(state.monitor("ci"));
    wait_crashed(&server, "a");
    assert_eq!(history(), b"last words");
    assert_eq!(open_stream(&server, "a").read_to_end(), b"last words");
    remove(&server, "a");
    assert!(!state.directory_of("ci").exists());
}

#[test]
fn vms_whose_monitor_died_unseen_are_told_as_crashed() {
    if !kvm::is_present() {
        return;
    }
    let (state, kernel) = (State::empty(), KernelFile::new(IDLE));
    let mut server = state.serve();
    launch(&server, "a", &kernel, Some("ci"));
    let monitor = state.monitor("ci");
    server.stop(Signal::KILL);
    kill(monitor);

    let server = state.serve();
    let vm = server.call("GET", "/vms/a", "").json();
    assert_eq!(
        (&vm["state"], &vm["end_reason"]),
        (&json!("Ended"), &json!("crashed"))
    );
    // The domain can be used again beside it.
    launch(&server, "b", &kernel, Some("ci"));
    wait_states(&server, &[("a", "Ended"), ("b", "Running")]);
    server.done("DELETE", "/vms/a", "");
    wait_states(&server, &[("b", "Running")]);
}

#[test]
fn all_vms_end_with_a_front_door_that_is_to_take_them_along() {
    if !kvm::is_present() {
        return;
    }
    for signal in [Signal::TERM, Signal::KILL] {
        let (state, kernel) = (State::empty(), KernelFile::new(IDLE));
        let mut server = Server::start(&["--state-dir", state.path(), "--stop-all-on-exit"]);
        launch(&server, "a", &kernel, Some("ci"));
        let monitor = state.monitor("ci");
        server.stop(signal);
        wait_until("the monitor ends", PATIENCE, || !is_alive(monitor));
        // Nothing is left of them, at the latest when the next one has started.
        if signal == Signal::KILL {
            let next = state.serve();
            wait_states(&next, &[]);
        }
        assert!(state.domains().is_empty());
    }
}

#[test]
fn a_second_front_door_on_one_directory_is_refused() {
    if !kvm::is_present() {
        return;
    }
    let state = State::empty();
    let _first = state.serve();
    let directory = tempfile::tempdir().expect("a directory");
    let second = std::process::Command::new(samepage_tests::binary::samepage())
        .args(["serve", "--state-dir", state.path(), "--api-sock"])
        .arg(directory.path().join("s"))
        .output()
        .expect("run samepage");
    assert_eq!(second.status.code(), Some(1));
    let told = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(told.contains("another server uses it"), "{told}");
}

#[test]
fn a_monitor_that_hangs_is_named_and_holds_up_nobody_else() {
    if !kvm::is_present() {
        return;
    }
    let (state, kernel) = (State::empty(), KernelFile::new(IDLE));
    let server = state.serve();
    launch(&server, "hung", &kernel, Some("a"));
    launch(&server, "well", &kernel, Some("b"));
    let hung = state.monitor("a");
    kill_process(hung, Signal::STOP).expect("stop it");
    wait_states(&server, &[("hung", "Unknown"), ("well", "Running")]);
    let domains = server.call("GET", "/merge", "").json();
    let fault = domains["a"]["fault_message"].as_str().expect("a fault");
    assert!(fault.contains("did not answer"), "{fault}");
    assert_eq!(domains["b"]["run"], "merge");
    // What nobody can know to be dead is not removed; who may end it is told which process it is.
    let refused = server.call("DELETE", "/vms/hung", "");
    assert_eq!(refused.status, 503);
    let fault = refused.fault();
    let process = format!("(process {})", hung.as_raw_nonzero());
    assert!(fault.contains(&process), "{fault}");
    kill_process(hung, Signal::CONT).expect("let it go on");
    wait_states(&server, &[("hung", "Running"), ("well", "Running")]);
}

#[test]
fn a_crashed_vm_is_kept_beside_a_new_monitor_of_its_domain() {
    if !kvm::is_present() {
        return;
    }
    let (state, kernel) = (State::empty(), KernelFile::new(ECHO_UNTIL_Q));
    let mut server = state.serve();
    launch(&server, "dead", &kernel, Some("ci"));
    open_stream(&server, "dead")
        .send(b"last words")
        .expect("type");
    let history = |server: &Server| server.call("GET", "/vms/dead/console", "").body;
    wait_until("the guest has echoed", PATIENCE, || {
        history(&server) == b"last words" && state.has_tail("ci", "dead", b"last words")
    });
    kill(state.monitor("ci"));
    wait_crashed(&server, "dead");
    launch(&server, "well", &kernel, Some("ci"));
    server.stop(Signal::KILL);

    let server = state.serve();
    wait_states(&server, &[("dead", "Ended"), ("well", "Running")]);
    let why = describe(&server, "dead")["end_message"].to_string();
    assert!(why.contains("SIGKILL"), "{why}");
    assert_eq!(history(&server), b"last words");
}

#[test]
fn a_configuration_that_was_changed_before_the_start_is_the_one_that_outlives_a_monitor() {
    if !kvm::is_present() {
        return;
    }
    let (state, kernel) = (State::empty(), KernelFile::new(IDLE));
    let server = state.serve();
    create(&server, "a", &kernel, Some("ci"));
    server.done("PUT", "/vms/a/entropy", "{}");
    kill(state.monitor("ci"));
    wait_crashed(&server, "a");
    let config = server.call("GET", "/vms/a/config", "").json();
    assert!(config["entropy"].is_object(), "{config}");
}

#[test]
fn a_vm_whose_record_is_unreadable_or_gone_runs_on_and_is_found() {
    if !kvm::is_present() {
        return;
    }
    let (state, kernel) = (State::empty(), KernelFile::new(IDLE));
    let mut server = state.serve();
    launch(&server, "a", &kernel, Some("ci"));
    launch(&server, "b", &kernel, None);
    let monitors = [state.monitor("ci"), state.monitor("vm:b")];
    server.stop(Signal::KILL);
    std::fs::write(state.directory_of("ci").join("vms/a"), "{").expect("write");
    std::fs::remove_file(state.directory_of("vm:b").join("vms/b")).expect("remove");

    let server = state.serve();
    wait_states(&server, &[("a", "Running"), ("b", "Running")]);
    assert_eq!([state.monitor("ci"), state.monitor("vm:b")], monitors);
    // They are noted anew.
    kill(monitors[0]);
    wait_crashed(&server, "a");
}

#[test]
fn a_monitor_that_hangs_while_the_front_door_is_replaced_is_kept_and_adopted() {
    if !kvm::is_present() {
        return;
    }
    let (state, kernel) = (State::empty(), KernelFile::new(IDLE));
    let mut server = state.serve();
    launch(&server, "hung", &kernel, Some("a"));
    let hung = state.monitor("a");
    // First the front door: the kernel has a stopped process go on when its group loses its parent.
    server.stop(Signal::KILL);
    kill_process(hung, Signal::STOP).expect("stop it");
    // As many connections as its socket holds: nobody can connect any more.
    let socket = state.directory_of("a").join("api.sock");
    let mut waiting = Vec::new();
    while waiting.len() < 4096 {
        let connection = connect_at_once(&socket);
        let Some(connection) = connection else { break };
        waiting.push(connection);
    }

    let server = state.serve();
    wait_states(&server, &[("hung", "Unknown")]);
    // Its id is taken, and no second monitor is started beside it.
    let put = config(&kernel, Some("a")).to_string();
    assert_eq!(server.call("PUT", "/vms/hung", &put).status, 409);
    let refused = server.call("PUT", "/vms/new", &put);
    assert_eq!(refused.status, 503);
    assert!(
        refused.fault().contains("lives still"),
        "{}",
        refused.fault()
    );
    assert!(is_alive(hung));

    drop(waiting);
    kill_process(hung, Signal::CONT).expect("let it go on");
    wait_states(&server, &[("hung", "Running")]);
    create(&server, "new", &kernel, Some("a"));
    assert_eq!(state.monitor("a"), hung);
}

/// A connection, unless the listener's queue is full.
fn connect_at_once(socket: &Path) -> Option<std::os::fd::OwnedFd> {
    use rustix::net::{
        AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let client = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
    let client = client.expect("a socket");
    let address = SocketAddrUnix::new(socket).expect("an address");
    connect(&client, &address).ok().map(|()| client)
}
