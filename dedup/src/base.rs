//! What every layer uses: units, limits, counters, locks. It knows no page and no region.

pub(crate) mod budget;
pub(crate) mod complaints;
pub(crate) mod failpoint;
pub(crate) mod mutant;
pub(crate) mod pace;
pub(crate) mod page;
pub(crate) mod stats;
pub(crate) mod sync;
pub(crate) mod vmas;
