//! The density benchmark: how many real guests fit, what they cost, beside kernel KSM and beside no
//! merging. `docs/density.md` has its method and its results.
//!
//! | module | holds |
//! |---|---|
//! | [`cli`] | the command line |
//! | [`command`] | from the arguments to the exit status |
//! | `guests` | what guests boot, and what they say of themselves |
//! | [`host`] | settings, cgroup and looks from outside |
//! | [`model`] | what a run is and what it found |
//! | [`oracle`] | what an ideal engine would find in the guests' memory |
//! | [`plan`] | which runs a call makes, and how long they take |
//! | [`report`] | figures, tables, plots and documents from what runs found |
//! | `run` | carries runs out |
//! | [`store`] | the JSON file of a report |
//! | `workloads` | what guests do |
//!
//! # Locks
//! `run::record`: what a run has found so far. Held for single statements, never across a wait.

pub mod cli;
pub mod command;
pub(crate) mod guests;
pub mod host;
pub mod model;
pub mod oracle;
pub mod plan;
pub mod report;
pub(crate) mod run;
pub mod store;
pub(crate) mod workloads;
