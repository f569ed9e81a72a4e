//! Linux on its disks. Not run by default: it boots a kernel, which takes a minute or two where
//! KVM has to emulate kernel mode, and builds that kernel first where it is not in the cache.
//!
//!     cargo test -p vmm --test linux_disks -- --ignored

#![expect(
    clippy::unwrap_used,
    reason = "a test, also where it is not in a #[test] function"
)]

mod guest;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use guest::{Lab, skip};
use vmm::config::{CacheType, Drive};
use vmm::{EndReason, VmConfig};

const SECTOR: usize = 512;
/// A boot and the commands, with time to spare for a busy host.
const BOOT: Duration = Duration::from_secs(600);

/// The parts of the guest, by name.
fn build_guest() -> HashMap<String, PathBuf> {
    let build = Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/guest-linux/build");
    let output = Command::new(build)
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "the guest cannot be built: {}",
        output.status
    );
    let parts = String::from_utf8(output.stdout).unwrap();
    let parts = parts.lines().filter_map(|line| line.split_once('='));
    parts
        .map(|(name, path)| (name.to_owned(), path.into()))
        .collect()
}

fn drive(drive_id: &str, path: &Path, is_read_only: bool) -> Drive {
    let json = serde_json::json!({
        "drive_id": drive_id,
        "path_on_host": path,
        "is_root_device": false,
        "is_read_only": is_read_only,
        "cache_type": CacheType::Writeback,
    });
    serde_json::from_value(json).unwrap()
}

/// What both disks hold at first; no two sectors are equal.
fn contents() -> Vec<u8> {
    (0..128 * SECTOR / 4)
        .flat_map(|word| u32::to_be_bytes(word.try_into().unwrap()))
        .collect()
}

#[test]
#[ignore = "boots Linux, and builds it where it is not in the cache"]
fn linux_reads_and_writes_its_disks_and_cannot_write_a_read_only_one() {
    if skip() {
        return;
    }
    let parts = build_guest();
    let lab = Lab::new();
    let writable = lab.file("writable", &contents());
    let read_only = lab.file("read-only", &contents());
    let commands = "cat /sys/block/vda/serial; echo; cat /sys/block/vda/ro /sys/block/vdb/ro; \
         cmp /dev/vda /dev/vdb && echo the same; \
         echo from the guest | dd of=/dev/vda bs=512 seek=100 conv=notrunc,fsync; \
         echo written: $?; \
         echo from the guest | dd of=/dev/vdb bs=512 seek=100 conv=notrunc,fsync; \
         echo refused: $?";
    let mut config = VmConfig::new(&parts["vmlinux"]);
    config.boot_source.initrd_path = Some(parts["initramfs"].clone());
    config.boot_source.boot_args = Some(format!(
        "console=ttyS0 quiet panic=-1 samepage.run=\"{commands}\""
    ));
    config.drives = vec![
        drive("scratch", &writable, false),
        drive("fixed", &read_only, true),
    ];
    let id = lab.start("linux", config);
    let end = lab.monitor.wait_ended(&id, Instant::now() + BOOT);
    let console = String::from_utf8_lossy(&lab.console(&id).history()).replace('\r', "");
    assert_eq!(end, Some(EndReason::GuestShutdown), "{console}");

    for expected in [
        "\nscratch\n0\n1\nthe same\n",
        "\nwritten: 0\n",
        "\nrefused: 1\n",
    ] {
        assert!(console.contains(expected), "no {expected:?} in: {console}");
    }
    let mut expected = contents();
    let text = b"from the guest\n";
    expected[100 * SECTOR..][..text.len()].copy_from_slice(text);
    assert!(
        std::fs::read(writable).unwrap() == expected,
        "other bytes than those were written"
    );
    assert!(
        std::fs::read(read_only).unwrap() == contents(),
        "the read-only disk was written to"
    );
}
