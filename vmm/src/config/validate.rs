//! Which configurations make sense. Checked once here, trusted everywhere else.

use std::collections::BTreeSet;
use std::os::unix::ffi::OsStrExt;

use super::devices::VIRTIO_DEVICES_MAX;
use super::{
    BalloonConfig, BootSource, ConfigPart, Drive, EntropyConfig, GUEST_CID_MIN,
    HOST_DEV_NAME_LEN_MAX, HugePages, IoEngine, MEM_SIZE_MIB_MAX, MTU_MAX, MTU_MIN, MachineConfig,
    NetworkInterface, NetworkPatch, RateLimiterConfig, TokenBucketConfig, UDS_PATH_LEN_MAX,
    Unsupported, VCPU_COUNT_MAX, VmConfig, VsockConfig,
};
use crate::boot::cmdline::CMDLINE_LEN_MAX;

/// A value that makes no sense. Names the field and the value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A key or value that Firecracker has and Samepage does not support yet.
    #[error("{field}: not supported yet")]
    Unsupported {
        /// The key, with the value where only some values are refused.
        field: String,
    },
    /// The VM is to start, and no kernel was named.
    #[error("boot-source: there is none, a vm cannot start without a kernel")]
    NoBootSource,
    /// A value outside its range or alphabet.
    #[error("{field}: {value} {problem}")]
    BadValue {
        /// The key, with its place where there may be several.
        field: String,
        /// The value.
        value: String,
        /// What is wrong with it.
        problem: String,
    },
}

fn bad(
    field: impl Into<String>,
    value: impl std::fmt::Display,
    problem: impl Into<String>,
) -> ConfigError {
    ConfigError::BadValue {
        field: field.into(),
        value: value.to_string(),
        problem: problem.into(),
    }
}

fn supported(field: impl Into<String>, is_supported: bool) -> Result<(), ConfigError> {
    if is_supported {
        Ok(())
    } else {
        Err(ConfigError::Unsupported {
            field: field.into(),
        })
    }
}

fn check_id(field: &str, id: &str) -> Result<(), ConfigError> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    if !(1..=64).contains(&id.len()) || !id.bytes().all(allowed) {
        let problem = "must be 1 to 64 characters of A-Z a-z 0-9 _";
        return Err(bad(field, format!("{id:?}"), problem));
    }
    Ok(())
}

/// `place` is the key of the limiter, as in `entropy.rate_limiter`.
fn check_rate_limiter(place: &str, limiter: Option<&RateLimiterConfig>) -> Result<(), ConfigError> {
    let Some(RateLimiterConfig { bandwidth, ops }) = limiter else {
        return Ok(());
    };
    for (name, bucket) in [("bandwidth", bandwidth), ("ops", ops)] {
        let Some(bucket) = bucket else { continue };
        for (field, value, most) in [
            ("size", bucket.size, TokenBucketConfig::SIZE_MAX),
            (
                "refill_time",
                bucket.refill_time,
                TokenBucketConfig::REFILL_TIME_MAX_MS,
            ),
        ] {
            if value > most {
                let field = format!("{place}.{name}.{field}");
                return Err(bad(field, value, format!("is more than {most}")));
            }
        }
    }
    Ok(())
}

/// Checks both limiters of the network interface `iface_id`.
fn check_network_limiters(
    iface_id: &str,
    rx: Option<&RateLimiterConfig>,
    tx: Option<&RateLimiterConfig>,
) -> Result<(), ConfigError> {
    for (field, limiter) in [("rx_rate_limiter", rx), ("tx_rate_limiter", tx)] {
        check_rate_limiter(&format!("network-interfaces[{iface_id}].{field}"), limiter)?;
    }
    Ok(())
}

impl NetworkPatch {
    /// Checks every value.
    ///
    /// # Errors
    /// The first [`ConfigError`] found.
    pub fn validate(&self) -> Result<(), ConfigError> {
        check_network_limiters(
            &self.iface_id,
            self.rx_rate_limiter.as_ref(),
            self.tx_rate_limiter.as_ref(),
        )
    }
}

