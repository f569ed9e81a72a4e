//! Linux guests: they boot, run a command of the caller's, merge while they run, and end.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::{Command, Stdio};

use dedup::Run;
use samepage_tests::guests::{eager_monitor, launch};
use samepage_tests::wait::wait_until;
use samepage_tests::{kvm, linux};
use vmm::{EndReason, ErrorKind, Monitor, VmId, VmState};

#[test]
fn a_linux_guest_boots_to_its_init_and_runs_the_callers_command() {
    if !kvm::is_present() {
        return;
    }
    let monitor = eager_monitor("boot");
    // Neither the answer nor the release is on the command line: both come from the guest.
    let config = linux::running("echo $((6*7))-marker; uname -r; exit 3");
    let id = launch(&monitor, "linux", config);
    assert_eq!(linux::end(&monitor, &id), EndReason::GuestShutdown);
    let printed = linux::printed(&monitor, &id);
    let [marker, release, exit] = &printed[..] else {
        panic!("{}", linux::console(&monitor, &id));
    };
    assert_eq!(
        (marker.as_str(), exit.as_str()),
        ("42-marker", linux::exit_line(3).as_str())
    );
    let banner = format!("Linux version {release} ");
    let kernel = std::fs::read(&linux::guest().vmlinux).unwrap();
    let is_its_own = kernel
        .windows(banner.len())
        .any(|at| at == banner.as_bytes());
    assert!(is_its_own, "the kernel is not {release:?}");
}

/// What two guests of this image share at least, and what of it is mapped in each of them: most of
/// the kernel's text, the unpacked initramfs, and pages that all hold the same. Two thirds of what
/// was measured.
const PAGES_SHARING_MIN: u64 = 3000;
const PAGES_MERGING_MIN: u64 = 2000;

/// A guest that writes files into its memory and prints their checksums for ever, until a line is
/// typed. What it must print is computed here, by another program on other memory.
struct Witness<'a> {
    monitor: &'a Monitor,
    id: VmId,
    /// From where the guest counts in its own files.
    first_number: u32,
    /// Checksums of the files that stay the same.
    same: String,
    own: String,
    rounds_checked: u32,
}

impl Witness<'_> {
    fn launch<'a>(monitor: &'a Monitor, name: &str, first_number: u32) -> Witness<'a> {
        let (first, last) = (first_number, first_number + 20_000);
        let command = format!(
            "stty -echo; cd /tmp; (read line < /dev/ttyS0; > stop) & \
             seq 1 20000 > same; seq {first} {last} > own; n={first}; \
             until [ -e stop ]; do n=$((n+1)); seq $n $((n+2000)) > fresh; \
             echo $n $(md5sum same own fresh); done"
        );
        Witness {
            monitor,
            id: launch(monitor, name, linux::running(&command)),
            first_number,
            same: md5_of_sequence(1, 20_000),
            own: md5_of_sequence(first, last),
            rounds_checked: 0,
        }
    }

    /// Checks what the guest has printed since the last call. Returns the rounds so far.
    fn check(&mut self) -> u32 {
        linux::assert_running(self.monitor, &self.id);
        self.check_lines(&linux::printed(self.monitor, &self.id))
    }

    fn check_lines(&mut self, printed: &[String]) -> u32 {
        for line in &printed[self.rounds_checked as usize..] {
            let number = self.first_number + self.rounds_checked + 1;
            let fresh = md5_of_sequence(number, number + 2000);
            let (same, own) = (&self.same, &self.own);
            let expected = format!("{number} {same} same {own} own {fresh} fresh");
            assert_eq!(*line, expected, "{}", self.id);
            self.rounds_checked += 1;
        }
        self.rounds_checked
    }

    fn pages_merging(&self) -> u64 {
        let stats = self.monitor.merge_stats(&self.id);
        stats.expect("the VM is there").pages_merging
    }

    /// Tells the guest to stop, and checks the rest of what it printed.
    fn finish(&mut self) {
        let console = self.monitor.console(&self.id).expect("the VM is there");
        assert_eq!(console.write_input(b"\n"), Ok(1));
        let end = linux::end(self.monitor, &self.id);
        assert_eq!(end, EndReason::GuestShutdown, "{}", self.id);
        let printed = linux::printed(self.monitor, &self.id);
        let (exit, rounds) = printed.split_last().expect("it printed something");
        assert_eq!(*exit, linux::exit_line(0), "{}", self.id);
        self.check_lines(rounds);
    }
}

