//! The command line's arguments.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use vmm::{MergeDomain, VmId};

use crate::domain_name::DomainName;
use crate::vm_args::VmArgs;

/// Run many near-identical microVMs and give the memory they have in common back to the host
#[derive(Debug, Parser)]
#[command(
    name = "samepage",
    version,
    max_term_width = 100,
    after_help = "\
Examples:
  samepage demo                            see it work, without any setup
  samepage serve &                         start the server
  samepage launch web1 --merge-domain web --kernel vmlinux --initrd initramfs.cpio
  samepage launch web2 --merge-domain web --kernel vmlinux --initrd initramfs.cpio
  samepage stats --watch                   see web1 and web2 share their memory
  samepage console web1                    use web1's serial console
  samepage pause web1                      stand its vCPUs still, until `samepage resume web1`
  samepage run --kernel vmlinux --initrd initramfs.cpio      one VM, right here, no server

The server's socket is --api-sock, else $SAMEPAGE_SOCKET, else $XDG_RUNTIME_DIR/samepage.sock,
else /run/samepage.sock."
)]
pub struct Cli {
    /// The server's unix socket
    #[arg(long, global = true, value_name = "PATH")]
    pub api_sock: Option<PathBuf>,

    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve the REST API on a unix socket until SIGINT, SIGTERM or SIGHUP
    Serve(ServeArgs),
    /// Serve one merge domain on a socket that is inherited as standard input
    #[command(hide = true)]
    Monitor(MonitorArgs),
    /// Run one VM in the foreground, its console on this terminal
    Run(RunArgs),
    /// Create and start a VM on the server
    Launch(LaunchArgs),
    /// List the server's VMs
    Ps(PsArgs),
    /// Stand a VM's vCPUs still; its memory stays, and goes on being merged
    #[command(after_help = "Examples:\n  samepage pause web1")]
    Pause(IdArgs),
    /// Let a paused VM run again
    #[command(after_help = "Examples:\n  samepage resume web1")]
    Resume(IdArgs),
    /// End a VM at once; its record and console stay until `rm`
    #[command(after_help = "Examples:\n  samepage stop web1")]
    Stop(IdArgs),
    /// Merge a VM's memory now, and say what that came to
    Merge(MergeArgs),
    /// Delete a VM that does not run
    Rm(RmArgs),
    /// Attach to a VM's serial console
    Console(ConsoleArgs),
    /// Show what is shared and what that saves
    Stats(StatsArgs),
    /// Check this host: what Samepage lacks here, what makes it slow, and how to mend that
    Doctor(DoctorArgs),
    /// Show same-page merging at work: start VMs, watch their memory fall, verify it
    Demo(DemoArgs),
}

/// Arguments of `serve`.
#[derive(Debug, Args)]
#[command(after_help = "\
SIGINT, SIGTERM and SIGHUP end all VMs and then the server, within 30 s; a second one ends it at once.

Examples:
  samepage serve
  samepage serve --api-sock /run/ci.sock --domain ci
  curl --unix-socket /run/ci.sock http://localhost/merge/ci")]
pub struct ServeArgs {
    /// A merge domain to open now and to keep while it has no VMs; may be repeated
    ///
    /// A domain that is not named here opens with its first VM and closes with its last.
    #[arg(long = "domain", value_name = "NAME")]
    pub domains: Vec<MergeDomain>,

    /// Memory in MiB that each merge domain may take, all its VMs together; past it the VM with the
    /// lowest --oom-priority is ended
    ///
    /// `PATCH /merge/NAME` changes it for one domain. A limit of the server's cgroup counts anyway.
    #[arg(long, value_name = "MIB")]
    pub memory_budget_mib: Option<u32>,

    /// Also stop when standard input ends, so that a parent process cannot leave a server behind
    #[arg(long)]
    pub stop_on_stdin_end: bool,

    /// Give each merge domain a process of its own, and keep its socket and log in this directory
    ///
    /// VMs then go on when the server ends, and a server that is started again on the same directory
    /// finds them. Experimental: domains that share a cgroup's limit do not agree on whose VM ends
    /// when it is reached.
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,

    /// Give each VM a socket of its own in this directory, DIR/ID.sock, with Firecracker's API
    ///
    /// An unmodified client of Firecracker drives the VM there, piece by piece from
    /// PUT /machine-config on: create the VM first, as in `samepage launch ID --no-start`. The directory
    /// is made if it is missing. With --state-dir it is DIR/vms of that unless it is given.
    #[arg(long, value_name = "DIR")]
    pub vm_sockets: Option<PathBuf>,

