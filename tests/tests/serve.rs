//! The process of `samepage serve`: what it takes from its parent, and what it asks of the system.

use std::time::Duration;

use rustix::process::Signal;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use samepage_tests::server::Server;
use samepage_tests::wait::wait_until;
use samepage_tests::{kvm, linux};
use serde_json::json;

#[test]
fn server_raises_its_limit_of_descriptors_as_far_as_it_may() {
    if !kvm::is_present() {
        return;
    }
    let server = Server::start_after("ulimit -Sn 256; ulimit -Hn 768", &[]);
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", server.pid())).unwrap();
    let line = limits
        .lines()
        .find(|line| line.starts_with("Max open files"));
    let figures: Vec<&str> = line.unwrap().split_whitespace().skip(3).take(2).collect();
    assert_eq!(figures, ["768", "768"]);
}

#[test]
fn server_that_was_told_to_ignore_hang_ups_ignores_them() {
    if !kvm::is_present() {
        return;
    }
    // As nohup does.
    let mut server = Server::start_after("trap '' HUP", &[]);
    server.signal(Signal::HUP);
    assert_eq!(server.call("GET", "/vms", "").json(), json!([]));
    assert_eq!(server.stop(Signal::TERM).code(), Some(0));
    assert!(!server.socket().exists());
}

#[test]
fn server_goes_on_where_standard_error_cannot_be_written() {
    if !kvm::is_present() {
        return;
    }
    let mut server = Server::start_after("exec 2>/dev/full", &[]);
    // Logs a warning: this kernel is no kernel.
    let config = json!({ "boot-source": { "kernel_image_path": "/dev/null" } });
    let refused = server.call("PUT", "/vms/a", &config.to_string());
    assert_eq!(refused.status, 400);
    assert_eq!(server.stop(Signal::TERM).code(), Some(0));
}

#[test]
fn commands_say_by_their_status_what_standard_error_cannot_take() {
    let directory = tempfile::tempdir().unwrap();
    let nobody = directory.path().join("nobody.sock");
    let script = "\"$0\" ps 2>/dev/full; echo $?; \"$0\" nonsense 2>/dev/full; echo $?; \
                  \"$0\" run --kernel /nonexistent 2>&1 >/dev/full | head -0; echo ${PIPESTATUS[0]}";
    let output = std::process::Command::new("bash")
        .args(["-c", script])
        .arg(samepage_tests::binary::samepage())
        .env("SAMEPAGE_SOCKET", &nobody)
        .output()
        .unwrap();
    let statuses = String::from_utf8(output.stdout).unwrap();
    // 101 would be a panic.
    assert_eq!(statuses, "1\n2\n1\n");
}

#[test]
fn write_past_the_limit_of_file_sizes_is_an_error_of_its_guest_and_not_the_servers_end() {
    if !kvm::is_present() {
        return;
    }
    // Above the pool of a merge domain, a sparse file of 512 GiB, and below the end of the disk.
    let server = Server::start_after("ulimit -f $((600 << 21))", &[]);
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(700 << 30).unwrap();
    let mut config = linux::running(
        "dd if=/dev/zero of=/dev/vda bs=1M count=1 seek=1 conv=fsync,notrunc; echo low $?; \
         dd if=/dev/zero of=/dev/vda bs=1M count=1 seek=665600 conv=fsync,notrunc; echo high $?",
    );
    config.drives = vec![
        serde_json::from_value(json!({
            "drive_id": "big", "path_on_host": image.path(), "is_root_device": false,
        }))
        .unwrap(),
    ];
    let config = serde_json::to_string(&config).unwrap();
    server.done("PUT", "/vms/linux", &config);
    server.done(
        "PUT",
        "/vms/linux/actions",
        r#"{"action_type": "InstanceStart"}"#,
    );
    let mut console = String::new();
    wait_until("the guest has written", Duration::from_secs(120), || {
        let output = server.cli(&["console", "--history", "linux"]);
        console = String::from_utf8_lossy(&output.stdout).replace('\r', "");
        // The whole line: its end may come later.
        let told = console.split_once("\nhigh ");
        told.is_some_and(|(_, status)| status.contains('\n'))
    });
    assert!(console.contains("\nlow 0\n"), "{console}");
    assert!(console.contains("\nhigh 1\n"), "{console}");
    assert_eq!(server.call("GET", "/version", "").status, 200);
}

#[test]
fn drive_in_a_format_that_is_not_raw_is_served_with_a_warning_that_names_the_format() {
    if !kvm::is_present() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (log, image) = (directory.path().join("log"), directory.path().join("image"));
    let server = Server::start_after(&format!("exec 2>'{}'", log.display()), &[]);
    for (id, head, format) in [
        ("cow", b"QFI\xfb\0\0\0\x03", "qcow2"),
        ("virtual", b"conectix", "VHD"),
    ] {
        std::fs::write(&image, [&head[..], &[0; 504]].concat()).unwrap();
        let drive = json!({ "drive_id": id, "path_on_host": image, "is_root_device": false });
        let config = json!({
            "boot-source": { "kernel_image_path": "builtin:pageload" },
            "drives": [drive],
        });
        server.done("PUT", &format!("/vms/{id}"), &config.to_string());
        let logged = std::fs::read_to_string(&log).unwrap();
        let mut lines = logged.lines();
        let named = lines.any(|line| line.contains(id) && line.contains(&format!("a {format} ")));
        assert!(named, "{logged}");
    }
}

/// Session and terminal of a process: fields 6 and 7 of its `stat` (proc(5)).
fn session_and_terminal(pid: u32) -> (String, String) {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("stat");
    // Behind the name, which may have spaces: state, parent, group, session, terminal.
    let (_, fields) = stat.rsplit_once(") ").expect("a name");
    let fields: Vec<&str> = fields.split(' ').collect();
    (fields[3].to_owned(), fields[4].to_owned())
}

#[test]
fn terminal_that_is_named_as_a_file_never_becomes_the_servers_own() {
    if !kvm::is_present() {
        return;
    }
    // Who leads a session without a terminal gets the first one that it opens carelessly.
    let server = Server::start_after("set -- setsid \"$@\"", &[]);
    let before = session_and_terminal(server.pid());
    assert_eq!(before, (server.pid().to_string(), "0".to_owned()));
    let keys = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&keys).unwrap();
    unlockpt(&keys).unwrap();
    let terminal = ptsname(&keys, Vec::new()).unwrap().into_string().unwrap();

    let kernel = "builtin:pageload";
    let drive = json!({ "drive_id": "d", "path_on_host": terminal, "is_root_device": false });
    for config in [
        json!({ "boot-source": { "kernel_image_path": terminal } }),
        json!({ "boot-source": { "kernel_image_path": kernel, "initrd_path": terminal } }),
        json!({ "boot-source": { "kernel_image_path": kernel }, "drives": [drive] }),
    ] {
        let refused = server.call("PUT", "/vms/a", &config.to_string());
        assert_eq!(refused.status, 400, "{config}");
        assert!(refused.fault().contains(&terminal), "{}", refused.fault());
    }
    assert_eq!(session_and_terminal(server.pid()), before);
}
