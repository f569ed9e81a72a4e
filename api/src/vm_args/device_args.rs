//! Values of the flags that give a VM a device: a name, a colon, options with commas between them.

use std::path::PathBuf;
use std::str::FromStr;

use vmm::config::{BalloonConfig, MacAddress, VsockConfig};

/// `--drive`: a path, and after a last colon what is to be otherwise than by default.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DriveArg {
    /// The image file.
    pub path: PathBuf,
    /// `ro` was given.
    pub is_read_only: bool,
    /// Whether `root` or `noroot` was given.
    pub is_root_device: Option<bool>,
    /// `nolock` was given.
    pub is_unlocked: bool,
}

impl FromStr for DriveArg {
    type Err = String;

    fn from_str(text: &str) -> Result<DriveArg, String> {
        let is_option = |word| matches!(word, "ro" | "root" | "noroot" | "nolock");
        // A path may have colons too: only what has nothing but options behind its last one ends there.
        let (path, options) = match text.rsplit_once(':') {
            Some((path, options)) if options.split(',').all(is_option) => (path, options),
            _ => (text, ""),
        };
        if path.is_empty() {
            return Err("the path is empty".to_owned());
        }
        let mut drive = DriveArg {
            path: path.into(),
            ..DriveArg::default()
        };
        for option in options.split(',') {
            match option {
                "ro" => drive.is_read_only = true,
                "nolock" => drive.is_unlocked = true,
                "root" | "noroot" => {
                    let is_root = option == "root";
                    if drive.is_root_device.replace(is_root) == Some(!is_root) {
                        return Err("root and noroot exclude each other".to_owned());
                    }
                }
                _ => {}
            }
        }
        Ok(drive)
    }
}

/// `--net`: a tap device, and after its first colon what is to be otherwise than by default.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetArg {
    /// The tap device.
    pub host_dev_name: String,
    /// `mac=`.
    pub guest_mac: Option<MacAddress>,
    /// `mtu=`.
    pub mtu: Option<u32>,
}

impl FromStr for NetArg {
    type Err = String;

    fn from_str(text: &str) -> Result<NetArg, String> {
        // No network device has a colon in its name.
        let (name, options) = text.split_once(':').unwrap_or((text, ""));
        let mut net = NetArg {
            host_dev_name: name.to_owned(),
            guest_mac: None,
            mtu: None,
        };
        for option in options.split(',').filter(|option| !option.is_empty()) {
            match option.split_once('=') {
                Some(("mac", address)) => {
                    net.guest_mac = Some(address.parse::<MacAddress>().map_err(|e| e.to_string())?);
                }
                Some(("mtu", bytes)) => {
                    let mtu = bytes.parse::<u32>();
                    net.mtu = Some(mtu.map_err(|error| format!("mtu {bytes:?}: {error}"))?);
                }
                _ => return Err(format!("option {option:?}: not mac= or mtu=")),
            }
        }
        Ok(net)
    }
}

/// `--balloon`: MiB, and after a colon what is to be otherwise than by default.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BalloonArg(pub BalloonConfig);

impl FromStr for BalloonArg {
    type Err = String;

    fn from_str(text: &str) -> Result<BalloonArg, String> {
        let (mib, options) = text.split_once(':').unwrap_or((text, ""));
        let amount_mib = mib.parse().map_err(|error| format!("{mib:?}: {error}"))?;
        let mut balloon = BalloonConfig {
            amount_mib,
            ..BalloonConfig::default()
        };
        for option in options.split(',').filter(|option| !option.is_empty()) {
            match option.split_once('=') {
                None if option == "oom" => balloon.deflate_on_oom = true,
                None if matches!(option, "report" | "noreport") => {
                    let reports = option == "report";
                    if balloon.free_page_reporting.replace(reports) == Some(!reports) {
                        return Err("report and noreport exclude each other".to_owned());
                    }
                }
                Some(("stats", seconds)) => {
                    let interval = seconds.parse();
                    balloon.stats_polling_interval_s =
                        interval.map_err(|error| format!("stats {seconds:?}: {error}"))?;
                }
                _ => {
                    return Err(format!(
                        "option {option:?}: not oom, stats=, report or noreport"
                    ));
                }
            }
        }
        Ok(BalloonArg(balloon))
    }
}

/// `--vsock`: the guest's address, and the socket's path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VsockArg(pub VsockConfig);

impl FromStr for VsockArg {
    type Err = String;

    fn from_str(text: &str) -> Result<VsockArg, String> {
        let (cid, path) = text.split_once(':').ok_or("is not CID:PATH")?;
        let guest_cid = cid
            .parse()
            .map_err(|error| format!("cid {cid:?}: {error}"))?;
        Ok(VsockArg(VsockConfig {
            guest_cid,
            uds_path: path.into(),
            vsock_id: None,
        }))
    }
}
