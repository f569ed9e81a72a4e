//! Linux and its devices besides disks.

use std::collections::BTreeSet;

use samepage_tests::guests::{eager_monitor, launch};
use samepage_tests::refusal::assert_refused;
use samepage_tests::server::Server;
use samepage_tests::wait::wait_until;
use samepage_tests::{kvm, linux};
use serde_json::json;
use vmm::EndReason;
use vmm::config::EntropyConfig;

/// Prints 2048 bytes of the entropy device as lines of 16 hexadecimal bytes.
const READ_ENTROPY: &str = "mount -t devtmpfs none /dev 2>/dev/null; \
     cat /sys/class/misc/hw_random/rng_current; \
     dd if=/dev/hwrng bs=64 count=32 2>/dev/null | od -An -v -tx1";

/// The bytes that [`READ_ENTROPY`] printed.
fn random_bytes(console: &str) -> Vec<u8> {
    let byte = |word: &str| u8::from_str_radix(word, 16).ok();
    let is_dump = |words: &Vec<&str>| words.len() == 16 && words.iter().all(|word| word.len() == 2);
    let lines = console
        .lines()
        .map(|line| line.split_whitespace().collect());
    lines
        .filter(is_dump)
        .flat_map(|words| words.into_iter().filter_map(byte).collect::<Vec<_>>())
        .collect()
}

#[test]
fn linux_reads_random_bytes_from_its_entropy_device() {
    if !kvm::is_present() {
        return;
    }
    let monitor = eager_monitor("entropy");
    let mut dumps = BTreeSet::new();
    for name in ["first", "second"] {
        let mut config = linux::running(READ_ENTROPY);
        config.entropy = Some(EntropyConfig::default());
        let id = launch(&monitor, name, config);
        let end = linux::end(&monitor, &id);
        let console = linux::console(&monitor, &id);
        assert_eq!(end, EndReason::GuestShutdown, "{console}");
        assert!(console.contains("virtio_rng"), "{console}");
        let bytes = random_bytes(&console);
        assert_eq!(bytes.len(), 2048, "{console}");
        // Of 256 values 2048 random bytes leave out fewer than 10, but for one time in 10^20.
        let values: BTreeSet<u8> = bytes.iter().copied().collect();
        assert!(values.len() > 246, "{} values: {console}", values.len());
        dumps.insert(bytes);
    }
    assert_eq!(dumps.len(), 2, "two guests read the same");
}

#[test]
fn an_entropy_device_is_set_before_the_start_as_with_firecracker_and_not_after_it() {
    if !kvm::is_present() {
        return;
    }
    let server = Server::start(&[]);
    let config = linux::running(READ_ENTROPY);
    let config = serde_json::to_string(&config).expect("a configuration");
    server.done("PUT", "/vms/a", &config);
    let limited = json!({"rate_limiter": {"bandwidth": {"size": 1024, "refill_time": 50}}});
    let limited = limited.to_string();
    let path = "/vms/a/entropy";
    server.done("PUT", path, "{}");
    server.done("PUT", path, &limited);
    let no_time = r#"{"rate_limiter": {"ops": {"size": 1}}}"#;
    assert_refused(&server, ("PUT", path, no_time, 400, "refill_time"));
    let kept = server.call("GET", "/vms/a/config", "").json();
    assert_eq!(
        kept["entropy"]["rate_limiter"]["bandwidth"]["size"],
        json!(1024)
    );

    server.done(
        "PUT",
        "/vms/a/actions",
        r#"{"action_type": "InstanceStart"}"#,
    );
    assert_refused(&server, ("PUT", path, &limited, 400, "already started"));
    wait_until("the guest ends", linux::PATIENCE, || {
        let state = server.call("GET", "/vms/a", "").json()["state"].clone();
        state != "Running"
    });
    let console = server.call("GET", "/vms/a/console", "").body;
    let console = String::from_utf8_lossy(&console).replace('\r', "");
    assert_eq!(random_bytes(&console).len(), 2048, "{console}");
}
