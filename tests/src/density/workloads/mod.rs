//! What guests do in each workload, from the first launch to the end of what is measured.
//!
//! Each workload marks `last guest ready`, `at rest` where it has a rest, and `end`; what it marks
//! beside these is its own.
//!
//! | module | holds |
//! |---|---|
//! | [`fleet`] | `idle`, `agents` and `two-images`: guests that stay |
//! | [`burst`] | guests that come and go |
//! | [`phase`] | guests that load the same data, diverge, and converge |
//! | [`storm`] | guests until the limit, which then all write |
//! | [`latency`] | a guest that times its writes |
//!
//! `clone` joins them when VMs can be cloned: n clones of one snapshot of the guest of `idle`.

pub(crate) mod burst;
pub(crate) mod fleet;
pub(crate) mod latency;
pub(crate) mod phase;
pub(crate) mod storm;

use super::model::Workload;
use super::run::{RunError, Stage};

/// Runs the workload of the stage's arm.
pub(crate) async fn play(stage: &mut Stage) -> Result<(), RunError> {
    match stage.arm.workload {
        Workload::Idle | Workload::Agents | Workload::TwoImages => fleet::play(stage).await?,
        Workload::Burst => burst::play(stage).await?,
        Workload::Phase => phase::play(stage).await?,
        Workload::Storm => storm::play(stage).await?,
        Workload::Latency => latency::play(stage).await?,
    }
    stage.record.mark("end");
    Ok(())
}

/// Whether the guests' memory is to be read at the end.
pub(crate) fn has_oracle(workload: Workload) -> bool {
    // The guests of a burst are gone, a storm's have nothing in common any more, and busy ones of
    // `latency` never hold still for a moment that says something.
    !matches!(
        workload,
        Workload::Burst | Workload::Storm | Workload::Latency
    )
}
