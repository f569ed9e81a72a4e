//! Storage that stops answering holds up nobody but who asked it for something.

mod held_file;

use std::path::Path;

use held_file::{HeldFile, Reads};
use rustix::process::Signal;
use samepage_tests::disk_storm::DiskStorm;
use samepage_tests::kvm;
use samepage_tests::server::Server;
use samepage_tests::tiny_kernel::KernelFile;
use samepage_tests::wait::{PATIENCE, wait_until};
use serde_json::{Value, json};

const START: &str = r#"{"action_type": "InstanceStart"}"#;
const STOP: &str = r#"{"action_type": "InstanceStop"}"#;
const DISK_BYTES: u32 = 4 << 20;

/// A guest that reads all of its disk into its memory, and then says so.
const READER: DiskStorm = DiskStorm {
    disks: 1,
    requests: 4,
    request_bytes: DISK_BYTES,
};

fn config(kernel: &Path, disk: &Path) -> Value {
    json!({
        "boot-source": {"kernel_image_path": kernel},
        "machine-config": {"vcpu_count": 1, "mem_size_mib": READER.mem_size_mib()},
        "drives": [{
            "drive_id": "disk",
            "path_on_host": disk,
            "is_root_device": false,
            "is_read_only": false,
        }],
        "samepage": {"merge_domain": "ci"},
    })
}

fn start(server: &Server, id: &str, config: &Value) {
    server.done("PUT", &format!("/vms/{id}"), &config.to_string());
    server.done("PUT", &format!("/vms/{id}/actions"), START);
}

fn is_done(server: &Server, id: &str) -> bool {
    let console = server.call("GET", &format!("/vms/{id}/console"), "");
    String::from_utf8_lossy(&console.body).contains("done")
}

/// A VM whose disk has stopped answering while it reads it.
fn hang(server: &Server, id: &str, kernel: &KernelFile, disk: &HeldFile) {
    // What the server itself looks at is there.
    disk.hold(1 << 20);
    start(server, id, &config(&kernel.path(), disk.path()));
    wait_until("its disk is asked", PATIENCE, || disk.is_waited_for());
}

fn content() -> Vec<u8> {
    let sector = |number: u32| [number.to_le_bytes()[0]; 512];
    (0..DISK_BYTES / 512).flat_map(sector).collect()
}

#[test]
fn a_disk_that_hangs_holds_up_neither_its_neighbours_disks_nor_the_end_of_any_vm() {
    if !kvm::is_present() {
        return;
    }
    let server = Server::start(&["--domain", "ci"]);
    let kernel = KernelFile::new(&READER.code_that_tells());
    let plain = tempfile::NamedTempFile::new().expect("an image");
    std::fs::write(plain.path(), content()).expect("an image");
    let disk = HeldFile::mount(content(), Reads::Direct);
    hang(&server, "hung", &kernel, &disk);

    for id in ["well", "later"] {
        start(&server, id, &config(&kernel.path(), plain.path()));
        wait_until("the neighbour has read its disk", PATIENCE, || {
            is_done(&server, id)
        });
        server.done("PUT", &format!("/vms/{id}/actions"), STOP);
        server.done("DELETE", &format!("/vms/{id}"), "");
    }
    assert!(!is_done(&server, "hung"));
    server.done("PUT", "/vms/hung/actions", STOP);
    assert_eq!(server.call("GET", "/vms/hung", "").json()["state"], "Ended");
    server.done("DELETE", "/vms/hung", "");

    // Somebody else's now, and nobody writes what is read late into it.
    let next = config(&kernel.path(), disk.path());
    server.done("PUT", "/vms/next", &next.to_string());
    let refused = server.call("PUT", "/vms/next/actions", START);
    assert_eq!(refused.status, 409, "{}", refused.fault());
    disk.let_go();
    wait_until("the disk is free again", PATIENCE, || {
        server.call("PUT", "/vms/next/actions", START).status == 204
    });
    wait_until("it is read", PATIENCE, || is_done(&server, "next"));
}

