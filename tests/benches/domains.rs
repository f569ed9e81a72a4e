//! What it costs that a merge domain is a process: `cargo bench -p samepage-tests --bench domains`.
//!
//! The start of a monitor, its memory, and what a request takes longer by way of the front door.

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use rustix::process::Pid;
use samepage_tests::domains::{State, config, launch, remove};
use samepage_tests::http::Connection;
use samepage_tests::proc::Holdings;
use samepage_tests::server::Server;
use samepage_tests::tiny_kernel::{KernelFile, say_and_rest};

const STARTS: usize = 200;
const VMS: u64 = 10;
const REQUESTS: usize = 5000;

/// Times in order.
struct Times(Vec<Duration>);

impl Times {
    fn of(count: usize, mut what: impl FnMut(usize)) -> Times {
        let time = |number| {
            let begun = Instant::now();
            what(number);
            begun.elapsed()
        };
        let mut times: Vec<Duration> = (0..count).map(time).collect();
        times.sort();
        Times(times)
    }

    fn told(&self) -> String {
        let at = |percent: usize| self.0[(self.0.len() * percent / 100).min(self.0.len() - 1)];
        format!("p50 {:?}, p99 {:?}", at(50), at(99))
    }
}

fn pss_kib(pid: Pid) -> u64 {
    let pid = u32::try_from(pid.as_raw_nonzero().get()).expect("a pid");
    Holdings::of(pid).expect("its memory").mapped.pss_bytes / 1024
}

/// Kernel memory of a domain's cgroup of version 1, where there is one.
fn kernel_kib(group: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(group.join("memory.kmem.usage_in_bytes")).ok()?;
    Some(text.trim().parse::<u64>().ok()? / 1024)
}

fn starts(server: &Server, kernel: &KernelFile, named: Option<&str>) -> Times {
    let body = config(kernel, named).to_string();
    let times = Times::of(STARTS, |number| {
        server.done("PUT", &format!("/vms/s{number}"), &body);
    });
    for number in 0..STARTS {
        remove(server, &format!("s{number}"));
    }
    times
}

fn main() -> ExitCode {
    let kernel = KernelFile::new(&say_and_rest("hi"));
    let state = State::empty();
    let parent = Path::new("/sys/fs/cgroup/memory")
        .join(format!("samepage-bench-domains-{}", std::process::id()));
    let has_cgroup = parent
        .parent()
        .is_some_and(|v1| v1.join("memory.limit_in_bytes").exists());
    let group = parent.to_str().expect("text");
    let mut arguments = vec!["--state-dir", state.path(), "--domain", "d"];
    if has_cgroup {
        arguments.extend(["--cgroup", group]);
    }
    let mut server = Server::start(&arguments);
    let in_process = Server::start(&[]);

    println!(
        "a VM is created, and a monitor started for it: {}",
        starts(&server, &kernel, None).told()
    );
    println!(
        "a VM is created in a domain that has a monitor: {}",
        starts(&server, &kernel, Some("d")).told()
    );
    println!(
        "a VM is created in a domain of one process: {}",
        starts(&in_process, &kernel, None).told()
    );

    let monitor = state.monitor("d");
    let of_domain = parent.join("domain-d");
    let empty = (pss_kib(monitor), kernel_kib(&of_domain));
    for number in 0..VMS {
        launch(&server, &format!("m{number}"), &kernel, Some("d"));
    }
    let full = (pss_kib(monitor), kernel_kib(&of_domain));
    println!(
        "PSS of an empty monitor: {} KiB, its kernel memory: {:?} KiB",
        empty.0, empty.1
    );
    let kernel_each = full
        .1
        .zip(empty.1)
        .map(|(full, empty)| full.saturating_sub(empty) / VMS);
    let pss_each = full.0.saturating_sub(empty.0) / VMS;
    println!("each running VM, its few touched pages of guest memory included:");
    println!("PSS {pss_each} KiB, kernel memory {kernel_each:?} KiB");

    let socket = state.directory_of("d").join("api.sock");
    let (mut direct, mut through) = (Connection::open(&socket), server.connect());
    let ask = |connection: &mut Connection| {
        Times::of(REQUESTS, |_| {
            assert_eq!(connection.call("GET", "/vms/m0", "").status, 200);
        })
    };
    println!("GET /vms/m0 at the monitor: {}", ask(&mut direct).told());
    println!(
        "GET /vms/m0 by the front door: {}",
        ask(&mut through).told()
    );

    for number in 0..VMS {
        remove(&server, &format!("m{number}"));
    }
    let pid = monitor;
    server.stop(rustix::process::Signal::TERM);
    samepage_tests::domains::kill(pid);
    if has_cgroup {
        // Not all kernels let the groups go at once.
        let _ = std::fs::remove_dir(&of_domain);
        let _ = std::fs::remove_dir(&parent);
    }
    ExitCode::SUCCESS
}
