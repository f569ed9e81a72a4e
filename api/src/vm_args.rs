//! The arguments of `run` and `launch` that describe a VM, and the config they make.

mod device_args;

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use serde_json::{Map, Value, json};
use vmm::config::{BUILTIN_PAGELOAD, MergeMode, NetworkInterface};
use vmm::{MergeDomain, VmConfig};

pub use device_args::{BalloonArg, DriveArg, NetArg, VsockArg};

/// What a VM consists of: a Firecracker config file, flags, or both (flags win).
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "The VM")]
pub struct VmArgs {
    /// A Firecracker config file; the flags below change or complete it
    #[arg(long, alias = "config-file", value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Kernel image (ELF vmlinux or bzImage), or `builtin:pageload` for the embedded test guest
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,

    /// Initial ramdisk
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,

    /// Kernel command line; a Linux guest gets `console=ttyS0 reboot=k panic=-1` if neither this
    /// nor the config file has one
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub boot_args: Option<String>,

    /// Guest memory in MiB [default: 128]
    #[arg(long, value_name = "MIB")]
    pub mem_mib: Option<u64>,

    /// Number of vCPUs [default: 1]
    #[arg(long, value_name = "N")]
    pub vcpus: Option<u8>,

    /// A disk: a raw image file; may be repeated
    ///
    /// Options follow a colon, with commas between them: `ro` (the guest may not write), `root` and
    /// `noroot` (whether the root file system is on it; without --initrd the first drive has it),
    /// `nolock` (others may have the file open for writing at the same time).
    #[arg(long = "drive", value_name = "PATH[:OPTION,...]")]
    pub drives: Vec<DriveArg>,

    /// A network interface over a tap device of the host; may be repeated
    ///
    /// Options follow a colon, with commas between them: `mac=ADDRESS` (the guest's Ethernet address),
    /// `mtu=BYTES`. The interfaces are eth0, eth1 and so on; limits can be set in the config file.
    #[arg(long = "net", value_name = "TAP[:OPTION,...]")]
    pub nets: Vec<NetArg>,

    /// A source of random bytes for the guest (virtio-rng); a limit for it can be set in the config
    /// file
    #[arg(long)]
    pub entropy: bool,

    /// A balloon that takes so much of the guest's memory; 0 for one that can be changed later
    ///
    /// Options follow a colon, with commas between them: `oom` (the guest takes memory back before it
    /// kills a process for it), `stats=SECONDS` (it tells of its memory so often), `report` and
    /// `noreport` (whether it gives back what it does not use; it does if Samepage merges its memory).
    #[arg(long, value_name = "MIB[:OPTION,...]")]
    pub balloon: Option<BalloonArg>,

    /// Streams between programs of the guest and of the host (virtio-vsock)
    ///
    /// The guest has the address CID, 3 or more. A client on the host connects to the unix socket PATH,
    /// which is made for it, and writes `CONNECT PORT` and a newline; a server on the host listens on
    /// PATH_PORT.
    #[arg(long, value_name = "CID:PATH")]
    pub vsock: Option<VsockArg>,

    /// The merge domain; VMs share memory only with those of the same domain
    #[arg(long, value_name = "NAME")]
    pub merge_domain: Option<MergeDomain>,

    /// Who merges this VM's memory [default: on]
    #[arg(long, value_enum, value_name = "HOW")]
    pub merge: Option<MergeArg>,

    /// The same as --merge off
    #[arg(long, conflicts_with = "merge")]
    pub no_merge: bool,

    /// The lowest is ended first when the merge domain runs out of memory [default: 0]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub oom_priority: Option<i32>,
}

/// `--merge`: who merges.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum MergeArg {
    /// Samepage, with the VMs of its merge domain
    On,
    /// Nobody: the VM keeps its memory to itself
    Off,
    /// Kernel KSM, with all mergeable memory of the host: it gives up the border between merge
    /// domains, and so between tenants. It must be switched on (/sys/kernel/mm/ksm/run)
    Ksm,
}

impl From<MergeArg> for MergeMode {
    fn from(arg: MergeArg) -> MergeMode {
        match arg {
            MergeArg::On => MergeMode::On,
            MergeArg::Off => MergeMode::Off,
            MergeArg::Ksm => MergeMode::Ksm,
        }
    }
}

/// What a Linux guest gets when nobody says anything: a console on the serial port, and a kernel
/// that ends its VM after a reboot or panic instead of hanging. (Firecracker's default has no
/// console at all.)
const LINUX_BOOT_ARGS: &str = "console=ttyS0 reboot=k panic=-1";