/// The checksum of what `seq first last` prints.
fn md5_of_sequence(first: u32, last: u32) -> String {
    let mut sequence = String::new();
    for number in first..=last {
        writeln!(sequence, "{number}").expect("memory");
    }
    let mut md5sum = Command::new("md5sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("run md5sum");
    let mut input = md5sum.stdin.take().expect("its input");
    input.write_all(sequence.as_bytes()).expect("feed md5sum");
    drop(input);
    let output = md5sum.wait_with_output().expect("its output").stdout;
    let text = String::from_utf8(output).expect("text");
    let (checksum, _) = text.split_once(' ').expect("a checksum");
    checksum.to_owned()
}

/// Waits until every guest has computed `more` rounds of right checksums from now on.
fn wait_rounds(witnesses: &mut [Witness<'_>], more: u32) {
    let targets: Vec<u32> = witnesses.iter_mut().map(|one| one.check() + more).collect();
    wait_until("both guests computed checksums", linux::PATIENCE, || {
        let reached = witnesses.iter_mut().zip(&targets);
        reached.fold(true, |all, (one, target)| one.check() >= *target && all)
    });
}

/// Waits until both guests share what they can, while their checksums stay right.
fn wait_merged(monitor: &Monitor, witnesses: &mut [Witness<'_>]) {
    wait_until("both guests are merged", linux::PATIENCE, || {
        witnesses.iter_mut().for_each(|one| _ = one.check());
        monitor.engine().stats().pages_sharing >= PAGES_SHARING_MIN
            && witnesses
                .iter()
                .all(|one| one.pages_merging() >= PAGES_MERGING_MIN)
    });
}

#[test]
fn two_linux_guests_of_one_image_merge_while_they_run_and_compute_right_checksums() {
    if !kvm::is_present() {
        return;
    }
    let monitor = eager_monitor("checksums");
    let mut witnesses = [("one", 200_000), ("two", 700_000)]
        .map(|(name, first_number)| Witness::launch(&monitor, name, first_number));
    wait_rounds(&mut witnesses, 1);
    wait_merged(&monitor, &mut witnesses);
    wait_rounds(&mut witnesses, 5);

    monitor
        .engine()
        .set_run(Run::Unmerge)
        .expect("there is memory");
    assert_eq!(monitor.engine().stats().pages_shared, 0);
    for one in &witnesses {
        assert_eq!(one.pages_merging(), 0, "{}", one.id);
    }
    wait_rounds(&mut witnesses, 2);
    monitor
        .engine()
        .set_run(Run::Merge)
        .expect("merging goes on");
    wait_merged(&monitor, &mut witnesses);
    wait_rounds(&mut witnesses, 5);
    assert!(monitor.engine().stats().pages_sharing >= PAGES_SHARING_MIN);
    witnesses.iter_mut().for_each(Witness::finish);
}

#[test]
fn a_linux_reboot_is_a_guest_reset_and_a_linux_panic_a_guest_panic() {
    if !kvm::is_present() {
        return;
    }
    let monitor = eager_monitor("ends");
    let ends = [
        ("reboot", "reboot -f", EndReason::GuestReset),
        (
            "panic",
            "echo c > /proc/sysrq-trigger",
            EndReason::GuestPanic,
        ),
    ];
    let started =
        ends.map(|(name, command, end)| (launch(&monitor, name, linux::running(command)), end));
    for (id, expected) in started {
        let end = linux::end(&monitor, &id);
        assert_eq!(end, expected, "{}", linux::console(&monitor, &id));
    }
}

#[test]
fn a_linux_that_cannot_be_loaded_is_one_error_and_leaves_no_slot() {
    if !kvm::is_present() {
        return;
    }
    let monitor = eager_monitor("errors");
    let whole = linux::running("true");
    let directory = tempfile::tempdir().unwrap();
    let cut = directory.path().join("cut");
    let kernel = std::fs::read(&linux::guest().vmlinux).unwrap();
    std::fs::write(&cut, &kernel[..kernel.len() / 2]).unwrap();

    let cut_kernel = {
        let mut config = whole.clone();
        config.boot_source.kernel_image_path = cut;
        config
    };
    let little_memory = {
        let mut config = whole.clone();
        config.machine_config.mem_size_mib = 16;
        config
    };
    // Room for the kernel, but not for this beside it.
    let large = directory.path().join("large");
    let large_bytes = (whole.machine_config.mem_size_mib - 8) << 20;
    std::fs::File::create(&large)
        .unwrap()
        .set_len(large_bytes)
        .unwrap();
    let large_initrd = {
        let mut config = whole;
        config.boot_source.initrd_path = Some(large);
        config
    };
    for (field, config) in [
        ("kernel_image_path", cut_kernel),
        ("mem_size_mib", little_memory),
        ("mem_size_mib", large_initrd),
    ] {
        let id: VmId = "vm".parse().unwrap();
        monitor.create(id.clone(), config).unwrap();
        let error = monitor.start(&id).unwrap_err();
        assert!(error.to_string().contains(field), "{field}: {error}");
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
        assert_eq!(monitor.info(&id).unwrap().state, VmState::NotStarted);
        // The worker may have been in the middle of its memory: then it finishes the slot.
        wait_until("no slot is left", linux::PATIENCE, || {
            monitor.engine().stats().slots == 0
        });
        monitor.delete(&id).unwrap();
    }
}
