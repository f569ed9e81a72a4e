//! The raw file behind a block device.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::path::PathBuf;

use thiserror::Error;
use vm_memory::GuestMemoryError;

use super::image_format;
use crate::config::{CacheType, Drive};
use crate::host_file::{self, Allowed};

/// Bytes of a sector, whatever the file system below uses (virtio 1.2, 5.2.4).
const SECTOR_BYTES: u64 = 512;

/// Most bytes moved by a request. Without a bound, one chain of descriptors that all name the same
/// memory is 4 GiB of I/O that the event loop cannot interrupt.
pub(crate) const MAX_REQUEST_BYTES: u64 = 16 << 20;

/// Why a drive cannot be used. Each names the drive and its path.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DiskError {
    /// The file cannot be opened, or its size cannot be found out.
    #[error("drives[{drive_id}].path_on_host {}: {source}", path.display())]
    Open {
        /// The drive.
        drive_id: String,
        /// What the configuration says.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A directory, a pipe, a terminal or the like.
    #[error(
        "drives[{drive_id}].path_on_host {}: {kind}, not a regular file or block device",
        path.display()
    )]
    Kind {
        /// The drive.
        drive_id: String,
        /// What the configuration says.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// Another VM, or another program, has the file open in a way that excludes this one.
    #[error(
        "drives[{drive_id}].path_on_host {}: locked by another vm or program, which {holder}; \
         \"samepage\": {{\"lock\": false}} in the drive leaves the lock out",
        path.display()
    )]
    Locked {
        /// The drive.
        drive_id: String,
        /// What the configuration says.
        path: PathBuf,
        /// What the other side does to the file, as far as that is known.
        holder: &'static str,
    },
    /// The file system has no locks, or refuses one.
    #[error(
        "drives[{drive_id}].path_on_host {}: cannot be locked: {source}; \
         \"samepage\": {{\"lock\": false}} in the drive leaves the lock out",
        path.display()
    )]
    Lock {
        /// The drive.
        drive_id: String,
        /// What the configuration says.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

/// Why a read, write or flush was refused or failed. The guest sees an I/O error.
#[derive(Debug, Error)]
pub(crate) enum DiskFault {
    #[error("sector {sector} and {length_bytes} bytes: past the {capacity_sectors} of the disk")]
    OutOfBounds {
        sector: u64,
        length_bytes: u64,
        capacity_sectors: u64,
    },
    #[error("request of {0} bytes: not whole sectors")]
    NotSectors(u64),
    #[error("request of {0} bytes: more than {MAX_REQUEST_BYTES}")]
    TooLong(u64),
    #[error("write to a read-only disk")]
    ReadOnly,
    #[error("request buffer: {0}")]
    Memory(#[source] GuestMemoryError),
    #[error("disk i/o: {0}")]
    Io(#[source] io::Error),
}

/// An open drive of a known number of sectors.
#[derive(Debug)]
pub struct Disk {
    file: File,
    facts: DiskFacts,
}

/// What is known of a drive.
#[derive(Debug)]
pub(crate) struct DiskFacts {
    /// Its name.
    pub(crate) drive_id: String,
    /// Whole sectors of 512 bytes.
    pub(crate) capacity_sectors: u64,
    /// Whether writes are refused.
    pub(crate) is_read_only: bool,
    /// What a flush does.
    pub(crate) cache_type: CacheType,
}

impl Disk {
    /// Opens the drive's file. One whose size is not a multiple of 512 loses the rest, with a
    /// warning, as in Firecracker.
    ///
    /// A read-only drive is opened read-only too, so that the host's kernel refuses what we would
    /// let through by mistake.
    ///
    /// # Errors
    /// [`DiskError`]: the file is missing, may not be opened that way, or is not of a kind that has
    /// sectors.
    pub fn open(drive: &Drive) -> Result<Disk, DiskError> {
        let (drive_id, path) = (drive.drive_id.clone(), drive.path_on_host.clone());
        let is_read_only = drive.is_read_only;
        let opened =
            host_file::open(&path, !is_read_only, Allowed::Sectors).and_then(|mut file| {
                let size_bytes = file.seek(SeekFrom::End(0))?;
                Ok((file, size_bytes))
            });
        let (file, size_bytes) = match opened {
            Ok(opened) => opened,
            Err(source) => {
                return Err(match host_file::wrong_kind(&source) {
                    Some(kind) => DiskError::Kind {
                        drive_id,
                        path,
                        kind: kind.found,
                    },
                    None => DiskError::Open {
                        drive_id,
                        path,
                        source,
                    },
                });
            }
        };
        let rest_bytes = size_bytes % SECTOR_BYTES;
        if rest_bytes != 0 {
            log::warn!(
                "drives[{drive_id}].path_on_host {}: {size_bytes} bytes, the guest does not see \
                 the last {rest_bytes}: not a whole sector",
                path.display(),
            );
        }
        if let Some(format) = image_format::of(&file) {
            log::warn!(
                "drives[{drive_id}].path_on_host {}: looks like a {format} image, and the guest is \
                 given its bytes as they are: convert it to raw",
                path.display(),
            );
        }
        let capacity_sectors = size_bytes / SECTOR_BYTES;
        let facts = DiskFacts {
            drive_id,
            capacity_sectors,
            is_read_only,
            cache_type: drive.cache_type,
        };
        Ok(Disk { file, facts })
    }

    /// Opens the drive's file as [`Disk::open`] does, and locks it until the disk is dropped, unless
    /// the drive says `"lock": false`: for itself if the guest may write, else with other readers.
    ///
    /// # Errors
    /// As [`Disk::open`]; [`DiskError::Locked`] when somebody else has it.
    pub fn open_locked(drive: &Drive) -> Result<Disk, DiskError> {
        let disk = Disk::open(drive)?;
        if !drive.samepage.lock {
            return Ok(disk);
        }
        let (drive_id, path) = (drive.drive_id.clone(), drive.path_on_host.clone());
        match host_file::lock(&disk.file, !disk.facts.is_read_only) {
            Ok(()) => Ok(disk),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(DiskError::Locked {
                drive_id,
                path,
                holder: if disk.facts.is_read_only {
                    "may write to it"
                } else {
                    "may read or write it"
                },
            }),
            Err(source) => Err(DiskError::Lock {
                drive_id,
                path,
                source,
            }),
        }
    }

    /// Whole sectors of 512 bytes.
    pub fn capacity_sectors(&self) -> u64 {
        self.facts.capacity_sectors
    }

    /// The file, and what is known of it.
    pub(super) fn into_parts(self) -> (File, DiskFacts) {
        (self.file, self.facts)
    }
}

impl DiskFacts {
    /// Where in the file a request starts, once it is known to end inside.
    pub(super) fn start_bytes(&self, sector: u64, length_bytes: u64) -> Result<u64, DiskFault> {
        if !length_bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(DiskFault::NotSectors(length_bytes));
        }
        if length_bytes > MAX_REQUEST_BYTES {
            return Err(DiskFault::TooLong(length_bytes));
        }
        let end = sector.checked_add(length_bytes / SECTOR_BYTES);
        match end {
            // No overflow: the sector is within the capacity, which came from a size in bytes.
            Some(end) if end <= self.capacity_sectors => Ok(sector * SECTOR_BYTES),
            _ => Err(DiskFault::OutOfBounds {
                sector,
                length_bytes,
                capacity_sectors: self.capacity_sectors,
            }),
        }
    }
}
