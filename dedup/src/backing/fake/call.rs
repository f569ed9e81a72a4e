//! Which calls of the model can fail on demand.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};

/// What can fail on demand: every method of `Backing` and `Pool` that may, and a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    Residency,
    HasHugePage,
    SplitHugePage,
    Fill,
    Protect,
    Discard,
    Map,
    Stage,
    StageCopies,
    StageZeros,
    Unstage,
    Replace,
    Unshare,
    Collect,
    Punch,
}

impl Call {
    pub(crate) const ALL: [Call; 15] = [
        Call::Residency,
        Call::HasHugePage,
        Call::SplitHugePage,
        Call::Fill,
        Call::Protect,
        Call::Discard,
        Call::Map,
        Call::Stage,
        Call::StageCopies,
        Call::StageZeros,
        Call::Unstage,
        Call::Replace,
        Call::Unshare,
        Call::Collect,
        Call::Punch,
    ];

    /// Those that take memory, or VMAs.
    pub(super) const TAKING: [Call; 9] = [
        Call::Fill,
        Call::Discard,
        Call::Map,
        Call::Stage,
        Call::StageCopies,
        Call::StageZeros,
        Call::Unstage,
        Call::Replace,
        Call::Unshare,
    ];

    /// As a set.
    pub(super) fn bits(calls: &[Call]) -> u32 {
        calls.iter().fold(0, |bits, &call| bits | 1 << call as u32)
    }
}

/// Takes one of the calls that still succeed.
pub(super) fn count_down(calls_left: &AtomicU32) -> io::Result<()> {
    let left = |left: u32| match left {
        u32::MAX => Some(left),
        _ => left.checked_sub(1),
    };
    match calls_left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, left) {
        Ok(_) => Ok(()),
        Err(_) => Err(io::Error::from(io::ErrorKind::OutOfMemory)),
    }
}
