//! Linux on its disks.

use std::path::Path;

use samepage_tests::guests::{eager_monitor, launch};
use samepage_tests::{kvm, linux};
use vmm::EndReason;
use vmm::config::{CacheType, Drive};

const SECTOR: usize = 512;

fn drive(drive_id: &str, path: &Path, is_read_only: bool) -> Drive {
    let json = serde_json::json!({
        "drive_id": drive_id,
        "path_on_host": path,
        "is_root_device": false,
        "is_read_only": is_read_only,
        "cache_type": CacheType::Writeback,
    });
    serde_json::from_value(json).expect("a drive")
}

/// What both disks hold at first; no two sectors are equal.
fn contents() -> Vec<u8> {
    (0..128 * SECTOR / 4)
        .flat_map(|word| u32::to_be_bytes(word.try_into().expect("a word")))
        .collect()
}

#[test]
fn linux_reads_and_writes_its_disks_and_cannot_write_a_read_only_one() {
    if !kvm::is_present() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let [writable, read_only] = ["writable", "read-only"].map(|name| directory.path().join(name));
    for disk in [&writable, &read_only] {
        std::fs::write(disk, contents()).unwrap();
    }
    let commands = "cat /sys/block/vda/serial; echo; cat /sys/block/vda/ro /sys/block/vdb/ro; \
         cmp /dev/vda /dev/vdb && echo the same; \
         echo from the guest | dd of=/dev/vda bs=512 seek=100 conv=notrunc,fsync; \
         echo written: $?; \
         echo from the guest | dd of=/dev/vdb bs=512 seek=100 conv=notrunc,fsync; \
         echo refused: $?";
    let mut config = linux::running(commands);
    config.drives = vec![
        drive("scratch", &writable, false),
        drive("fixed", &read_only, true),
    ];
    let monitor = eager_monitor("disks");
    let id = launch(&monitor, "linux", config);
    let end = linux::end(&monitor, &id);
    let console = linux::console(&monitor, &id);
    assert_eq!(end, EndReason::GuestShutdown, "{console}");

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
