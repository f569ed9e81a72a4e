//! What a guest's network costs the host: `cargo bench -p samepage-tests --bench network`.
//!
//! A Linux guest fetches and sends data by TCP through its tap device, in a network namespace of the
//! program's own, with merging on. Beside it stands the same data through a plain socket over
//! loopback, in the same run. Where the guest's kernel mode is emulated, the guest is what limits
//! the throughput; what the monitor takes of a CPU for a byte holds elsewhere too.
//!
//! Needs root, for the namespace and the tap device.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use samepage_tests::guests::{eager_monitor, launch};
use samepage_tests::linux;
use serde_json::json;
use vmm::config::{NetworkInterface, NetworkPatch, RateLimiterConfig, TokenBucketConfig};
use vmm::{Monitor, VmId};

/// Set in the namespace.
const INSIDE: &str = "SAMEPAGE_BENCH_NETWORK_INSIDE";
const GUEST_BYTES: usize = 4 << 20;
const LOOPBACK_BYTES: usize = 1 << 30;
const LIMIT_BYTES_PER_S: u64 = 50_000;
const LIMITED_WINDOW: Duration = Duration::from_secs(20);
const CHUNK_BYTES: usize = 64 << 10;

/// Fetches, sends, then fetches until it is ended.
const GUEST: &str = "ip addr add 192.0.2.2/24 dev eth0; ip link set eth0 up; \
     until nc 192.0.2.1 9000 | wc -c | grep -v ^0; do sleep 1; done; \
     dd if=/dev/zero bs=65536 count=64 2>/dev/null | nc 192.0.2.1 9001; \
     nc 192.0.2.1 9002 > /dev/null";

#[expect(clippy::cast_precision_loss, reason = "figures of a report")]
fn float(count: u64) -> f64 {
    count as f64
}

/// CPU time so far of all threads with such a name, in seconds.
fn cpu_s(is_meant: impl Fn(&str) -> bool) -> io::Result<f64> {
    let mut cpu_ns = 0;
    for task in fs::read_dir("/proc/self/task")? {
        let task = task?.path();
        if is_meant(fs::read_to_string(task.join("comm"))?.trim()) {
            let text = fs::read_to_string(task.join("schedstat"))?;
            let first = text.split_whitespace().next().map(str::parse::<u64>);
            cpu_ns += first.and_then(Result::ok).unwrap_or(0);
        }
    }
    Ok(float(cpu_ns) / 1e9)
}

