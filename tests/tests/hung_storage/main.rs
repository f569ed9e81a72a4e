//! Storage that stops answering holds up nobody but who asked it for something.

mod held_file;
mod written_files;

use std::os::unix::net::UnixStream;
use std::path::Path;

use held_file::{HeldFile, Reads, Silence};
use rustix::process::Signal;
use samepage_tests::disk_storm::{Access, DiskStorm};
use samepage_tests::http::Connection;
use samepage_tests::kvm;
use samepage_tests::server::Server;
use samepage_tests::tiny_kernel::KernelFile;
use samepage_tests::wait::{PATIENCE, wait_until};
use serde_json::{Value, json};
use tempfile::NamedTempFile;

const START: &str = r#"{"action_type": "InstanceStart"}"#;
const STOP: &str = r#"{"action_type": "InstanceStop"}"#;
const DISK_BYTES: u32 = 4 << 20;

/// A guest that reads all of its disk into its memory, and then says so.
const READER: DiskStorm = DiskStorm {
    access: Access::Read,
    disks: 1,
    requests: 4,
    request_bytes: DISK_BYTES,
};

/// What stops a guest that asks for this. What the server itself looks at is there.
fn silence(access: Access) -> Silence {
    match access {
        Access::Read => Silence::ReadsBehind(1 << 20),
        Access::Write => Silence::Writes,
        Access::Flush => Silence::Flushes,
    }
}

/// A server, and what its guests are made of.
struct Host {
    server: Server,
    /// Boots a [`READER`].
    kernel: KernelFile,
    /// A disk that always answers.
    plain: NamedTempFile,
}

impl Host {
    fn start() -> Host {
        // Before the server is there, which has to see them.
        held_file::own_mounts();
        Host::of(Server::start(&["--domain", "ci"]))
    }

    fn of(server: Server) -> Host {
        Host {
            server,
            kernel: KernelFile::new(&READER.code_that_tells()),
            plain: plain_disk(),
        }
    }

    /// A [`READER`] of a disk.
    fn reader_of(&self, disk: &Path) -> Value {
        config(READER, &self.kernel.path(), &[disk])
    }

    fn launch(&self, id: &str, config: &Value) {
        self.create(id, config);
        self.server
            .done("PUT", &format!("/vms/{id}/actions"), START);
    }

    fn create(&self, id: &str, config: &Value) {
        self.server
            .done("PUT", &format!("/vms/{id}"), &config.to_string());
    }

    fn stop_vm(&self, id: &str) {
        self.server.done("PUT", &format!("/vms/{id}/actions"), STOP);
        let state = &self.server.call("GET", &format!("/vms/{id}"), "").json()["state"];
        assert_eq!(state, "Ended", "{id}");
    }

    fn has_said(&self, id: &str, text: &str) -> bool {
        let console = self.server.call("GET", &format!("/vms/{id}/console"), "");
        String::from_utf8_lossy(&console.body).contains(text)
    }

    fn wait_done(&self, id: &str) {
        wait_until("the guest's requests are answered", PATIENCE, || {
            self.has_said(id, "done")
        });
    }

    /// Launches a VM whose disk stops answering what `config`'s guest asks it for.
    fn hang(&self, id: &str, config: &Value, disk: &HeldFile, access: Access) {
        disk.hold(silence(access));
        self.launch(id, config);
        wait_until("its disk is asked", PATIENCE, || disk.is_waited_for());
    }

    /// Has a [`READER`] run beside whatever hangs.
    fn assert_neighbours_are_well(&self, id: &str) {
        self.launch(id, &self.reader_of(self.plain.path()));
        self.wait_done(id);
        self.stop_vm(id);
        self.server.done("DELETE", &format!("/vms/{id}"), "");
    }

