//! The MMIO bus: which device answers at a guest physical address.
//!
//! A device is reached by two threads: a vCPU thread (register accesses, through this bus) and the
//! event loop (its queues, through its subscriber). Both take the device's own mutex; the bus adds
//! no lock, because the set of devices is fixed before the first vCPU runs.

use std::sync::{Arc, Mutex, PoisonError};

/// A device with memory-mapped registers.
///
/// Both methods are called on a vCPU thread with the device's mutex held. `offset` counts from the
/// start of the device's range; `offset + data.len()` never leaves the range. Every value is the
/// guest's: it is checked here or nowhere.
pub trait MmioDevice: Send {
    /// Fills `data` with what the guest reads at `offset` (bytes).
    ///
    /// What is left untouched reads as the zeros the bus put there.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// Takes what the guest writes at `offset` (bytes).
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A device as the bus and the event loop share it.
pub type SharedMmioDevice = Arc<Mutex<dyn MmioDevice>>;

/// Errors of [`MmioBus::insert`].
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BusError {
    /// The range has no byte, or its end passes the end of the address space.
    #[error("mmio range at {base:#x} of {size_bytes:#x} bytes is empty or wraps around")]
    BadRange {
        /// First address.
        base: u64,
        /// Length of the range.
        size_bytes: u64,
    },
    /// Another device answers in the range already.
    #[error("mmio range at {base:#x} of {size_bytes:#x} bytes overlaps a device at {other:#x}")]
    Overlap {
        /// First address.
        base: u64,
        /// Length of the range.
        size_bytes: u64,
        /// First address of the device that was there first.
        other: u64,
    },
}

struct Range {
    base: u64,
    size_bytes: u64,
    device: SharedMmioDevice,
}

/// The devices of one VM by address.
///
/// Reads where no device answers give all ones and writes there are dropped, as on hardware.
#[derive(Default)]
pub struct MmioBus {
    // A handful of devices: a scan of a small array beats a tree.
    ranges: Vec<Range>,
}

impl std::fmt::Debug for MmioBus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ranges = self
            .ranges
            .iter()
            .map(|range| (range.base, range.size_bytes));
        f.debug_list().entries(ranges).finish()
    }
}

impl MmioBus {
    /// A bus without devices.
    pub fn new() -> MmioBus {
        MmioBus::default()
    }

    /// Lets `device` answer at `base..base + size_bytes`.
    ///
    /// # Errors
    /// [`BusError`] when the range is empty, wraps around or is taken.
    pub fn insert(
        &mut self,
        base: u64,
        size_bytes: u64,
        device: SharedMmioDevice,
    ) -> Result<(), BusError> {
        let last = size_bytes
            .checked_sub(1)
            .and_then(|rest| base.checked_add(rest));
        let Some(last) = last else {
            return Err(BusError::BadRange { base, size_bytes });
        };
        let overlaps = |r: &&Range| base <= r.base + (r.size_bytes - 1) && r.base <= last;
        if let Some(other) = self.ranges.iter().find(overlaps).map(|r| r.base) {
            return Err(BusError::Overlap {
                base,
                size_bytes,
                other,
            });
        }
        self.ranges.push(Range {
            base,
            size_bytes,
            device,
        });
        Ok(())
    }

    /// Serves a guest's read of `data.len()` bytes at `address`.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                data.fill(0);
                // A device that panicked has already ended its VM: what it answers does not matter.
                device
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .read(offset, data);
            }
            None => data.fill(0xff),
        }
    }

    /// Serves a guest's write at `address`.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(address, data.len()) {
            device
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .write(offset, data);
        }
    }

    fn find(&self, address: u64, len: usize) -> Option<(u64, &SharedMmioDevice)> {
        self.ranges.iter().find_map(|range| {
            let offset = address.checked_sub(range.base)?;
            let end = offset.checked_add(len as u64)?;
            (end <= range.size_bytes).then_some((offset, &range.device))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Recorder {
        written: Vec<(u64, Vec<u8>)>,
    }

    impl MmioDevice for Recorder {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data[0] = u8::try_from(offset).unwrap();
        }

        fn write(&mut self, offset: u64, data: &[u8]) {
            self.written.push((offset, data.to_vec()));
        }
    }

    #[test]
    fn accesses_reach_the_device_with_its_own_offset() {
        let device = Arc::new(Mutex::new(Recorder::default()));
        let mut bus = MmioBus::new();
        bus.insert(0x1000, 0x100, device.clone()).unwrap();
        bus.write(0x10fc, &[1, 2, 3, 4]);
        let mut data = [0xaa; 4];
        bus.read(0x1004, &mut data);
        assert_eq!(data, [4, 0, 0, 0]);
        assert_eq!(device.lock().unwrap().written, [(0xfc, vec![1, 2, 3, 4])]);
    }

    #[test]
    fn accesses_beside_or_across_the_end_of_a_device_find_nobody() {
        let device = Arc::new(Mutex::new(Recorder::default()));
        let mut bus = MmioBus::new();
        bus.insert(0x1000, 0x100, device.clone()).unwrap();
        bus.write(0x10fd, &[1, 2, 3, 4]);
        bus.write(0xfff, &[1]);
        let mut data = [0; 2];
        bus.read(u64::MAX, &mut data);
        assert_eq!(data, [0xff; 2]);
        assert!(device.lock().unwrap().written.is_empty());
    }

    #[test]
    fn overlapping_empty_and_wrapping_ranges_are_refused() {
        let device: SharedMmioDevice = Arc::new(Mutex::new(Recorder::default()));
        let mut bus = MmioBus::new();
        bus.insert(0x1000, 0x1000, device.clone()).unwrap();
        let overlap = bus.insert(0x1fff, 0x1000, device.clone()).unwrap_err();
        assert!(matches!(overlap, BusError::Overlap { other: 0x1000, .. }));
        let empty = bus.insert(0x4000, 0, device.clone()).unwrap_err();
        assert!(matches!(empty, BusError::BadRange { .. }));
        let wraps = bus.insert(u64::MAX, 2, device.clone()).unwrap_err();
        assert!(matches!(wraps, BusError::BadRange { .. }));
        bus.insert(0x2000, 0x1000, device).unwrap();
    }
}
