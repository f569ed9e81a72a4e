//! What a VM is started from: the files its configuration names, opened and checked.

use std::fs::File;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use crate::admission::{GivenUp, NoMemory};
use crate::boot::cmdline::{self, CmdlineError};
use crate::boot::kernel::{self, Kernel};
use crate::boot::{self, BootError, KernelError};
use crate::bus::BusError;
use crate::config::{
    BootSource, ConfigError, ConfigPart, MergeMode, NetworkInterface, VmConfig, VsockConfig,
};
use crate::error::ErrorKind;
use crate::events::EventsError;
use crate::guard::room::VmAllowance;
use crate::host_file::{self, Allowed};
use crate::ksm::{Ksm, KsmError};
use crate::kvm::KvmError;
use crate::kvm::vcpu::VcpuError;
use crate::memory::GuestMemory;
use crate::memory::ram::RamError;
use crate::metered::Metered;
use crate::pageload;
use crate::virtio::{Disk, DiskError, SlotError, Tap, VsockSocket};

const KERNEL_FIELD: &str = "kernel_image_path";
const INITRD_FIELD: &str = "initrd_path";

/// Why a VM could not be created or started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// A configuration value.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A file the configuration names cannot be opened.
    #[error("{field}: {path:?}: {error}")]
    File {
        /// The configuration's field.
        field: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        error: std::io::Error,
    },
    /// The kernel or the initrd cannot be loaded.
    #[error("{field}: {path:?} {error}")]
    Load {
        /// The configuration's field.
        field: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        error: BootError,
    },
    /// The command line or the boot tables.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The command line.
    #[error(transparent)]
    Cmdline(#[from] CmdlineError),
    /// Guest memory.
    #[error("mem_size_mib: {0}")]
    Ram(#[source] RamError),
    /// Kernel KSM, asked for by `merge`.
    #[error(transparent)]
    Ksm(#[from] KsmError),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// vCPU threads.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// The event loop.
    #[error(transparent)]
    Events(#[from] EventsError),
    /// An interrupt line or a timer could not be made.
    #[error("cannot make an eventfd or a timer: {0}")]
    EventFd(#[source] std::io::Error),
    /// A drive's file.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A tap device cannot be opened.
    #[error("network-interfaces[{iface_id}].host_dev_name {host_dev_name}: {error}")]
    Tap {
        /// The interface.
        iface_id: String,
        /// The tap device.
        host_dev_name: String,
        /// Why.
        #[source]
        error: std::io::Error,
    },
    /// The socket of the vsock device cannot be made.
    #[error("vsock.uds_path {path:?}: {error}")]
    Vsock {
        /// Its path.
        path: PathBuf,
        /// Why.
        #[source]
        error: std::io::Error,
    },
    /// A place for a device.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// There is no memory for what it loads.
    #[error(transparent)]
    NoMemory(#[from] NoMemory),
    /// It was the one to go when memory ran out, or the VM was stopped.
    #[error(transparent)]
    GivenUp(#[from] GivenUp),
    /// A device's place is taken.
    #[error(transparent)]
    Bus(#[from] BusError),
}

impl StartError {
    /// Whose fault it is: what the request names is bad, or the host has not enough.
    pub fn kind(&self) -> ErrorKind {
        match self {
            StartError::Disk(DiskError::Locked { .. }) => ErrorKind::InUse,
            StartError::Tap { error, .. } if error.kind() == std::io::ErrorKind::ResourceBusy => {
                ErrorKind::InUse
            }
            StartError::NoMemory(_) | StartError::GivenUp(GivenUp::NoMemory) => ErrorKind::NoRoom,
            StartError::GivenUp(GivenUp::Stopped) => ErrorKind::Conflict,
            StartError::Config(_)
            | StartError::File { .. }
            | StartError::Load { .. }
            | StartError::Boot(_)
            | StartError::Cmdline(_)
            | StartError::Disk(_)
            | StartError::Tap { .. }
            | StartError::Vsock { .. }
            | StartError::Slot(_)
            | StartError::Ksm(KsmError::NoDirectory(_) | KsmError::UnknownAdvice) => {
                ErrorKind::InvalidInput
            }
            StartError::Ksm(KsmError::Refused(_))
            | StartError::Ram(_)
            | StartError::Kvm(_)
            | StartError::Vcpu(_)
            | StartError::Events(_)
            | StartError::Bus(_)
            | StartError::EventFd(_) => ErrorKind::Internal,
        }
    }
}

/// As the field that they are about.
impl From<RamError> for StartError {
    fn from(error: RamError) -> StartError {
        match error {
            RamError::Ksm(error) => StartError::Ksm(error),
            error => StartError::Ram(error),
        }
    }
}

/// Opens a regular file for reading.
///
/// Rejected: any file. A pipe or a device would make the monitor wait, maybe for ever.
fn open(field: &'static str, path: &Path) -> Result<File, StartError> {
    host_file::open(path, false, Allowed::Regular).map_err(|error| StartError::File {
        field,
        path: path.to_owned(),
        error,
    })
}

/// Checks that the files are there, without loading them: what is known to fail at start should
/// fail when the VM is created.
pub(crate) fn check_files(config: &VmConfig) -> Result<(), StartError> {
    if !config.boot_source.is_absent() {
        check_boot_source(&config.boot_source)?;
    }
    for drive in &config.drives {
        Disk::open(drive)?;
    }
    config.network_interfaces.iter().try_for_each(check_tap)?;
    config
        .vsock
        .iter()
        .try_for_each(|vsock| bind_vsock(vsock).map(drop))
}

fn check_boot_source(boot_source: &BootSource) -> Result<(), StartError> {
    if !boot_source.is_builtin_pageload() {
        open(KERNEL_FIELD, &boot_source.kernel_image_path)?;
    }
    if let Some(path) = &boot_source.initrd_path {
        open(INITRD_FIELD, path)?;
    }
    Ok(())
}

/// Checks what [`check_files`] does of one part of a configuration.
pub(crate) fn check_part(part: &ConfigPart) -> Result<(), StartError> {
    match part {
        ConfigPart::BootSource(boot_source) => check_boot_source(boot_source),
        ConfigPart::Drive(drive) => Disk::open(drive).map(|_| ()).map_err(StartError::from),
        ConfigPart::NetworkInterface(interface) => check_tap(interface),
        // Made and removed: the VM makes it again.
        ConfigPart::Vsock(vsock) => bind_vsock(vsock).map(drop),
        ConfigPart::Balloon(_)
        | ConfigPart::Entropy(_)
        | ConfigPart::Machine(_)
        | ConfigPart::MachinePatch(_) => Ok(()),
    }
}

/// Opens a tap device and closes it again. One that is in use may be free when the VM starts, as the
/// file of a locked drive may. Two VMs of one device may get in each other's way here, as they would
/// when they run.
fn check_tap(interface: &NetworkInterface) -> Result<(), StartError> {
    match open_tap(interface) {
        Err(error) if error.kind() == ErrorKind::InUse => Ok(()),
        opened => opened.map(|_| ()),
    }
}

/// Opens the tap device of an interface.
pub(crate) fn open_tap(interface: &NetworkInterface) -> Result<Tap, StartError> {
    Tap::open(&interface.host_dev_name).map_err(|error| StartError::Tap {
        iface_id: interface.iface_id.clone(),
        host_dev_name: interface.host_dev_name.clone(),
        error,
    })
}

/// Makes the socket of a vsock device, whose file goes with it.
pub(crate) fn bind_vsock(vsock: &VsockConfig) -> Result<VsockSocket, StartError> {
    VsockSocket::bind(&vsock.uds_path).map_err(|error| StartError::Vsock {
        path: vsock.uds_path.clone(),
        error,
    })
}

/// Checks that the kernel has what the configuration needs of it.
pub(crate) fn check_kernel(config: &VmConfig, ksm: &Ksm) -> Result<(), StartError> {
    match config.samepage.merge {
        MergeMode::Ksm => Ok(ksm.check()?),
        MergeMode::On | MergeMode::Off => Ok(()),
    }
}

/// What a start takes besides kernel and initrd: the tables that the guest boots with.
const TABLES_BYTES: u64 = 1 << 20;
/// Pages that are taken for less than a page of something: at both ends of kernel and initrd.
const PARTIAL_PAGES: u64 = 4;

/// Loads everything into guest memory, of which `allowance` is asked before any of it is taken.
/// Returns the entry point.
pub(crate) fn load(
    memory: &GuestMemory,
    config: &VmConfig,
    allowance: &VmAllowance,
) -> Result<u64, StartError> {
    allowance.reserve(needed_bytes(config)?)?;
    let loaded = load_reserved(memory, config, allowance);
    if let Some(why) = allowance.over() {
        // Whatever the loader made of it.
        return Err(why.into());
    }
    loaded
}

/// What [`load`] takes. More than all of the guest's memory is not taken, but refused.
fn needed_bytes(config: &VmConfig) -> Result<u64, StartError> {
    let path = &config.boot_source.kernel_image_path;
    let kernel_bytes = if config.boot_source.is_builtin_pageload() {
        kernel::loaded_bytes(&mut Cursor::new(pageload::image()))
    } else {
        kernel::loaded_bytes(&mut open(KERNEL_FIELD, path)?)
    };
    let kernel_bytes = kernel_bytes.map_err(|error| kernel_error(path, error))?;
    let initrd_bytes = match &config.boot_source.initrd_path {
        None => 0,
        Some(path) => {
            let length = open(INITRD_FIELD, path)?.metadata();
            let length = length.map_err(|error| StartError::File {
                field: INITRD_FIELD,
                path: path.clone(),
                error,
            });
            length?.len()
        }
    };
    let files_bytes = kernel_bytes
        .saturating_add(initrd_bytes)
        .min(config.mem_size_bytes());
    Ok(files_bytes + TABLES_BYTES + PARTIAL_PAGES * config.page_bytes())
}

fn load_reserved(
    memory: &GuestMemory,
    config: &VmConfig,
    allowance: &VmAllowance,
) -> Result<u64, StartError> {
    let mem_size_bytes = config.mem_size_bytes();
    let kernel = load_kernel(memory, config, allowance)?;
    let initrd = match &config.boot_source.initrd_path {
        None => None,
        Some(path) => {
            let mut file = Metered::new(open(INITRD_FIELD, path)?, allowance);
            let initrd = boot::load_initrd(memory, mem_size_bytes, &kernel, &mut file);
            let failed = |error| StartError::Load {
                field: INITRD_FIELD,
                path: path.clone(),
                error,
            };
            Some(initrd.map_err(failed)?)
        }
    };
    let cmdline = cmdline::compose(config)?;
    let vcpus = config.machine_config.vcpu_count;
    boot::write_tables(memory, mem_size_bytes, vcpus, (&kernel, initrd, &cmdline))?;
    Ok(kernel.entry)
}

fn load_kernel(
    memory: &GuestMemory,
    config: &VmConfig,
    allowance: &VmAllowance,
) -> Result<Kernel, StartError> {
    let path = &config.boot_source.kernel_image_path;
    let mem_size_bytes = config.mem_size_bytes();
    let loaded = if config.boot_source.is_builtin_pageload() {
        let mut image = Metered::new(Cursor::new(pageload::image()), allowance);
        kernel::load(memory, mem_size_bytes, &mut image)
    } else {
        let mut image = Metered::new(open(KERNEL_FIELD, path)?, allowance);
        kernel::load(memory, mem_size_bytes, &mut image)
    };
    loaded.map_err(|error| kernel_error(path, error))
}

fn kernel_error(path: &Path, error: KernelError) -> StartError {
    StartError::Load {
        field: KERNEL_FIELD,
        path: path.to_owned(),
        error: error.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_for_kernel_ksm_is_refused_where_the_kernel_has_none() {
        let kernel = tempfile::tempdir().unwrap();
        let ksm = Ksm::told_by(kernel.path());
        let mut config = VmConfig::new("k");
        check_kernel(&config, &ksm).expect("nobody asks for it");
        config.samepage.merge = MergeMode::Ksm;
        let error = check_kernel(&config, &ksm).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        let text = error.to_string();
        assert!(
            text.contains("merge: \"ksm\" needs a kernel with KSM"),
            "{text}"
        );
    }

    #[test]
    fn what_madvise_says_is_about_merge_and_not_about_the_size_of_memory() {
        let unknown = StartError::from(RamError::Ksm(KsmError::UnknownAdvice));
        assert!(
            unknown.to_string().starts_with("merge: \"ksm\""),
            "{unknown}"
        );
        assert_eq!(unknown.kind(), ErrorKind::InvalidInput);
        let refused = KsmError::Refused(std::io::Error::from_raw_os_error(libc::EAGAIN));
        let refused = StartError::from(RamError::Ksm(refused));
        assert_eq!(refused.kind(), ErrorKind::Internal);
    }
}