/// Why the arguments make no VM.
#[derive(Debug, thiserror::Error)]
pub enum VmArgsError {
    /// Neither a config file nor a kernel.
    #[error("no kernel: give --kernel FILE or --config FILE")]
    NoKernel,
    /// The config file cannot be read.
    #[error("config {}: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The config file's content is wrong.
    #[error("config {}: {message}", path.display())]
    BadConfig {
        /// The file.
        path: PathBuf,
        /// What is wrong and where.
        message: String,
    },
    /// The flags' values are wrong.
    #[error("{0}")]
    BadFlags(String),
}

/// The config that `args` ask for, with all paths made absolute: the server has another working
/// directory.
///
/// # Errors
/// See [`VmArgsError`]. Values are checked by whoever creates the VM.
pub fn to_config(args: &VmArgs) -> Result<VmConfig, VmArgsError> {
    let config = to_config_of_any(args)?;
    if config.boot_source.is_absent() {
        return Err(VmArgsError::NoKernel);
    }
    Ok(config)
}

/// The same of a VM that may get its kernel later.
///
/// # Errors
/// As [`to_config`].
pub fn to_config_of_any(args: &VmArgs) -> Result<VmConfig, VmArgsError> {
    let mut config = match &args.config {
        Some(path) => read(path)?,
        None => Map::new(),
    };
    apply(args, &mut config)?;
    let config = serde_json::from_value(Value::Object(config));
    let mut config: VmConfig = config.map_err(|error| wrong(args, &error))?;
    let boot = &mut config.boot_source;
    if !boot.is_absent() && boot.kernel_image_path != Path::new(BUILTIN_PAGELOAD) {
        if boot.boot_args.is_none() {
            boot.boot_args = Some(LINUX_BOOT_ARGS.to_owned());
        }
        make_absolute(&mut boot.kernel_image_path)?;
    }
    if let Some(initrd) = &mut boot.initrd_path {
        make_absolute(initrd)?;
    }
    for drive in &mut config.drives {
        make_absolute(&mut drive.path_on_host)?;
    }
    if let Some(vsock) = &mut config.vsock {
        make_absolute(&mut vsock.uds_path)?;
    }
    Ok(config)
}

fn wrong(args: &VmArgs, error: &serde_json::Error) -> VmArgsError {
    match &args.config {
        Some(path) => VmArgsError::BadConfig {
            path: path.clone(),
            message: error.to_string(),
        },
        None => VmArgsError::BadFlags(error.to_string()),
    }
}

fn read(path: &Path) -> Result<Map<String, Value>, VmArgsError> {
    let text = std::fs::read(path).map_err(|source| VmArgsError::Unreadable {
        path: path.to_owned(),
        source,
    })?;
    serde_json::from_slice(&text).map_err(|error| VmArgsError::BadConfig {
        path: path.to_owned(),
        message: error.to_string(),
    })
}

/// Lays the flags over the config file's values.
fn apply(args: &VmArgs, config: &mut Map<String, Value>) -> Result<(), VmArgsError> {
    let mut set = |section: &str, field: &str, value: Option<Value>| {
        if let Some(value) = value {
            let section = config.entry(section).or_insert_with(|| json!({}));
            // A section of another kind is left for the typed reading to complain about.
            if let Value::Object(section) = section {
                section.insert(field.to_owned(), value);
            }
        }
    };
    let kernel = args.kernel.as_ref().map(|path| json!(path));
    let initrd = args.initrd.as_ref().map(|path| json!(path));
    set("boot-source", "kernel_image_path", kernel);
    set("boot-source", "initrd_path", initrd);
    set(
        "boot-source",
        "boot_args",
        args.boot_args.as_ref().map(|text| json!(text)),
    );
    set(
        "machine-config",
        "mem_size_mib",
        args.mem_mib.map(|mib| json!(mib)),
    );
    set(
        "machine-config",
        "vcpu_count",
        args.vcpus.map(|count| json!(count)),
    );
    set(
        "samepage",
        "merge_domain",
        args.merge_domain.as_ref().map(|name| json!(name)),
    );
    let merge = args.no_merge.then_some(MergeArg::Off).or(args.merge);
    let merge = merge.map(|arg| json!(MergeMode::from(arg)));
    set("samepage", "merge", merge);
    set(
        "samepage",
        "oom_priority",
        args.oom_priority.map(|priority| json!(priority)),
    );
    if let Some(Value::Object(machine)) = config.get_mut("machine-config") {
        // A file of Firecracker's has both or neither; a flag may bring only one.
        machine.entry("vcpu_count").or_insert_with(|| json!(1));
        machine.entry("mem_size_mib").or_insert_with(|| json!(128));
    }
    add_drives(args, config);
    add_networks(args, config);
    if args.entropy && config.get("entropy").is_none_or(Value::is_null) {
        config.insert("entropy".to_owned(), json!({}));
    }
    if let Some(BalloonArg(balloon)) = args.balloon {
        config.insert("balloon".to_owned(), json!(balloon));
    }
    if let Some(VsockArg(vsock)) = &args.vsock {
        config.insert("vsock".to_owned(), json!(vsock));
    }
    Ok(())
}

