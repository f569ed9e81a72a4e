//! Threads and locks: who works on what, and how a region leaves.

pub(crate) mod advisor;
pub(crate) mod control;
pub(crate) mod core;
pub(crate) mod discard;
pub(crate) mod merge_now;
pub(crate) mod ring;
pub(crate) mod scan_state;
pub(crate) mod stopwatch;
pub(crate) mod worker;