    /// With --state-dir: make a memory cgroup for each merge domain in this one, version 1 or 2, with
    /// the domain's budget as its limit; it must have no processes of its own
    #[arg(long, value_name = "DIR", requires = "state_dir")]
    pub cgroup: Option<PathBuf>,

    /// With --state-dir: end all VMs when the server ends
    #[arg(long, requires = "state_dir")]
    pub stop_all_on_exit: bool,
}

/// Arguments of `monitor`.
#[derive(Debug, Args)]
#[command(after_help = "\
Not for users: whoever starts one binds its socket, hands it over as standard input, and waits for
the line `ready` on standard output. SIGTERM ends all VMs and then the monitor.

Examples:
  samepage monitor --domain ci")]
pub struct MonitorArgs {
    /// The merge domain, or vm:ID for that of a VM which names none
    #[arg(long, value_name = "NAME")]
    pub domain: DomainName,

    /// Memory in MiB that the domain may take
    #[arg(long, value_name = "MIB")]
    pub memory_budget_mib: Option<u32>,

    /// Keep what each VM's console showed last in a file in this directory
    #[arg(long, value_name = "DIR")]
    pub console_tails: Option<PathBuf>,

    /// Also stop when nobody holds the other end of standard output, a pipe, any more
    #[arg(long)]
    pub end_with_parent: bool,
}

/// Arguments of `run`.
#[derive(Debug, Args)]
#[command(after_help = "\
On a terminal the console takes all keys; Ctrl-A x ends the VM, Ctrl-A Ctrl-A sends one Ctrl-A.
Otherwise standard input is the console's input, and SIGINT or SIGTERM end the VM.

Exit status:
  0        the guest shut down or reset itself, or was ended by Ctrl-A x
  1, 2     samepage failed; wrong arguments
  3        the guest's kernel panicked
  4        the guest triple-faulted
  5        the guest ran an instruction that KVM cannot execute
  6        another error ended the VM, or the guard did for want of memory
  128 + N  signal N ended it: 129 SIGHUP, 130 SIGINT, 131 SIGQUIT, 143 SIGTERM

Examples:
  samepage run --kernel vmlinux --initrd initramfs.cpio
  samepage run --config vm.json --mem-mib 256
  samepage run --kernel vmlinux --drive root.ext4:ro --boot-args 'console=ttyS0 root=/dev/vda'")]
pub struct RunArgs {
    /// The VM.
    #[command(flatten)]
    pub vm: VmArgs,
}

/// Arguments of `launch`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  samepage launch web1 --merge-domain web --kernel vmlinux --initrd initramfs.cpio
  samepage launch web2 --config vm.json
  samepage launch web3 --config vm.json --no-start
  samepage launch web4 --no-start   # a client of Firecracker configures and starts it")]
pub struct LaunchArgs {
    /// The new VM's id: 1 to 64 characters of A-Z a-z 0-9 _ -
    pub id: VmId,

    /// Create it, but do not start it; it then needs no kernel yet
    #[arg(long)]
    pub no_start: bool,

    /// The VM.
    #[command(flatten)]
    pub vm: VmArgs,
}

/// Arguments of `ps`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  samepage ps\n  samepage ps --json")]
pub struct PsArgs {
    /// One JSON array
    #[arg(long)]
    pub json: bool,
}

/// A VM's id.
#[derive(Debug, Args)]
pub struct IdArgs {
    /// The VM's id
    pub id: VmId,
}

/// Arguments of `merge`.
#[derive(Debug, Args)]
#[command(after_help = "\
Scans all of the VM's memory at once, without waiting for pages to have rested, and returns when
that is done. For a VM that has just booted, or is about to be paused. Refused for one that kernel
KSM merges, which nobody can ask to do it now.

Examples:
  samepage merge web1
  samepage merge web1 --json")]
pub struct MergeArgs {
    /// The VM's id
    pub id: VmId,

    /// One JSON object
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `rm`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  samepage rm web1\n  samepage rm --force web1")]
pub struct RmArgs {
    /// The VM's id
    pub id: VmId,

    /// Stop it first if it runs
    #[arg(long, short)]
    pub force: bool,
}

/// Arguments of `console`.
#[derive(Debug, Args)]
#[command(after_help = "\
Shows what the console has shown so far, then what it shows, until the VM ends.
On a terminal Ctrl-A x detaches and Ctrl-A Ctrl-A sends one Ctrl-A; the VM goes on.

Examples:
  samepage console web1
  samepage console web1 --history | tail
  echo uptime | samepage console web1")]
pub struct ConsoleArgs {
    /// The VM's id
    pub id: VmId,

    /// Only watch
    #[arg(long, conflicts_with = "history")]
    pub no_input: bool,

