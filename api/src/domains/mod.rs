//! Merge domains as processes: the front door's side of it.
//!
//! | module | holds |
//! |---|---|
//! | [`gateway`] | what becomes of each request |
//! | `lists` | lists that all monitors have a part of |
//! | `lifecycle` | how monitors and VMs come and go |
//! | `adoption` | what an earlier front door left |
//! | `roster` | which VM is in which domain; pure |
//! | [`process`] | a monitor's process: started, adopted, watched, ended |
//! | `budget` | a domain's budget, and the limit of its cgroup |
//! | [`cgroup`] | a memory cgroup for each domain |
//! | [`proxy`] | requests and console streams, passed on |
//! | [`state_dir`] | what is on disk of each domain: socket, log, records |

mod adoption;
mod budget;
pub mod cgroup;
pub mod gateway;
mod lifecycle;
mod lists;
pub mod process;
pub mod proxy;
mod roster;
pub mod state_dir;
