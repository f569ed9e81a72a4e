//! The device status register as a state machine (virtio 1.2, sections 2.1 and 3.1).

use thiserror::Error;
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE as ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER as DRIVER,
    VIRTIO_CONFIG_S_DRIVER_OK as DRIVER_OK, VIRTIO_CONFIG_S_FAILED as FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK as FEATURES_OK,
};

/// The bits a driver may write. `DEVICE_NEEDS_RESET` is the device's.
const DRIVER_BITS: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED;

/// Each bit and the one that must be set with or before it (virtio 1.2, 3.1.1: the driver follows
/// the steps in order).
const STEPS: [(u32, u32); 3] = [
    (DRIVER, ACKNOWLEDGE),
    (FEATURES_OK, DRIVER),
    (DRIVER_OK, FEATURES_OK),
];

/// Why a write to the status register is ignored.
#[derive(Debug, Error, PartialEq, Eq)]
pub(super) enum StatusError {
    #[error("status {written:#x} has unknown bits")]
    UnknownBits { written: u32 },
    #[error("status {written:#x} clears bits of {current:#x}")]
    ClearedBits { current: u32, written: u32 },
    #[error("status {written:#x} skips a step of the initialization")]
    SkippedStep { written: u32 },
}

/// The status after a driver wrote `written` (not 0, which is a reset) over `current`.
///
/// `features_agreed` says whether the driver's features are acceptable: where they are not,
/// `FEATURES_OK` does not stick and the driver sees that when it reads the register back.
pub(super) fn next_status(
    current: u32,
    written: u32,
    features_agreed: bool,
) -> Result<u32, StatusError> {
    // A driver may write back the device's own bit with the rest of what it read.
    let written = written & !virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET;
    if written & !DRIVER_BITS != 0 {
        return Err(StatusError::UnknownBits { written });
    }
    if current & !written != 0 {
        return Err(StatusError::ClearedBits { current, written });
    }
    if STEPS
        .iter()
        .any(|&(bit, before)| written & bit != 0 && written & before == 0)
    {
        return Err(StatusError::SkippedStep { written });
    }
    let refused = current & FEATURES_OK == 0 && written & FEATURES_OK != 0 && !features_agreed;
    Ok(if refused {
        written & !(FEATURES_OK | DRIVER_OK)
    } else {
        written
    })
}

/// Whether features are still open.
pub(super) fn negotiates_features(status: u32) -> bool {
    status & DRIVER != 0 && status & (FEATURES_OK | FAILED) == 0
}

/// Whether queues may be set up.
pub(super) fn configures_queues(status: u32) -> bool {
    status & FEATURES_OK != 0 && status & (DRIVER_OK | FAILED) == 0
}

/// Whether the step from `before` to `after` starts the device.
pub(super) fn starts_device(before: u32, after: u32) -> bool {
    before & DRIVER_OK == 0 && after & DRIVER_OK != 0 && after & FAILED == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_steps_of_the_specification_are_accepted_in_order() {
        let mut status = 0;
        for bit in [ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK] {
            let next = next_status(status, status | bit, true).unwrap();
            assert_eq!(next, status | bit);
            status = next;
        }
    }

    #[test]
    fn features_ok_does_not_stick_when_features_are_not_acceptable() {
        assert_eq!(next_status(3, 3 | FEATURES_OK, false), Ok(3));
        assert_eq!(next_status(3, 3 | FEATURES_OK | DRIVER_OK, false), Ok(3));
    }

    #[test]
    fn skipped_steps_cleared_and_unknown_bits_are_refused() {
        assert_eq!(
            next_status(0, DRIVER_OK, true),
            Err(StatusError::SkippedStep { written: DRIVER_OK })
        );
        assert_eq!(
            next_status(3, 1, true),
            Err(StatusError::ClearedBits {
                current: 3,
                written: 1
            })
        );
        assert_eq!(
            next_status(0, 0x101, true),
            Err(StatusError::UnknownBits { written: 0x101 })
        );
    }

    proptest! {
        #[test]
        fn a_status_only_grows_and_never_starts_without_agreed_features(
            writes in prop::collection::vec((any::<u8>(), any::<bool>()), 0..40),
        ) {
            let (mut status, mut agreed_once) = (0, false);
            for (written, agreed) in writes {
                if let Ok(next) = next_status(status, u32::from(written), agreed) {
                    prop_assert_eq!(next & status, status);
                    agreed_once |= agreed && next & FEATURES_OK != 0;
                    prop_assert!(next & DRIVER_OK == 0 || agreed_once);
                    status = next;
                }
            }
        }
    }
}
