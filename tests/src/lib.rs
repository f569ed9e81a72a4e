//! What Samepage's integration tests have in common.
//!
//! | module | holds |
//! |---|---|
//! | [`binary`] | the `samepage` binary under test |
//! | [`cgroup`] | a memory cgroup with a limit |
//! | [`density`] | the density benchmark, `cargo run --release -p samepage-tests --bin density` |
//! | [`server`] | a server process that ends with its test |
//! | [`domains`] | a server whose merge domains are processes |
//! | [`guest_memory`] | guests' memory, read out of the server for an oracle |
//! | [`guests`] | VMs in a monitor of the test's own process |
//! | [`http`] | HTTP as bytes, independent of our own client |
//! | [`debian`] | the Debian guest, the program in it and what that prints |
//! | [`linux`] | the Linux guest and its console |
//! | [`disk_storm`] | a guest that reads its disks into untouched memory |
//! | [`ksm`] | kernel KSM, for one test at a time |
//! | [`kvm`] | whether VMs can run here |
//! | [`refusal`] | requests that the API must refuse |
//! | [`tiny_kernel`] | guests of a few bytes |
//! | [`proc`] | what a process holds: threads, descriptors, mappings, memfd pages |
//! | [`wait`] | waiting for a condition, with a deadline |
//!
//! # Locks
//! None.

pub mod binary;
pub mod cgroup;
pub mod debian;
pub mod density;
pub mod disk_storm;
pub mod domains;
pub mod guest_memory;
pub mod guests;
pub mod http;
pub mod ksm;
pub mod kvm;
pub mod linux;
pub mod proc;
pub mod refusal;
pub mod server;
pub mod tiny_kernel;
pub mod wait;