    /// Print what the console has shown so far, and exit
    #[arg(long)]
    pub history: bool,
}

/// Arguments of `stats`.
#[derive(Debug, Args)]
#[command(after_help = "\
Counters have the names and meanings of Linux's /sys/kernel/mm/ksm; `saved` is net of what the
sharing itself costs (shared pages, page tables' mappings, records). A VM that kernel KSM merges
(--merge ksm) is all zeros there; what the kernel tells of it is in columns of its own.

Examples:
  samepage stats
  samepage stats web1
  samepage stats --watch=5
  samepage stats --json")]
pub struct StatsArgs {
    /// Only this VM
    pub id: Option<VmId>,

    /// JSON: an object with each merge domain's counters by its name, or one VM's counters
    #[arg(long)]
    pub json: bool,

    /// Show it again every so many seconds, until Ctrl-C
    #[arg(
        long,
        value_name = "SECONDS",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "1",
        value_parser = parse_seconds
    )]
    pub watch: Option<f64>,
}

fn parse_seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.1..=86400.0).contains(&seconds) => Ok(seconds),
        _ => Err("must be a number from 0.1 to 86400".to_owned()),
    }
}

/// Arguments of `doctor`.
#[derive(Debug, Args)]
#[command(after_help = "\
Looks and changes nothing. Run it as the user that is to run the server.

Exit status:
  0     nothing is in the way
  1, 2  samepage failed; wrong arguments
  3     Samepage can run, but slower, with fewer VMs or less safe than it could
  4     Samepage cannot run

Examples:
  samepage doctor
  samepage doctor --json")]
pub struct DoctorArgs {
    /// One JSON object
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `demo`.
#[derive(Debug, Args)]
#[command(after_help = "\
The demo starts a server of its own, launches the VMs with merging stopped, waits until they have
filled their memory, and then lets the worker merge while every guest verifies what it wrote.
It exits with 0 only if no guest found a wrong byte and at least 95 % of the duplicate pages
that the workload made were given back.

The summary counts a page as duplicate if it could be given back: every copy of a content beyond
its first, and every page of zeros. Memory is the server's PSS, measured.

Examples:
  samepage demo
  samepage demo --vms 16 --mem-mib 128
  samepage demo --json | tail -n 1
  samepage demo --guest linux --vms 2 --kernel vmlinux --initrd initramfs.cpio")]
pub struct DemoArgs {
    /// Number of VMs
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub vms: u16,

    /// Memory of each VM in MiB [default: 64; linux: 128]
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u32).range(16..=65536))]
    pub mem_mib: Option<u32>,

    /// What runs in the VMs
    #[arg(long, value_enum, default_value_t = DemoGuest::Pageload)]
    pub guest: DemoGuest,

    /// Progress on standard error, the summary as one JSON object on standard output
    #[arg(long)]
    pub json: bool,

    /// Kernel for --guest linux [default: the one built by resources/guest-linux/build]
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,

    /// Initial ramdisk for --guest linux [default: the one built by resources/guest-linux/build]
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
}

/// The demo's guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DemoGuest {
    /// The embedded bare-metal guest: starts at once, fills and verifies its memory
    Pageload,
    /// Linux
    Linux,
}

impl DemoGuest {
    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            DemoGuest::Pageload => "pageload",
            DemoGuest::Linux => "linux",
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_shows_an_example() {
        for command in Cli::command().get_subcommands() {
            let help = command.get_after_help().map(ToString::to_string);
            let shows = help.is_some_and(|help| help.contains("Examples:\n  samepage "));
            assert!(shows, "{}", command.get_name());
        }
    }

    #[test]
    fn api_sock_is_taken_before_and_after_the_command() {
        for line in ["samepage --api-sock /a ps", "samepage ps --api-sock /a"] {
            assert_eq!(parse(line).unwrap().api_sock, Some("/a".into()));
        }
    }

    #[test]
    fn watch_takes_an_optional_number_and_leaves_the_id_alone() {
        let watch = |line: &str| match parse(line).unwrap().command {
            Command::Stats(args) => (args.watch, args.id.map(|id| id.to_string())),
            other => panic!("{other:?}"),
        };
        assert_eq!(watch("samepage stats"), (None, None));
        assert_eq!(
            watch("samepage stats --watch a"),
            (Some(1.0), Some("a".into()))
        );
        assert_eq!(watch("samepage stats --watch=0.5"), (Some(0.5), None));
        parse("samepage stats --watch=0").unwrap_err();
    }

    #[test]
    fn bad_ids_are_refused_before_anything_is_sent() {
        for line in [
            "samepage stop a/b",
            "samepage launch ..",
            "samepage serve --domain a:b",
        ] {
            let error = parse(line).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{line}");
        }
    }
}
