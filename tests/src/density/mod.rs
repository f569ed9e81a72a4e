//! The density benchmark: how many real guests fit, what they cost, beside kernel KSM and beside no
//! merging. `docs/density.md` has its method and its results.
//!
//! | module | holds |
//! |---|---|
//! | [`host`] | settings, cgroup and looks from outside |
//! | [`model`] | what a run is and what it found |
//! | [`oracle`] | what an ideal engine would find in the guests' memory |
//! | [`report`] | figures, tables, plots and documents from what runs found |

pub mod host;
pub mod model;
pub mod oracle;
pub mod report;
