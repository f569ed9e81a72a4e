//! Samepage's front door: the REST server, its client and the command line.
//!
//! Firecracker's API knows one VM per process, and with one VM there is nothing to share. This
//! crate is that API times N: `/vms/{id}` in front of Firecracker's paths, and `/merge` beside
//! them for what the VMs share.
//!
//! # Guarantees
//! - VMs share pages only if both their configs name the same `merge_domain`.
//! - Every error is `{"fault_message": ...}`; a request that was refused changed nothing.
//! - The socket is never open to other users, and a live server is never pushed off it.
//! - When the server goes, its VMs, threads and socket go with it.
//!
//! # Modules
//! | module | holds |
//! |---|---|
//! | [`route`], [`request`] | method, path and body to a [`request::Request`]; pure |
//! | [`domain_name`] | how paths and replies name a merge domain |
//! | [`domains`] | merge domains as processes: started, found again, asked |
//! | [`front_door`] | which monitor serves which VM, and what each request does there |
//! | [`merge_report`] | what is told of merging, by the engine and by kernel KSM |
//! | [`reply`], [`fault`], [`model`] | answers, in the shape of Firecracker's server |
//! | [`server`], [`socket`], [`request_body`], [`console_stream`] | the unix socket and HTTP on it |
//! | [`vm_sockets`], [`firecracker`] | a socket for each VM, and Firecracker's replies on it |
//! | [`telemetry`] | Firecracker's log and metrics of each VM |
//! | [`console_tails`] | what consoles showed last, for when their monitor is gone |
//! | [`connections`], [`places`] | how many connections there may be, and requests in hand at a time |
//! | [`wire`], [`http10`], [`unreadable`] | where hyper's bytes differ from Firecracker's |
//! | [`client`] | the other end of it |
//! | [`cli`], [`command`] | the command line: arguments, and a module for each command |
//! | `fuzzing` | any bytes at all, for fuzz targets |
//! | [`doctor`] | whether a host is fit, and how to mend it |
//! | [`vm_args`] | the arguments that describe a VM, and the config they make |
//! | [`lock_down`] | what a monitor gives up before it begins |
//! | [`limits`], [`signals`] | of the process: open files, sizes of files; what ends it |
//! | [`terminal`], [`table`], [`bytes`], [`note`] | the user's side: keys in, columns, sizes and words out |
//! | [`spool`] | files that nobody waits for: the log, and what [`telemetry`] writes |
//!
//! # Locks
//! The VMs' sockets are under a lock that the backend's roster is taken under, see [`vm_sockets`]. Those
//! of [`telemetry`] have those of [`spool`] below them, which are leaves. Else three of our own,
//! `FrontDoor`'s roster, its lock of patches and its places, one at a time; see [`front_door`]. Where
//! domains are processes there is none of these but a gateway's, in its order: a domain's `monitor`,
//! then the roster; see [`domains::gateway`].
//! No lock of a monitor is taken under the roster but those inside `Monitor::new`, and under the
//! other only the engine's control.
//!
//! # Threads
//! hyper and console streams run on tokio's threads; whatever may block (a VM's start, an unmerge)
//! runs on tokio's blocking threads: at most one for each connection.

#![forbid(unsafe_code)]
#![warn(clippy::print_stdout, clippy::print_stderr)]

pub mod bytes;
pub mod cli;
pub mod client;
pub mod command;
pub mod connections;
pub mod console_stream;
pub mod console_tails;
pub mod doctor;
pub mod domain_name;
pub mod domains;
pub mod fault;
pub mod firecracker;
pub mod front_door;
#[cfg(test)]
#[path = "../../tests/fuzz/seeds.rs"]
mod fuzz_seeds;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod http10;
pub mod limits;
pub mod lock_down;
pub mod merge_report;
pub mod model;
pub mod note;
pub mod places;
pub mod reply;
pub mod request;
pub mod request_body;
pub mod route;
pub mod server;
pub mod signals;
pub mod socket;
pub mod spool;
pub mod table;
pub mod telemetry;
pub mod terminal;
pub mod unreadable;
pub mod vm_args;
pub mod vm_sockets;
pub mod wire;

/// The OpenAPI document of this API, as `GET /openapi.json` serves it.
pub const OPENAPI_JSON: &str = include_str!("../../resources/openapi.json");