fn add_drives(args: &VmArgs, config: &mut Map<String, Value>) {
    if args.drives.is_empty() {
        return;
    }
    let has_initrd = config
        .get("boot-source")
        .and_then(|boot| boot.get("initrd_path"))
        .is_some_and(|path| !path.is_null());
    let has_root = args.drives.iter().any(|d| d.is_root_device == Some(true));
    let drives = config.entry("drives").or_insert_with(|| json!([]));
    if let Value::Array(drives) = drives {
        for drive in &args.drives {
            let number = drives.len();
            // The first drive is the root where nothing else can be, unless another says that it is.
            let by_default = number == 0 && !has_initrd && !has_root;
            let mut entry = json!({
                "drive_id": format!("drive{number}"),
                "path_on_host": drive.path,
                "is_root_device": drive.is_root_device.unwrap_or(by_default),
                "is_read_only": drive.is_read_only,
            });
            if drive.is_unlocked {
                entry["samepage"] = json!({ "lock": false });
            }
            drives.push(entry);
        }
    }
}

fn add_networks(args: &VmArgs, config: &mut Map<String, Value>) {
    if args.nets.is_empty() {
        return;
    }
    let networks = config
        .entry("network-interfaces")
        .or_insert_with(|| json!([]));
    if let Value::Array(networks) = networks {
        for net in &args.nets {
            // The file may have taken a name out of its order.
            let is_free =
                |id: &String| !networks.iter().any(|known| known["iface_id"] == json!(id));
            let mut names = (networks.len()..).map(|number| format!("eth{number}"));
            let iface_id = names.find(is_free).unwrap_or_default();
            let mut interface = NetworkInterface::new(iface_id, &net.host_dev_name);
            interface.guest_mac = net.guest_mac;
            interface.mtu = net.mtu;
            networks.push(json!(interface));
        }
    }
}

