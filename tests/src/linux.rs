//! The Linux guest of `resources/guest-linux`, and what it says on its console.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use vmm::{EndReason, Monitor, VmConfig, VmId, VmState};

/// How long a test waits for anything of a Linux guest. A host that emulates the guest's kernel mode
/// computes five seconds for a boot, which took three minutes at load 20; only a hang is longer.
pub const PATIENCE: Duration = Duration::from_secs(600);

/// The first line that the guest's init prints, and how its last one begins.
const READY: &str = "samepage-init: ready";
const EXIT: &str = "samepage-init: exit ";

/// The files of the guest.
#[derive(Debug)]
pub struct LinuxGuest {
    /// The kernel, an ELF file.
    pub vmlinux: PathBuf,
    /// Busybox and the init that runs commands.
    pub initramfs: PathBuf,
}

/// The guest, built now if it is not in the cache.
///
/// # Panics
/// If it cannot be built.
pub fn guest() -> &'static LinuxGuest {
    static GUEST: OnceLock<LinuxGuest> = OnceLock::new();
    GUEST.get_or_init(|| {
        let parts = build("guest-linux");
        LinuxGuest {
            vmlinux: parts.path("vmlinux"),
            initramfs: parts.path("initramfs"),
        }
    })
}

/// A Python with the clients of `resources/clients`, made now if it is not in the cache.
///
/// # Panics
/// If it cannot be made.
pub fn python_with_clients() -> PathBuf {
    build("clients").path("python")
}

/// The path of a file of `resources`.
pub fn resource(path: &str) -> PathBuf {
    resources().join(path)
}

/// The directory `resources`.
pub(crate) fn resources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources")
}

/// What a guest's build script printed: a line `name=path` for each file.
pub(crate) struct BuiltParts {
    printed: String,
}

impl BuiltParts {
    /// The path of a file.
    ///
    /// # Panics
    /// If the script did not print it.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        let mut parts = self.printed.lines().filter_map(|line| line.split_once('='));
        let found = parts.find(|(key, _)| *key == name);
        let (_, path) = found.unwrap_or_else(|| panic!("no {name}= in: {}", self.printed));
        PathBuf::from(path)
    }
}

/// Builds the guest in a directory of `resources`, or finds it in the cache.
///
/// # Panics
/// If it cannot be built.
pub(crate) fn build(directory: &str) -> BuiltParts {
    let output = Command::new(resources().join(directory).join("build"))
        .stderr(Stdio::inherit())
        .output()
        .unwrap_or_else(|error| panic!("run resources/{directory}/build: {error}"));
    assert!(
        output.status.success(),
        "resources/{directory}/build: {}; `make guest` installs what it needs",
        output.status
    );
    let printed = String::from_utf8(output.stdout).expect("text");
    BuiltParts { printed }
}

/// A guest that runs `command` with `sh -c` and then powers off.
///
/// # Panics
/// If the guest cannot be built, or the command cannot be on a kernel command line.
pub fn running(command: &str) -> VmConfig {
    assert!(!command.contains(['"', '\n']), "{command}");
    let guest = guest();
    let mut config = VmConfig::new(&guest.vmlinux);
    config.boot_source.initrd_path = Some(guest.initramfs.clone());
    config.boot_source.boot_args = Some(format!("console=ttyS0 quiet samepage.run=\"{command}\""));
    config.machine_config.mem_size_mib = 64;
    config
}

/// All that the guest has printed, with plain line ends.
///
/// # Panics
/// If there is no such VM.
pub fn console(monitor: &Monitor, id: &VmId) -> String {
    let console = monitor.console(id).expect("the VM is there");
    String::from_utf8_lossy(&console.history()).replace('\r', "")
}

/// What the command has printed, in whole lines, and how it ended (see [`exit_line`]) if it has. What
/// the kernel says before and after that is left out.
///
/// # Panics
/// If there is no such VM.
pub fn printed(monitor: &Monitor, id: &VmId) -> Vec<String> {
    let text = console(monitor, id);
    // What comes after the last line end is a line that is still being printed.
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let mut printed = Vec::new();
    for line in whole.lines().skip_while(|line| *line != READY).skip(1) {
        printed.push(line.to_owned());
        if line.starts_with(EXIT) {
            break;
        }
    }
    printed
}

/// What the guest's init prints when the command has ended with `status`.
pub fn exit_line(status: u8) -> String {
    format!("{EXIT}{status}")
}

/// Waits for the guest's end.
///
/// # Panics
/// If it takes too long.
pub fn end(monitor: &Monitor, id: &VmId) -> EndReason {
    let ended = monitor.wait_ended(id, Instant::now() + PATIENCE);
    ended.unwrap_or_else(|| panic!("{id} did not end: {}", console(monitor, id)))
}

/// Fails the test if the guest is not running any more.
///
/// # Panics
/// In that case.
pub fn assert_running(monitor: &Monitor, id: &VmId) {
    let state = monitor.info(id).expect("the VM is there").state;
    let console = console(monitor, id);
    assert_eq!(state, VmState::Running, "{id}: {console}");
}