    /// Sends a request, on a connection that waits for the answer.
    fn begin(&self, path: &str, body: &str) -> Connection {
        let mut client = self.server.connect();
        let request = format!(
            "PUT {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        client.send(request.as_bytes()).expect("it listens");
        client
    }
}

fn plain_disk() -> NamedTempFile {
    let disk = NamedTempFile::new().expect("an image");
    std::fs::write(disk.path(), content()).expect("an image");
    disk
}

fn content() -> Vec<u8> {
    let sector = |number: u32| [number.to_le_bytes()[0]; 512];
    (0..DISK_BYTES / 512).flat_map(sector).collect()
}

fn config(guest: DiskStorm, kernel: &Path, disks: &[&Path]) -> Value {
    let drive = |(number, path): (usize, &&Path)| {
        json!({
            "drive_id": format!("disk{number}"),
            "path_on_host": path,
            "is_root_device": false,
            "is_read_only": false,
            "cache_type": "Writeback",
        })
    };
    json!({
        "boot-source": {"kernel_image_path": kernel},
        "machine-config": {"vcpu_count": 1, "mem_size_mib": guest.mem_size_mib()},
        "drives": disks.iter().enumerate().map(drive).collect::<Vec<_>>(),
        "samepage": {"merge_domain": "ci"},
    })
}

/// A VM's first disk hangs: its second one is served, and so are its neighbours; all VMs end, and the
/// disk is another VM's once it answers.
fn a_hung_disk_holds_up_nobody(access: Access) {
    if !kvm::is_present() {
        return;
    }
    let host = Host::start();
    let guest = DiskStorm {
        access,
        disks: 2,
        ..READER
    };
    let kernel = KernelFile::new(&guest.code_that_tells());
    let beside = plain_disk();
    let disk = HeldFile::mount(content(), Reads::Direct);
    let both = config(guest, &kernel.path(), &[disk.path(), beside.path()]);
    host.hang("hung", &both, &disk, access);
    wait_until("its other disk is served", PATIENCE, || {
        host.has_said("hung", "1")
    });

    for id in ["well", "later"] {
        host.assert_neighbours_are_well(id);
    }
    assert!(!host.has_said("hung", "0"));
    host.stop_vm("hung");
    host.server.done("DELETE", "/vms/hung", "");

    // Somebody else's now, and nobody writes what is read late into it. While it is written to, the
    // kernel lets nobody so much as ask for its size: whoever names it waits, and nobody else.
    let mut creator = host.begin("/vms/next", &both.to_string());
    host.assert_neighbours_are_well("beside");
    if access == Access::Read {
        assert_eq!(creator.reply().status, 204);
        let refused = host.server.call("PUT", "/vms/next/actions", START);
        assert_eq!(refused.status, 409, "{}", refused.fault());
        disk.let_go();
    } else {
        disk.let_go();
        assert_eq!(creator.reply().status, 204);
    }
    wait_until("the disk is free again", PATIENCE, || {
        host.server.call("PUT", "/vms/next/actions", START).status == 204
    });
    host.wait_done("next");
    let expected = match access {
        Access::Write => vec![0; DISK_BYTES as usize],
        Access::Read | Access::Flush => content(),
    };
    assert!(disk.content() == expected, "the disk holds something else");
}

#[test]
fn nobody_else_sees_a_held_file_so_that_none_is_left_by_a_test_that_is_killed() {
    if !kvm::is_present() {
        return;
    }
    held_file::own_mounts();
    let disk = HeldFile::mount(content(), Reads::Cached);
    assert_eq!(std::fs::read(disk.path()).expect("it answers"), content());
    let is_mounted_for = |process: &str| {
        let mounts = std::fs::read_to_string(format!("/proc/{process}/mountinfo"));
        let mounts = mounts.expect("this is Linux");
        mounts.contains(&format!(" {} ", disk.path().display()))
    };
    assert!(is_mounted_for("thread-self"));
    let parent = std::os::unix::process::parent_id();
    assert!(!is_mounted_for(&parent.to_string()));
}

#[test]
fn a_disk_that_hangs_at_a_read_holds_up_neither_other_disks_nor_the_end_of_any_vm() {
    a_hung_disk_holds_up_nobody(Access::Read);
}

#[test]
fn a_disk_that_hangs_at_a_write_holds_up_neither_other_disks_nor_the_end_of_any_vm() {
    a_hung_disk_holds_up_nobody(Access::Write);
}

#[test]
fn a_disk_that_hangs_at_a_flush_holds_up_neither_other_disks_nor_the_end_of_any_vm() {
    a_hung_disk_holds_up_nobody(Access::Flush);
}

#[test]
fn a_disk_that_cannot_be_closed_holds_up_no_end_of_a_vm() {
    if !kvm::is_present() {
        return;
    }
    let host = Host::start();
    let disk = HeldFile::mount(content(), Reads::Direct);
    host.launch("well", &host.reader_of(host.plain.path()));
    host.launch("hung", &host.reader_of(disk.path()));
    host.wait_done("hung");
    disk.hold(Silence::Closing);
    host.stop_vm("hung");
    wait_until("its disk is closed", PATIENCE, || disk.is_waited_for());
    host.server.done("DELETE", "/vms/hung", "");
    host.stop_vm("well");
}

#[test]
fn a_server_ends_in_order_while_disks_hang() {
    if !kvm::is_present() {
        return;
    }
    for (access, reads) in [
        (Access::Read, Reads::Cached),
        (Access::Read, Reads::Direct),
        (Access::Write, Reads::Direct),
        (Access::Flush, Reads::Direct),
    ] {
        let mut host = Host::start();
        let guest = DiskStorm { access, ..READER };
        let kernel = KernelFile::new(&guest.code_that_tells());
        let disks = [(); 2].map(|()| HeldFile::mount(content(), reads));
        for (id, disk) in ["first", "second"].into_iter().zip(&disks) {
            let config = config(guest, &kernel.path(), &[disk.path()]);
            host.hang(id, &config, disk, access);
        }
        host.server.signal(Signal::TERM);
        let socket = host.server.socket();
        wait_until("its socket is gone", PATIENCE, || !socket.exists());
        if reads == Reads::Direct {
            // The kernel lets nobody kill a thread that waits there; all else of the server is gone.
            let stat = format!("/proc/{}/stat", host.server.pid());
            wait_until("it has ended", PATIENCE, || {
                std::fs::read_to_string(&stat).is_ok_and(|stat| stat.contains(") Z "))
            });
            disks.iter().for_each(HeldFile::let_go);
        }
        assert_eq!(host.server.stop(Signal::TERM).code(), Some(0), "{access:?}");
    }
}

/// A VM called `hung` whose start waits for its kernel, which is on this file, and the connection
/// that waits for the start.
fn hang_start(host: &Host) -> (HeldFile, Connection) {
    let image = std::fs::read(host.kernel.path()).expect("the kernel");
    let held = HeldFile::mount(image, Reads::Cached);
    let mut config = config(READER, held.path(), &[host.plain.path()]);
    config["boot-source"]["initrd_path"] = json!(held.path());
    host.create("hung", &config);
    held.hold(Silence::ReadsBehind(0));
    let starter = host.begin("/vms/hung/actions", START);
    wait_until("its kernel is read", PATIENCE, || held.is_waited_for());
    (held, starter)
}

#[test]
fn a_start_that_hangs_holds_up_neither_its_stop_nor_the_end_of_the_server() {
    if !kvm::is_present() {
        return;
    }
    let mut host = Host::start();
    let (_held, _starter) = hang_start(&host);
    host.assert_neighbours_are_well("well");
    let refused = host.server.call("PUT", "/vms/hung/actions", STOP);
    assert_eq!(refused.status, 400, "{}", refused.fault());
    let status = host.server.stop(Signal::TERM);
    assert_eq!(status.code(), Some(0), "{status}");
}

/// Two signals to a server that waits for an answer it owes. Whether it was cut by the second one;
/// if that came too late, the server has ended in order.
fn is_cut_by_a_second_signal() -> bool {
    let mut host = Host::start();
    let (_held, _starter) = hang_start(&host);
    let socket = host.server.socket();
    host.server.signal(Signal::TERM);
    // Two that come at once are one to the kernel.
    wait_until("the first signal is heeded", PATIENCE, || {
        UnixStream::connect(&socket).is_err()
    });
    let code = host.server.stop(Signal::TERM).code();
    assert!(!socket.exists());
    assert!(matches!(code, Some(0 | 1)), "{code:?}");
    code == Some(1)
}

#[test]
fn a_second_signal_ends_a_server_at_once_that_waits_for_its_clients() {
    if !kvm::is_present() {
        return;
    }
    // It waits for seconds, which the second signal may miss on a busy host, but not each time.
    let was_cut = (0..5).any(|_| is_cut_by_a_second_signal());
    assert!(was_cut, "the second signals made no difference");
}