/// Sends `length_bytes`; returns when the other side has closed.
fn send(mut stream: TcpStream, length_bytes: usize) -> io::Result<u64> {
    let chunk = vec![0x5a; CHUNK_BYTES];
    for _ in 0..length_bytes / CHUNK_BYTES {
        stream.write_all(&chunk)?;
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    // It says nothing, and then closes.
    let _nothing = stream.read(&mut [0; 1])?;
    Ok(length_bytes as u64)
}

/// Receives until the other side has sent all.
fn receive(mut stream: TcpStream) -> io::Result<u64> {
    let (mut chunk, mut length_bytes) = (vec![0; CHUNK_BYTES], 0);
    loop {
        match stream.read(&mut chunk)? {
            0 => return Ok(length_bytes),
            length => length_bytes += length as u64,
        }
    }
}

/// Runs a transfer, and says its MB/s and CPU seconds of `threads` for a GB.
fn measure(
    name: &str,
    threads: fn(&str) -> bool,
    transfer: impl FnOnce() -> io::Result<u64>,
) -> io::Result<(f64, f64)> {
    let (begun, cpu_before) = (Instant::now(), cpu_s(threads)?);
    let bytes = float(transfer()?);
    let speed = bytes / 1e6 / begun.elapsed().as_secs_f64();
    let cost = (cpu_s(threads)? - cpu_before) / (bytes / 1e9);
    println!("{name:18} {speed:>9.2} MB/s  {cost:>8.3} CPU s for a GB");
    Ok((speed, cost))
}

/// The same data from one thread to another over loopback, all of whose CPU time counts.
fn loopback() -> io::Result<(f64, f64)> {
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    let address = listener.local_addr()?;
    let transfer = || {
        std::thread::scope(|scope| {
            let begin = || send(TcpStream::connect(address)?, LOOPBACK_BYTES);
            let sender = std::thread::Builder::new()
                .name("loopback".to_owned())
                .spawn_scoped(scope, begin)?;
            let received = receive(listener.accept()?.0);
            // Joined late enough for its CPU time to be there still: it waits for the close.
            sender.join().map_err(|_| io::Error::other("sender"))??;
            received
        })
    };
    // A thread that ended has no time any more: both sides are counted as the process.
    let before = process_cpu_s()?;
    let (speed, _) = measure("loopback", |_| false, transfer)?;
    let cost = (process_cpu_s()? - before) / (float(LOOPBACK_BYTES as u64) / 1e9);
    println!("{:18} {cost:>28.3} CPU s for a GB, both sides", "");
    Ok((speed, cost))
}

/// CPU time of this process, in seconds.
fn process_cpu_s() -> io::Result<f64> {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    let seconds = u64::try_from(time.tv_sec).map_err(io::Error::other)?;
    let nanoseconds = u64::try_from(time.tv_nsec).map_err(io::Error::other)?;
    Ok(float(seconds) + float(nanoseconds) / 1e9)
}

/// Lets time pass: what the guest gets in it is what is measured.
fn wait_for(time: Duration) {
    std::thread::sleep(time);
}

/// What the tap device gave to the monitor so far, with the header before each frame.
fn given_bytes() -> io::Result<u64> {
    let text = fs::read_to_string("/proc/self/net/dev")?;
    let line = text
        .lines()
        .find_map(|line| line.trim().strip_prefix("tap0:"));
    let counters = line.unwrap_or_default().split_whitespace();
    let counters: Vec<u64> = counters.filter_map(|word| word.parse().ok()).collect();
    // Of receiving there are eight, of sending bytes and packets come first.
    match counters.get(8..10) {
        Some(&[bytes, packets]) => Ok(bytes + 12 * packets),
        _ => Err(io::Error::other("no counters of tap0")),
    }
}

/// How far what the guest gets is from its limit, in per cent.
fn limited(monitor: &Monitor, id: &VmId, listener: &TcpListener) -> io::Result<()> {
    let bucket = TokenBucketConfig {
        size: LIMIT_BYTES_PER_S / 10,
        one_time_burst: None,
        refill_time: 100,
    };
    let patch = NetworkPatch {
        iface_id: "eth0".to_owned(),
        rx_rate_limiter: Some(RateLimiterConfig {
            bandwidth: Some(bucket),
            ops: None,
        }),
        tx_rate_limiter: None,
    };
    monitor
        .limit_network(id, &patch)
        .map_err(io::Error::other)?;
    let stream = listener.accept()?.0;
    let sender = std::thread::spawn(move || send(stream, 1 << 30));
    // Past the full bucket.
    wait_for(Duration::from_secs(2));
    let (begun, before) = (Instant::now(), given_bytes()?);
    wait_for(LIMITED_WINDOW);
    let rate = float(given_bytes()? - before) / begun.elapsed().as_secs_f64();
    let off = (rate / float(LIMIT_BYTES_PER_S) - 1.0) * 100.0;
    println!("limited to {LIMIT_BYTES_PER_S} B/s: {rate:.0} B/s, {off:+.1} %");
    monitor.stop(id).map_err(io::Error::other)?;
    // The guest is gone, and nobody answers any more: the sender ends with the process.
    drop(sender);
    Ok(())
}

fn ip(arguments: &[&str]) -> io::Result<()> {
    let status = Command::new("busybox").arg("ip").args(arguments).status()?;
    status
        .success()
        .then_some(())
        .ok_or_else(|| io::Error::other(format!("ip {arguments:?}: {status}")))
}

fn bench() -> io::Result<()> {
    ip(&["link", "set", "lo", "up"])?;
    let (loopback_speed, loopback_cost) = loopback()?;
    let monitor = eager_monitor("network");
    let mut config = linux::running(GUEST);
    config.network_interfaces = vec![NetworkInterface::new("eth0", "tap0")];
    let id = launch(&monitor, "guest", config);
    ip(&["addr", "add", "192.0.2.1/24", "dev", "tap0"])?;
    ip(&["link", "set", "tap0", "up"])?;
    let listen = |port: u16| TcpListener::bind(("192.0.2.1", port));
    let (first, second, third) = (listen(9000)?, listen(9001)?, listen(9002)?);
    let events: fn(&str) -> bool = |name| name == "events";
    let stream = first.accept()?.0;
    let fetched = measure("guest fetches", events, || send(stream, GUEST_BYTES))?;
    let stream = second.accept()?.0;
    let sent = measure("guest sends", events, || receive(stream))?;
    for (name, (speed, cost)) in [("fetches", fetched), ("sends", sent)] {
        println!(
            "guest {name}: {:.5} of loopback's speed, event loop at {:.2} of loopback's CPU for a byte",
            speed / loopback_speed,
            cost / loopback_cost
        );
    }
    limited(&monitor, &id, &third)?;
    println!("{}", json!({"fetched": fetched, "sent": sent}));
    Ok(())
}

fn main() -> ExitCode {
    if std::env::var_os(INSIDE).is_none() {
        let own = std::env::current_exe().map(|own| {
            let mut command = Command::new("unshare");
            command.arg("--net").arg(own).env(INSIDE, "1");
            command.exec()
        });
        eprintln!("network: error: cannot run in a network namespace: {own:?}");
        return ExitCode::FAILURE;
    }
    match bench() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("network: error: {error}");
            ExitCode::FAILURE
        }
    }
}
