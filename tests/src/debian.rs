//! The Debian guest of `resources/guest-debian`: the program that it runs, and what that prints.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use vmm::config::Drive;
use vmm::{EndReason, Monitor, VmConfig, VmId};

use crate::linux;

/// Longest that anything of a Debian guest may take here: where the guest's kernel mode is emulated
/// its start needs some 30 s of CPU time, and other tests run beside it.
pub const PATIENCE: Duration = Duration::from_secs(900);
/// Memory of a guest in MiB: at rest it has touched a good third of it.
pub const MEM_SIZE_MIB: u64 = 128;
/// What the program prints when its imports are done.
const READY: &str = "samepage-agent: ready";
/// How the line of a round begins.
const ROUND: &str = "samepage-agent: round ";

/// The files of the guest.
#[derive(Debug)]
pub struct DebianGuest {
    /// The kernel of the Linux guest, an ELF file.
    pub vmlinux: PathBuf,
    /// An ext4 image with Debian, Python and the program.
    pub rootfs: PathBuf,
}

/// What the program in a guest is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Agent {
    /// Its data are made from it.
    pub seed: u64,
    /// The guest powers off after this many rounds; 0: never.
    pub rounds: u64,
    /// Pause between two rounds.
    pub sleep_ms: u64,
}

/// A round as the program printed it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Round {
    /// From 1 on.
    pub number: u64,
    /// Hash of the data and of all that was computed.
    pub digest: String,
    /// Time that the round took, in milliseconds of the guest's clock.
    pub duration_ms: u64,
}

/// All that the program has printed so far, in whole lines.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Progress {
    /// Whether its imports are done.
    pub is_ready: bool,
    /// Its rounds, in the order of the console.
    pub rounds: Vec<Round>,
}

/// The guest, built now if it is not in the cache.
///
/// # Panics
/// If it cannot be built.
pub fn guest() -> &'static DebianGuest {
    static GUEST: OnceLock<DebianGuest> = OnceLock::new();
    GUEST.get_or_init(|| {
        let parts = linux::build("guest-debian");
        DebianGuest {
            vmlinux: parts.path("vmlinux"),
            rootfs: parts.path("rootfs"),
        }
    })
}

impl Agent {
    /// The kernel command line that has the guest run the program.
    pub fn boot_args(&self) -> String {
        let Agent {
            seed,
            rounds,
            sleep_ms,
        } = self;
        format!(
            "console=ttyS0 quiet init=/usr/sbin/samepage-init \
             samepage.run=\"samepage-agent --seed {seed} --rounds {rounds} --sleep-ms {sleep_ms}\""
        )
    }

    /// A guest with one vCPU that runs the program. Its root drive is read-only: any number of
    /// guests use one image.
    ///
    /// # Panics
    /// If the guest cannot be built.
    pub fn config(&self) -> VmConfig {
        let guest = guest();
        let mut config = VmConfig::new(&guest.vmlinux);
        config.boot_source.boot_args = Some(self.boot_args());
        config.machine_config.mem_size_mib = MEM_SIZE_MIB;
        config.drives = vec![root_drive(&guest.rootfs)];
        config
    }
}

impl Progress {
    /// Reads a console's text.
    ///
    /// # Panics
    /// If a line of a round is not as the program prints it.
    pub fn parse(console: &str) -> Progress {
        // What comes after the last line end is a line that is still being printed.
        let whole = console.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let mut progress = Progress::default();
        for line in whole.lines() {
            if line == READY {
                progress.is_ready = true;
            } else if let Some(text) = line.strip_prefix(ROUND) {
                let round = parse_round(text).unwrap_or_else(|| panic!("no round: {line:?}"));
                progress.rounds.push(round);
            }
        }
        progress
    }
}

/// Waits for the guest's end.
///
/// # Panics
/// If it takes too long.
pub fn end(monitor: &Monitor, id: &VmId) -> EndReason {
    let ended = monitor.wait_ended(id, Instant::now() + PATIENCE);
    ended.unwrap_or_else(|| panic!("{id} did not end: {}", linux::console(monitor, id)))
}

/// The digests that a guest with this seed must print in its rounds 1 to `rounds`, computed here by
/// the same program on the host's memory.
///
/// # Panics
/// If the program does not run.
pub fn expected_digests(seed: u64, rounds: u64) -> Vec<String> {
    // By the interpreter in PATH: the first line of the program names the guest's.
    let output = Command::new("python3")
        .arg("-B")
        .arg(linux::resources().join("guest-debian/samepage-agent"))
        .args(["--expect", &seed.to_string()])
        .args((1..=rounds).map(|number| number.to_string()))
        .stderr(Stdio::inherit())
        .output()
        .expect("run python3");
    assert!(output.status.success(), "samepage-agent: {}", output.status);
    let printed = String::from_utf8(output.stdout).expect("text");
    printed.lines().map(str::to_owned).collect()
}

fn parse_round(text: &str) -> Option<Round> {
    let mut words = text.split(' ');
    let round = Round {
        number: words.next()?.parse().ok()?,
        digest: words.next()?.to_owned(),
        duration_ms: words.next()?.parse().ok()?,
    };
    words.next().is_none().then_some(round)
}

fn root_drive(rootfs: &Path) -> Drive {
    let json = serde_json::json!({
        "drive_id": "rootfs",
        "path_on_host": rootfs,
        "is_root_device": true,
        "is_read_only": true,
    });
    serde_json::from_value(json).expect("a drive")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_lines_of_the_program_are_progress_and_nothing_else_is() {
        let console = "samepage-init: ready\nsamepage-agent: ready\n\
             samepage-agent: round 1 abc 1500\n[    9.1] a line of the kernel\n\
             samepage-agent: round 2 de";
        let round = Round {
            number: 1,
            digest: "abc".to_owned(),
            duration_ms: 1500,
        };
        let expected = Progress {
            is_ready: true,
            rounds: vec![round],
        };
        assert_eq!(Progress::parse(console), expected);
        assert_eq!(
            Progress::parse("samepage-agent: ready"),
            Progress::default()
        );
    }

    #[test]
    #[should_panic = "no round"]
    fn a_garbled_round_is_not_passed_over() {
        Progress::parse("samepage-agent: round 1 abc 15x\n");
    }

    #[test]
    fn each_seed_and_each_round_has_a_digest_of_its_own_which_stays() {
        let mut digests = expected_digests(7, 3);
        assert_eq!(digests, expected_digests(7, 3));
        digests.extend(expected_digests(8, 3));
        digests.sort_unstable();
        digests.dedup();
        assert_eq!(digests.len(), 6);
    }
}
