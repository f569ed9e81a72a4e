//! The virtio devices of a configuration, in the order in which the guest finds them.

use crate::boot::cmdline::CMDLINE_LEN_MAX;

use super::{
    BalloonConfig, Drive, EntropyConfig, MergeMode, NetworkInterface, VmConfig, VsockConfig,
};

/// Interrupt lines 5 to 23, one a device (`virtio::Slot`).
pub(super) const VIRTIO_DEVICES_MAX: usize = 19;

/// One device with a place of its own.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum VirtioDevice<'a> {
    /// A block device.
    Drive(&'a Drive),
    /// A network interface.
    Network(&'a NetworkInterface),
    /// The entropy device.
    Entropy(&'a EntropyConfig),
    /// The balloon, with what is absent filled in.
    Balloon(BalloonConfig),
    /// The vsock device.
    Vsock(&'a VsockConfig),
}

impl VirtioDevice<'_> {
    /// What it is called in log messages.
    pub fn name(&self) -> &str {
        match self {
            VirtioDevice::Drive(drive) => &drive.drive_id,
            VirtioDevice::Network(interface) => &interface.iface_id,
            // Firecracker's name of it. A drive of this name is another device all the same.
            VirtioDevice::Entropy(_) => "rng",
            VirtioDevice::Balloon(_) => "balloon",
            VirtioDevice::Vsock(_) => "vsock",
        }
    }
}

impl VmConfig {
    /// The drives in the order the guest finds them: the root device first, hence `/dev/vda`.
    pub fn ordered_drives(&self) -> Vec<&Drive> {
        let mut drives: Vec<&Drive> = self.drives.iter().collect();
        drives.sort_by_key(|drive| !drive.is_root_device);
        drives
    }

    /// All devices that take a page of registers and an interrupt line: device number n of them is
    /// at `virtio::Slot` n, where the kernel's command line announces it.
    pub fn virtio_devices(&self) -> Vec<VirtioDevice<'_>> {
        let drives = self.ordered_drives().into_iter().map(VirtioDevice::Drive);
        let entropy = self.entropy.iter().map(VirtioDevice::Entropy);
        let networks = self.network_interfaces.iter().map(VirtioDevice::Network);
        let vsock = self.vsock.iter().map(VirtioDevice::Vsock);
        let devices = drives.chain(networks).chain(entropy).chain(vsock);
        let mut devices: Vec<_> = devices.collect();
        let has_place = devices.len() < VIRTIO_DEVICES_MAX;
        let balloon = self.balloon.or_else(|| self.default_balloon(has_place));
        let balloon = balloon.map(|balloon| balloon.resolved(self.samepage.merge));
        devices.extend(balloon.map(VirtioDevice::Balloon));
        devices
    }

    /// What a VM whose memory the engine merges has without being asked: a balloon that only reports
    /// what the guest does not use. It must not be what makes a configuration too large. The embedded
    /// guest has no driver for it.
    fn default_balloon(&self, has_place: bool) -> Option<BalloonConfig> {
        let is_wanted = has_place
            && self.samepage.merge == MergeMode::On
            && !self.boot_source.is_builtin_pageload()
            // The devices take less than the other half.
            && self.boot_source.boot_args().len() <= CMDLINE_LEN_MAX / 2;
        is_wanted.then(BalloonConfig::default)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn balloon(config: &VmConfig) -> Option<BalloonConfig> {
        match config.virtio_devices().last() {
            Some(VirtioDevice::Balloon(balloon)) => Some(*balloon),
            _ => None,
        }
    }

    #[test]
    fn a_vm_that_the_engine_merges_reports_what_it_does_not_use() {
        let mut config = VmConfig::new("k");
        let reporting = BalloonConfig {
            free_page_reporting: Some(true),
            ..BalloonConfig::default()
        };
        assert_eq!(balloon(&config), Some(reporting));
        for merge in [MergeMode::Off, MergeMode::Ksm] {
            config.samepage.merge = merge;
            assert_eq!(balloon(&config), None);
        }
        assert_eq!(balloon(&VmConfig::new("builtin:pageload")), None);
    }

    #[test]
    fn a_balloon_that_was_asked_for_reports_where_it_is_to_or_nobody_says_and_the_engine_merges() {
        let mut config = VmConfig::new("k");
        for (said, merge, reports) in [
            (None, MergeMode::On, true),
            (None, MergeMode::Off, false),
            (None, MergeMode::Ksm, false),
            (Some(false), MergeMode::On, false),
            (Some(true), MergeMode::Off, true),
        ] {
            config.samepage.merge = merge;
            config.balloon = Some(BalloonConfig {
                amount_mib: 7,
                free_page_reporting: said,
                ..BalloonConfig::default()
            });
            let balloon = balloon(&config).unwrap();
            assert_eq!(
                balloon.free_page_reporting,
                Some(reports),
                "{said:?} {merge:?}"
            );
            assert_eq!(balloon.amount_mib, 7);
        }
    }
}