impl ConfigPart {
    /// Checks every value of it, without the rest of the configuration.
    pub(crate) fn validate(&self) -> Result<(), ConfigError> {
        match self {
            ConfigPart::Balloon(balloon) => balloon.check(),
            ConfigPart::BootSource(boot_source) => boot_source.check(),
            ConfigPart::Drive(drive) => drive.check(),
            ConfigPart::Entropy(entropy) => entropy.check(),
            ConfigPart::Machine(machine) => machine.check(),
            // What comes of it is checked with the rest.
            ConfigPart::MachinePatch(_) => Ok(()),
            ConfigPart::NetworkInterface(interface) => interface.check(),
            ConfigPart::Vsock(vsock) => vsock.check(),
        }
    }
}

impl BalloonConfig {
    fn check(&self) -> Result<(), ConfigError> {
        supported("balloon.free_page_hinting: true", !self.free_page_hinting)
    }
}

impl EntropyConfig {
    fn check(&self) -> Result<(), ConfigError> {
        check_rate_limiter("entropy.rate_limiter", self.rate_limiter.as_ref())
    }
}

impl VsockConfig {
    fn check(&self) -> Result<(), ConfigError> {
        let cid = self.guest_cid;
        if !(GUEST_CID_MIN..u32::MAX).contains(&cid) {
            let problem = format!("is not {GUEST_CID_MIN} to {}", u32::MAX - 1);
            return Err(bad("vsock.guest_cid", cid, problem));
        }
        let path = self.uds_path.as_os_str().as_bytes();
        if !(1..=UDS_PATH_LEN_MAX).contains(&path.len()) || path.contains(&0) {
            let problem = format!("is not a path of 1 to {UDS_PATH_LEN_MAX} bytes");
            let value = format!("{:?}", self.uds_path);
            return Err(bad("vsock.uds_path", value, problem));
        }
        Ok(())
    }
}

impl NetworkInterface {
    /// Checks what does not depend on the other interfaces.
    fn check(&self) -> Result<(), ConfigError> {
        check_id("iface_id", &self.iface_id)?;
        let place = |field: &str| format!("network-interfaces[{}].{field}", self.iface_id);
        let tap = self.host_dev_name.as_str();
        // What a name of Linux may not have (`dev_valid_name`); a % would be for any number.
        let allowed = |byte: u8| byte.is_ascii_graphic() && !b"/:%".contains(&byte);
        let fits = (1..=HOST_DEV_NAME_LEN_MAX).contains(&tap.len());
        if !fits || !tap.bytes().all(allowed) || tap == "." || tap == ".." {
            let problem = format!(
                "is not the name of a network device, 1 to {HOST_DEV_NAME_LEN_MAX} characters \
                 without / : %"
            );
            return Err(bad(place("host_dev_name"), format!("{tap:?}"), problem));
        }
        if let Some(mtu) = self.mtu
            && !(MTU_MIN..=MTU_MAX).contains(&mtu)
        {
            let problem = format!("is not {MTU_MIN} to {MTU_MAX}");
            return Err(bad(place("mtu"), mtu, problem));
        }
        check_network_limiters(
            &self.iface_id,
            self.rx_rate_limiter.as_ref(),
            self.tx_rate_limiter.as_ref(),
        )
    }
}

impl Drive {
    /// Checks what does not depend on the other drives.
    fn check(&self) -> Result<(), ConfigError> {
        check_id("drive_id", &self.drive_id)?;
        if let Some(uuid) = &self.partuuid
            && !uuid.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-')
        {
            return Err(bad(
                "partuuid",
                format!("{uuid:?}"),
                "is not hexadecimal and dashes",
            ));
        }
        supported("rate_limiter", self.rate_limiter.is_absent())?;
        supported("socket", self.socket.is_absent())?;
        supported("io_engine \"Async\"", self.io_engine == IoEngine::Sync)
    }
}

impl MachineConfig {
    fn check(&self) -> Result<(), ConfigError> {
        let vcpus = self.vcpu_count;
        if !(1..=VCPU_COUNT_MAX).contains(&vcpus) {
            return Err(bad(
                "vcpu_count",
                vcpus,
                format!("is not 1 to {VCPU_COUNT_MAX}"),
            ));
        }
        if self.smt && vcpus != 1 && vcpus % 2 == 1 {
            return Err(bad("vcpu_count", vcpus, "is odd, with smt it is 1 or even"));
        }
        if !(1..=MEM_SIZE_MIB_MAX).contains(&self.mem_size_mib) {
            let problem = format!("is not 1 to {MEM_SIZE_MIB_MAX}");
            return Err(bad("mem_size_mib", self.mem_size_mib, problem));
        }
        supported("track_dirty_pages: true", !self.track_dirty_pages)?;
        supported(
            "huge_pages: \"2M\"",
            self.huge_pages != HugePages::Hugetlbfs2M,
        )?;
        match self.cpu_template.as_deref() {
            None | Some("None") => Ok(()),
            Some(name) => supported(format!("cpu_template {name:?}"), false),
        }
    }
}

