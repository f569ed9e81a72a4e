//! Clients of Firecracker, unmodified from their registries, drive a VM over its own socket.

use std::process::Command;

use samepage_tests::kvm;
use samepage_tests::linux;
use samepage_tests::server::Server;
use samepage_tests::wait::wait_until;

/// `firecracker-python`'s `Api` boots a Linux guest piece by piece, pauses and resumes it.
#[test]
fn a_client_from_pypi_boots_a_linux_guest_piece_by_piece() {
    if !kvm::is_present() {
        return;
    }
    // Its HTTP library takes the socket's path for the name of a host, and writes it in small letters.
    let name = format!("samepage-clients-{}", std::process::id());
    let directory = tempfile::Builder::new()
        .prefix(&name)
        .rand_bytes(0)
        .tempdir();
    let directory = directory.unwrap();
    let sockets = directory.path().to_str().unwrap();
    let server = Server::start(&["--vm-sockets", sockets]);
    let created = server.cli(&["launch", "one", "--no-start"]);
    assert!(created.status.success(), "{created:?}");

    let config = linux::running("echo $((6*7))-marker");
    let initramfs = config.boot_source.initrd_path.clone().unwrap();
    let driven = Command::new(linux::python_with_clients())
        .arg(linux::resource("clients/drive_vm.py"))
        .arg(directory.path().join("one.sock"))
        .arg(&config.boot_source.kernel_image_path)
        .arg(initramfs)
        .arg(config.boot_source.boot_args())
        .output()
        .unwrap();
    assert!(
        driven.status.success(),
        "{}",
        String::from_utf8_lossy(&driven.stderr)
    );
    wait_until("the guest has run the command", linux::PATIENCE, || {
        let console = server.call("GET", "/vms/one/console", "").body;
        String::from_utf8_lossy(&console).contains("42-marker")
    });
}