fn make_absolute(path: &mut PathBuf) -> Result<(), VmArgsError> {
    // An empty path is left for the monitor to name with its field.
    if !path.as_os_str().is_empty() {
        *path = std::path::absolute(&path)
            .map_err(|error| VmArgsError::BadFlags(format!("{}: {error}", path.display())))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use vmm::config::BalloonConfig;

    use super::*;

    fn kernel(path: &str) -> VmArgs {
        VmArgs {
            kernel: Some(path.into()),
            ..VmArgs::default()
        }
    }

    fn config_file(text: &str) -> (tempfile::NamedTempFile, VmArgs) {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        let args = VmArgs {
            config: Some(file.path().to_owned()),
            ..VmArgs::default()
        };
        (file, args)
    }

    #[test]
    fn flags_alone_make_a_vm() {
        let args = VmArgs {
            mem_mib: Some(64),
            merge_domain: Some("ci".parse().unwrap()),
            drives: vec!["a.img".parse().unwrap(), "/b.img:ro".parse().unwrap()],
            ..kernel("vmlinux")
        };
        let config = to_config(&args).unwrap();
        assert!(config.boot_source.kernel_image_path.is_absolute());
        assert_eq!(
            config.boot_source.boot_args.as_deref(),
            Some(LINUX_BOOT_ARGS)
        );
        assert_eq!(config.machine_config.mem_size_mib, 64);
        assert_eq!(config.machine_config.vcpu_count, 1);
        assert_eq!(config.samepage.merge_domain.unwrap().to_string(), "ci");
        assert_eq!(config.samepage.merge, MergeMode::On);
        let roots: Vec<_> = config
            .drives
            .iter()
            .map(|d| (d.is_root_device, d.is_read_only))
            .collect();
        assert_eq!(roots, [(true, false), (false, true)]);
    }

    #[test]
    fn drives_may_be_read_only() {
        let drive: DriveArg = "/a:b.img:ro".parse().unwrap();
        assert_eq!(drive.path, PathBuf::from("/a:b.img"));
        assert!(drive.is_read_only);
        assert!(!"/a.img".parse::<DriveArg>().unwrap().is_read_only);
        ":ro".parse::<DriveArg>().unwrap_err();
        let drive: DriveArg = "a.img:noroot,ro,nolock".parse().unwrap();
        let expected = DriveArg {
            path: "a.img".into(),
            is_read_only: true,
            is_root_device: Some(false),
            is_unlocked: true,
        };
        assert_eq!(drive, expected);
        let plain: DriveArg = "a:rot".parse().unwrap();
        assert_eq!(plain.path, PathBuf::from("a:rot"));
        "a.img:root,noroot".parse::<DriveArg>().unwrap_err();
    }

    #[test]
    fn a_drive_may_say_that_it_has_the_root_or_has_not() {
        let roots = |drives: &[&str]| -> Vec<bool> {
            let args = VmArgs {
                drives: drives.iter().map(|drive| drive.parse().unwrap()).collect(),
                ..kernel("vmlinux")
            };
            let drives = to_config(&args).unwrap().drives;
            drives.iter().map(|drive| drive.is_root_device).collect()
        };
        assert_eq!(roots(&["a", "b"]), [true, false]);
        assert_eq!(roots(&["a", "b:root"]), [false, true]);
        assert_eq!(roots(&["a:noroot", "b"]), [false, false]);
    }

    #[test]
    fn network_interfaces_are_named_by_their_number() {
        let args = VmArgs {
            nets: vec![
                "tap0".parse().unwrap(),
                "tap1:mtu=1400,mac=06:00:ac:10:00:02".parse().unwrap(),
            ],
            ..kernel("k")
        };
        let networks = to_config(&args).unwrap().network_interfaces;
        assert_eq!(networks[0], NetworkInterface::new("eth0", "tap0"));
        let mut second = NetworkInterface::new("eth1", "tap1");
        second.mtu = Some(1400);
        second.guest_mac = "06:00:ac:10:00:02".parse().ok();
        assert_eq!(networks[1], second);
        for (text, named) in [
            ("tap0:mtu=many", "mtu \"many\""),
            ("tap0:mac=6", "\"6\""),
            ("tap0:fast", "\"fast\""),
        ] {
            let error = text.parse::<NetArg>().unwrap_err();
            assert!(error.contains(named), "{error}");
        }
    }

    #[test]
    fn an_interface_gets_no_name_that_the_file_has_given() {
        let (_file, mut args) = config_file(
            r#"{"boot-source": {"kernel_image_path": "/k"},
                "network-interfaces": [{"iface_id": "eth1", "host_dev_name": "tap9"}]}"#,
        );
        args.nets = vec!["tap0".parse().unwrap(), "tap1".parse().unwrap()];
        let networks = to_config(&args).unwrap().network_interfaces;
        let ids: Vec<&str> = networks.iter().map(|net| net.iface_id.as_str()).collect();
        assert_eq!(ids, ["eth1", "eth2", "eth3"]);
    }

    #[test]
    fn a_source_of_random_bytes_is_asked_for_by_a_flag_and_limited_by_the_file() {
        let args = VmArgs {
            entropy: true,
            ..kernel("k")
        };
        let entropy = |args: &VmArgs| to_config(args).unwrap().entropy;
        assert_eq!(entropy(&kernel("k")), None);
        assert!(entropy(&args).unwrap().rate_limiter.is_none());
        let (_file, mut args) = config_file(
            r#"{"boot-source": {"kernel_image_path": "/k"},
                "entropy": {"rate_limiter": {"ops": {"size": 1, "refill_time": 1}}}}"#,
        );
        args.entropy = true;
        assert!(entropy(&args).unwrap().rate_limiter.is_some());
    }

    #[test]
    fn a_balloon_is_asked_for_by_a_flag_which_wins_over_the_file() {
        let (_file, mut args) = config_file(
            r#"{"boot-source": {"kernel_image_path": "/k"},
                "balloon": {"amount_mib": 1, "deflate_on_oom": true}}"#,
        );
        args.balloon = Some("0:noreport".parse().unwrap());
        let expected = BalloonConfig {
            free_page_reporting: Some(false),
            ..BalloonConfig::default()
        };
        assert_eq!(to_config(&args).unwrap().balloon, Some(expected));
        let full: BalloonArg = "64:oom,stats=5,report".parse().unwrap();
        let expected = BalloonConfig {
            amount_mib: 64,
            deflate_on_oom: true,
            stats_polling_interval_s: 5,
            free_page_hinting: false,
            free_page_reporting: Some(true),
        };
        assert_eq!(full, BalloonArg(expected));
        for (text, named) in [
            ("much", "\"much\""),
            ("1:stats=often", "\"often\""),
            ("1:fast", "\"fast\""),
            ("1:report,noreport", "exclude"),
        ] {
            let error = text.parse::<BalloonArg>().unwrap_err();
            assert!(error.contains(named), "{error}");
        }
    }

    #[test]
    fn a_vsock_device_is_asked_for_by_a_flag_which_wins_over_the_file() {
        let (_file, mut args) = config_file(
            r#"{"boot-source": {"kernel_image_path": "/k"},
                "vsock": {"guest_cid": 9, "uds_path": "/of/the/file"}}"#,
        );
        args.vsock = Some("3:sock:et".parse().unwrap());
        let vsock = to_config(&args).unwrap().vsock.unwrap();
        assert_eq!(vsock.guest_cid, 3);
        assert_eq!(vsock.uds_path, std::path::absolute("sock:et").unwrap());
        for (text, named) in [
            ("3", "CID:PATH"),
            ("three:p", "\"three\""),
            ("-1:p", "\"-1\""),
        ] {
            let error = text.parse::<VsockArg>().unwrap_err();
            assert!(error.contains(named), "{error}");
        }
    }

    #[test]
    fn builtin_guest_is_no_path_and_gets_no_boot_args() {
        let config = to_config(&kernel(BUILTIN_PAGELOAD)).unwrap();
        assert_eq!(
            config.boot_source.kernel_image_path,
            Path::new(BUILTIN_PAGELOAD)
        );
        assert_eq!(config.boot_source.boot_args, None);
    }

    #[test]
    fn flags_win_over_the_config_file() {
        let (_file, mut args) = config_file(
            r#"{"boot-source": {"kernel_image_path": "/k", "boot_args": "quiet"},
                "machine-config": {"vcpu_count": 2, "mem_size_mib": 256}}"#,
        );
        args.mem_mib = Some(512);
        args.no_merge = true;
        let config = to_config(&args).unwrap();
        assert_eq!(config.boot_source.boot_args.as_deref(), Some("quiet"));
        assert_eq!(config.machine_config.mem_size_mib, 512);
        assert_eq!(config.machine_config.vcpu_count, 2);
        assert_eq!(config.samepage.merge, MergeMode::Off);
    }

    #[test]
    fn merge_says_who_merges_and_no_merge_is_its_old_name_for_off() {
        let (_file, mut args) = config_file(
            r#"{"boot-source": {"kernel_image_path": "/k"}, "samepage": {"merge": "ksm"}}"#,
        );
        let merge = |args: &VmArgs| to_config(args).unwrap().samepage.merge;
        assert_eq!(merge(&args), MergeMode::Ksm);
        for (arg, mode) in [
            (MergeArg::On, MergeMode::On),
            (MergeArg::Off, MergeMode::Off),
            (MergeArg::Ksm, MergeMode::Ksm),
        ] {
            args.merge = Some(arg);
            assert_eq!(merge(&args), mode);
        }
    }

    #[test]
    fn errors_name_the_file_and_the_field() {
        let error = to_config(&VmArgs::default()).unwrap_err().to_string();
        assert!(error.contains("--kernel"), "{error}");
        for (text, named) in [
            ("{", "EOF"),
            ("[]", "sequence"),
            (
                r#"{"boot-source": {"kernel_image_path": "/k"}, "colour": 1}"#,
                "colour",
            ),
            (r#"{"boot-source": 7}"#, "BootSource"),
            (
                r#"{"boot-source": {"kernel_image_path": "/k"}, "samepage": {"merge": "fast"}}"#,
                r#""fast", expected merge to be true, false or "ksm""#,
            ),
        ] {
            let (file, args) = config_file(text);
            let error = to_config(&args).unwrap_err().to_string();
            let path = file.path().display().to_string();
            assert!(error.contains(&path) && error.contains(named), "{error}");
        }
        let mut args = kernel("k");
        args.config = Some("/nowhere/vm.json".into());
        let error = to_config(&args).unwrap_err().to_string();
        assert!(error.contains("/nowhere/vm.json"), "{error}");
    }
}