impl BootSource {
    fn check(&self) -> Result<(), ConfigError> {
        if self.kernel_image_path.as_os_str().is_empty() {
            return Err(bad("kernel_image_path", "\"\"", "is empty"));
        }
        let args = self.boot_args();
        if let Some(c) = args.chars().find(|c| !(' '..='~').contains(c)) {
            let problem = "is not allowed, only printable ASCII is";
            return Err(bad("boot_args", format!("character {c:?}"), problem));
        }
        if args.len() > CMDLINE_LEN_MAX {
            let problem = format!("characters are more than {CMDLINE_LEN_MAX}");
            return Err(bad("boot_args", args.len(), problem));
        }
        Ok(())
    }
}

impl VmConfig {
    /// Checks every value. Looks at no file: that is done when the VM is created.
    ///
    /// # Errors
    /// The first [`ConfigError`] found.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.check_unsupported()?;
        self.machine_config.check()?;
        if !self.boot_source.is_absent() {
            self.boot_source.check()?;
        }
        self.check_drives()?;
        self.check_networks()?;
        self.check_device_count()?;
        self.check_balloon()?;
        if let Some(vsock) = &self.vsock {
            vsock.check()?;
        }
        match &self.entropy {
            None => Ok(()),
            Some(entropy) => entropy.check(),
        }
    }

    fn check_unsupported(&self) -> Result<(), ConfigError> {
        let keys: [(&str, &Unsupported); 7] = [
            ("cpu-config", &self.cpu_config),
            ("mmds-config", &self.mmds_config),
            ("logger", &self.logger),
            ("metrics", &self.metrics),
            ("pmem", &self.pmem),
            ("memory-hotplug", &self.memory_hotplug),
            ("serial", &self.serial),
        ];
        keys.into_iter()
            .try_for_each(|(key, asked)| supported(key, asked.is_absent()))
    }

    fn check_balloon(&self) -> Result<(), ConfigError> {
        let Some(balloon) = &self.balloon else {
            return Ok(());
        };
        let mem_size_mib = self.machine_config.mem_size_mib;
        if u64::from(balloon.amount_mib) > mem_size_mib {
            let problem = format!("is more than the {mem_size_mib} of mem_size_mib");
            return Err(bad("balloon.amount_mib", balloon.amount_mib, problem));
        }
        balloon.check()
    }

    /// Drives by themselves are counted with the drives.
    fn check_device_count(&self) -> Result<(), ConfigError> {
        let count = self.virtio_devices().len();
        if count > VIRTIO_DEVICES_MAX {
            let problem = format!("devices are more than {VIRTIO_DEVICES_MAX}");
            return Err(bad(
                "drives, network-interfaces, entropy, vsock and balloon",
                count,
                problem,
            ));
        }
        Ok(())
    }

    fn check_networks(&self) -> Result<(), ConfigError> {
        let (mut ids, mut taps, mut macs) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        let twice = "is used twice";
        for interface in &self.network_interfaces {
            let id = &interface.iface_id;
            interface.check()?;
            if !ids.insert(id) {
                return Err(bad("iface_id", format!("{id:?}"), twice));
            }
            let place = |field: &str| format!("network-interfaces[{id}].{field}");
            let tap = &interface.host_dev_name;
            if !taps.insert(tap) {
                return Err(bad(place("host_dev_name"), format!("{tap:?}"), twice));
            }
            if let Some(mac) = interface.guest_mac
                && !macs.insert(mac)
            {
                return Err(bad(place("guest_mac"), mac, twice));
            }
        }
        Ok(())
    }

    fn check_drives(&self) -> Result<(), ConfigError> {
        let count = self.drives.len();
        if count > VIRTIO_DEVICES_MAX {
            return Err(bad(
                "drives",
                count,
                format!("are more than {VIRTIO_DEVICES_MAX}"),
            ));
        }
        let mut ids = BTreeSet::new();
        let mut root: Option<&str> = None;
        for drive in &self.drives {
            let id = drive.drive_id.as_str();
            drive.check()?;
            if !ids.insert(id) {
                return Err(bad("drive_id", format!("{id:?}"), "is used twice"));
            }
            if drive.is_root_device && root.replace(id).is_some() {
                return Err(bad(
                    "is_root_device",
                    format!("drive {id:?}"),
                    "is a second root",
                ));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{MergeMode, VirtioDevice};
    use crate::virtio::Slot;

    fn parse(json: &str) -> VmConfig {
        serde_json::from_str(json).unwrap()
    }

    fn fault(json: &str) -> String {
        parse(json).validate().unwrap_err().to_string()
    }

    #[test]
    fn a_firecracker_config_file_is_taken_as_it_is() {
        let config = parse(
            r#"{
              "boot-source": {"kernel_image_path": "vmlinux.bin", "boot_args": "console=ttyS0"},
              "drives": [{"drive_id": "rootfs", "path_on_host": "rootfs.ext4",
                "is_root_device": true, "is_read_only": false, "partuuid": null,
                "cache_type": "Unsafe", "io_engine": "Sync", "rate_limiter": null, "socket": null}],
              "machine-config": {"vcpu_count": 2, "mem_size_mib": 1024, "smt": false,
                "track_dirty_pages": false, "huge_pages": "None", "cpu_template": null},
              "cpu-config": null, "balloon": null, "network-interfaces": [], "vsock": null,
              "logger": null, "metrics": null, "mmds-config": null, "entropy": null,
              "pmem": [], "memory-hotplug": null
            }"#,
        );
        config.validate().unwrap();
        assert_eq!(config.mem_size_bytes(), 1 << 30);
        assert_eq!(config.samepage.merge, MergeMode::On);
    }

    #[test]
    fn what_is_absent_gets_firecrackers_defaults() {
        let config = parse(r#"{"boot-source": {"kernel_image_path": "k"}}"#);
        config.validate().unwrap();
        assert_eq!(config, VmConfig::new("k"));
        assert_eq!(
            config.boot_source.boot_args(),
            super::super::DEFAULT_BOOT_ARGS
        );
        assert_eq!(
            (config.machine_config.vcpu_count, config.mem_size_bytes()),
            (1, 128 << 20)
        );
    }

    #[test]
    fn a_config_survives_being_written_and_read() {
        let mut config = VmConfig::new("k");
        config.samepage.merge_domain = Some("ci".parse().unwrap());
        let json = serde_json::to_string(&config).unwrap();
        assert!(!json.contains("vsock"), "{json}");
        assert_eq!(parse(&json), config);
    }

    #[test]
    fn unsupported_keys_are_refused_by_name_when_they_ask_for_something() {
        let with = |key: &str, value: &str| {
            format!(r#"{{"boot-source": {{"kernel_image_path": "k"}}, "{key}": {value}}}"#)
        };
        assert_eq!(
            fault(&with("serial", r#"{"output_path": "out"}"#)),
            "serial: not supported yet"
        );
        assert_eq!(
            fault(&with("cpu-config", r#""cpu.json""#)),
            "cpu-config: not supported yet"
        );
        let pmem = fault(&with("pmem", r#"[{"id": "pmem0"}]"#));
        assert_eq!(pmem, "pmem: not supported yet");
        for empty in ["null", "[]", "{}"] {
            parse(&with("pmem", empty)).validate().unwrap();
        }
    }

    #[test]
    fn an_entropy_device_may_be_limited_by_what_a_bucket_can_hold() {
        let with = |entropy: &str| {
            format!(r#"{{"boot-source": {{"kernel_image_path": "k"}}, "entropy": {entropy}}}"#)
        };
        assert_eq!(parse(&with("null")).entropy, None);
        assert_eq!(parse(&with("{}")).entropy, Some(EntropyConfig::default()));
        let limited = with(
            r#"{"rate_limiter": {"ops": null,
              "bandwidth": {"size": 1000, "one_time_burst": null, "refill_time": 100}}}"#,
        );
        parse(&limited).validate().unwrap();
        let devices = parse(&limited);
        let is_entropy = |device: &_| matches!(device, VirtioDevice::Entropy(_));
        assert!(devices.virtio_devices().iter().any(is_entropy));
        let limit = |bucket: &str| with(&format!(r#"{{"rate_limiter": {{"ops": {bucket}}}}}"#));
        assert_eq!(
            fault(&limit(r#"{"size": 9223372036854775808, "refill_time": 1}"#)),
            "entropy.rate_limiter.ops.size: 9223372036854775808 is more than 9223372036854775807"
        );
        assert_eq!(
            fault(&limit(r#"{"size": 1, "refill_time": 9223372036855}"#)),
            "entropy.rate_limiter.ops.refill_time: 9223372036855 is more than 9223372036854"
        );
    }

    #[test]
    fn a_balloon_has_firecrackers_fields_and_no_more_than_the_memory() {
        let with = |balloon: &str| {
            format!(r#"{{"boot-source": {{"kernel_image_path": "k"}}, "balloon": {balloon}}}"#)
        };
        let full = with(
            r#"{"amount_mib": 128, "deflate_on_oom": true, "stats_polling_interval_s": 1,
                "free_page_hinting": false, "free_page_reporting": true}"#,
        );
        parse(&full).validate().unwrap();
        let least = parse(&with(r#"{"amount_mib": 0, "deflate_on_oom": false}"#));
        assert_eq!(least.balloon, Some(BalloonConfig::default()));
        assert_eq!(
            fault(&full.replace("128", "129")),
            "balloon.amount_mib: 129 is more than the 128 of mem_size_mib"
        );
        assert_eq!(
            fault(&full.replace(r#"hinting": false"#, r#"hinting": true"#)),
            "balloon.free_page_hinting: true: not supported yet"
        );
        let missing = serde_json::from_str::<VmConfig>(&with(r#"{"amount_mib": 0}"#));
        assert!(missing.unwrap_err().to_string().contains("deflate_on_oom"));
    }

    #[test]
    fn a_vsock_device_has_an_address_of_a_guest_and_a_path_that_leaves_room_for_ports() {
        let with = |cid: u64, path: &str| {
            format!(
                r#"{{"boot-source": {{"kernel_image_path": "k"}},
                    "vsock": {{"guest_cid": {cid}, "uds_path": "{path}", "vsock_id": "v"}}}}"#
            )
        };
        let longest = "p".repeat(96);
        for cid in [3, 4_294_967_294] {
            let config = parse(&with(cid, &longest));
            config.validate().unwrap();
            assert_eq!(config.virtio_devices()[0].name(), "vsock");
        }
        for cid in [2, 4_294_967_295] {
            let expected = format!("vsock.guest_cid: {cid} is not 3 to 4294967294");
            assert_eq!(fault(&with(cid, "v")), expected);
        }
        for path in [format!("{longest}p"), String::new(), "a\\u0000b".to_owned()] {
            let fault = fault(&with(3, &path));
            assert!(fault.starts_with("vsock.uds_path: \""), "{fault}");
            assert!(fault.ends_with("is not a path of 1 to 96 bytes"), "{fault}");
        }
    }

    #[test]
    fn bad_network_interfaces_are_named_with_their_value() {
        let faulty = |change: &dyn Fn(&mut NetworkInterface)| {
            let mut config = VmConfig::new("k");
            config.network_interfaces = vec![
                NetworkInterface::new("eth0", "tap0"),
                NetworkInterface::new("eth1", "tap1"),
            ];
            for interface in &mut config.network_interfaces {
                interface.mtu = Some(MTU_MIN);
            }
            config.validate().unwrap();
            change(&mut config.network_interfaces[1]);
            config.validate().unwrap_err().to_string()
        };
        assert_eq!(
            faulty(&|eth1| eth1.iface_id = "eth0".to_owned()),
            "iface_id: \"eth0\" is used twice"
        );
        assert_eq!(
            faulty(&|eth1| eth1.host_dev_name = "tap0".to_owned()),
            "network-interfaces[eth1].host_dev_name: \"tap0\" is used twice"
        );
        for mtu in [67, 70_000] {
            assert_eq!(
                faulty(&|eth1| eth1.mtu = Some(mtu)),
                format!("network-interfaces[eth1].mtu: {mtu} is not 68 to 65535")
            );
        }
        let bucket = TokenBucketConfig {
            size: 1 << 63,
            one_time_burst: None,
            refill_time: 1,
        };
        let ops = RateLimiterConfig {
            ops: Some(bucket),
            bandwidth: None,
        };
        let limited = faulty(&|eth1| eth1.tx_rate_limiter = Some(ops));
        let field = "network-interfaces[eth1].tx_rate_limiter.ops.size: 9223372036854775808 is";
        assert!(limited.starts_with(field), "{limited}");
        for name in ["", "a/b", "tap%d", "..", "sixteen-letters-"] {
            let text = faulty(&|eth1| eth1.host_dev_name = name.to_owned());
            assert!(
                text.starts_with(&format!(
                    "network-interfaces[eth1].host_dev_name: {name:?} is not"
                )),
                "{text}"
            );
        }
        let mut config = VmConfig::new("k");
        for id in ["a", "b"] {
            let mut interface = NetworkInterface::new(id, id);
            interface.guest_mac = "06:00:00:00:00:01".parse().ok();
            config.network_interfaces.push(interface);
        }
        assert_eq!(
            config.validate().unwrap_err().to_string(),
            "network-interfaces[b].guest_mac: 06:00:00:00:00:01 is used twice"
        );
    }

    #[test]
    fn all_devices_are_counted_together() {
        let mut config = VmConfig::new("k");
        let drive =
            |n| format!(r#"{{"drive_id": "d{n}", "path_on_host": "f", "is_root_device": false}}"#);
        let drives: Vec<String> = (0..VIRTIO_DEVICES_MAX).map(drive).collect();
        config.drives = serde_json::from_str(&format!("[{}]", drives.join(","))).unwrap();
        config.validate().unwrap();
        config.entropy = Some(EntropyConfig::default());
        assert_eq!(
            config.validate().unwrap_err().to_string(),
            "drives, network-interfaces, entropy, vsock and balloon: 20 devices are more than 19"
        );
    }

    #[test]
    fn unknown_keys_are_refused() {
        for json in [
            r#"{"boot-source": {"kernel_image_path": "k"}, "extra": 1}"#,
            r#"{"boot-source": {"kernel_image_path": "k", "extra": 1}}"#,
            r#"{"boot-source": {"kernel_image_path": "k"}, "samepage": {"extra": 1}}"#,
        ] {
            let error = serde_json::from_str::<VmConfig>(json)
                .unwrap_err()
                .to_string();
            assert!(error.contains("extra"), "{error}");
        }
    }

    #[test]
    fn bad_machine_values_are_named_with_their_value() {
        let with = |machine: &str| {
            format!(
                r#"{{"boot-source": {{"kernel_image_path": "k"}}, "machine-config": {machine}}}"#
            )
        };
        let machine = |vcpus, mib, more| {
            with(&format!(
                r#"{{"vcpu_count": {vcpus}, "mem_size_mib": {mib}{more}}}"#
            ))
        };
        assert_eq!(fault(&machine(0, 128, "")), "vcpu_count: 0 is not 1 to 32");
        assert_eq!(
            fault(&machine(33, 128, "")),
            "vcpu_count: 33 is not 1 to 32"
        );
        assert_eq!(
            fault(&machine(1, 0, "")),
            "mem_size_mib: 0 is not 1 to 1048576"
        );
        assert!(fault(&machine(3, 128, r#", "smt": true"#)).starts_with("vcpu_count: 3 is odd"));
        assert!(fault(&machine(1, 128, r#", "huge_pages": "2M""#)).starts_with("huge_pages"));
        assert!(fault(&machine(1, 128, r#", "cpu_template": "T2""#)).contains("\"T2\""));
    }

    #[test]
    fn there_is_a_place_for_as_many_drives_as_are_allowed() {
        Slot::new(VIRTIO_DEVICES_MAX - 1).unwrap();
        Slot::new(VIRTIO_DEVICES_MAX).unwrap_err();
    }

    #[test]
    fn bad_drives_and_boot_args_are_named() {
        let mut config = VmConfig::new("k");
        config.boot_source.boot_args = Some("console=ttyS0\n".to_owned());
        assert!(
            config
                .validate()
                .unwrap_err()
                .to_string()
                .starts_with("boot_args: character")
        );
        let drive = r#"{"drive_id": "a", "path_on_host": "f", "is_root_device": true}"#;
        let two = format!(
            r#"{{"boot-source": {{"kernel_image_path": "k"}}, "drives": [{drive}, {drive}]}}"#
        );
        assert_eq!(fault(&two), "drive_id: \"a\" is used twice");
        let other = drive.replace("\"a\"", "\"b\"");
        let two = format!(
            r#"{{"boot-source": {{"kernel_image_path": "k"}}, "drives": [{drive}, {other}]}}"#
        );
        assert_eq!(fault(&two), "is_root_device: drive \"b\" is a second root");
    }
}