#[test]
fn a_disk_that_cannot_be_closed_holds_up_no_end_of_a_vm() {
    if !kvm::is_present() {
        return;
    }
    let server = Server::start(&["--domain", "ci"]);
    let kernel = KernelFile::new(&READER.code_that_tells());
    let plain = tempfile::NamedTempFile::new().expect("an image");
    std::fs::write(plain.path(), content()).expect("an image");
    let disk = HeldFile::mount(content(), Reads::Direct);
    start(&server, "well", &config(&kernel.path(), plain.path()));
    start(&server, "hung", &config(&kernel.path(), disk.path()));
    wait_until("it has read its disk", PATIENCE, || {
        is_done(&server, "hung")
    });
    disk.hold_closing();
    server.done("PUT", "/vms/hung/actions", STOP);
    wait_until("its disk is closed", PATIENCE, || disk.is_waited_for());
    server.done("DELETE", "/vms/hung", "");
    server.done("PUT", "/vms/well/actions", STOP);
    assert_eq!(server.call("GET", "/vms/well", "").json()["state"], "Ended");
}

#[test]
fn a_server_ends_in_order_while_disks_hang() {
    if !kvm::is_present() {
        return;
    }
    for reads in [Reads::Cached, Reads::Direct] {
        let mut server = Server::start(&["--domain", "ci"]);
        let kernel = KernelFile::new(&READER.code_that_tells());
        let disks = [(); 2].map(|()| HeldFile::mount(content(), reads));
        for (id, disk) in ["first", "second"].into_iter().zip(&disks) {
            hang(&server, id, &kernel, disk);
        }
        server.signal(Signal::TERM);
        let socket = server.socket();
        wait_until("its socket is gone", PATIENCE, || !socket.exists());
        if reads == Reads::Direct {
            // The kernel lets nobody kill a thread in such a read; all else of the server is gone.
            let stat = format!("/proc/{}/stat", server.pid());
            wait_until("it has ended", PATIENCE, || {
                std::fs::read_to_string(&stat).is_ok_and(|stat| stat.contains(") Z "))
            });
            disks.iter().for_each(HeldFile::let_go);
        }
        assert_eq!(server.stop(Signal::TERM).code(), Some(0));
    }
}

#[test]
fn a_start_that_hangs_holds_up_neither_its_stop_nor_the_end_of_the_server() {
    if !kvm::is_present() {
        return;
    }
    let mut server = Server::start(&["--domain", "ci"]);
    let kernel = KernelFile::new(&READER.code_that_tells());
    let plain = tempfile::NamedTempFile::new().expect("an image");
    std::fs::write(plain.path(), content()).expect("an image");
    let image = std::fs::read(kernel.path()).expect("the kernel");
    let held = HeldFile::mount(image, Reads::Cached);
    let mut hung = config(held.path(), plain.path());
    hung["boot-source"]["initrd_path"] = json!(held.path());
    server.done("PUT", "/vms/hung", &hung.to_string());
    held.hold(0);
    let mut starter = server.connect();
    let body = format!(
        "PUT /vms/hung/actions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n{START}",
        START.len()
    );
    starter.send(body.as_bytes()).expect("it listens");
    wait_until("its kernel is read", PATIENCE, || held.is_waited_for());
    start(&server, "well", &config(&kernel.path(), plain.path()));
    wait_until("the neighbour has read its disk", PATIENCE, || {
        is_done(&server, "well")
    });
    let refused = server.call("PUT", "/vms/hung/actions", STOP);
    assert_eq!(refused.status, 400, "{}", refused.fault());
    let status = server.stop(Signal::TERM);
    assert_eq!(status.code(), Some(0), "{status}");
}

#[test]
fn a_second_signal_ends_a_server_at_once_that_waits_for_its_vms() {
    if !kvm::is_present() {
        return;
    }
    let mut server = Server::start(&["--domain", "ci"]);
    let kernel = KernelFile::new(&READER.code_that_tells());
    let disk = HeldFile::mount(content(), Reads::Cached);
    hang(&server, "hung", &kernel, &disk);
    server.signal(Signal::TERM);
    let status = server.stop(Signal::TERM);
    // It may have ended in order before the second one came.
    assert!(matches!(status.code(), Some(0 | 1)), "{status}");
    assert!(!server.socket().exists());
}
