//! The host's part of the benchmark: settings that a run changes and puts back, the cgroup that it
//! is measured in, and looks at the server from outside.
//!
//! | module | holds |
//! |---|---|
//! | [`error`] | why the host does not do what is asked |
//! | [`setting`] | one host setting: its file, reading and writing |
//! | [`journal`] | what has to be undone after a kill, on disk before it is done |
//! | [`settings`] | the host's settings during a run, put back at its end |
//! | [`left_over`] | undoing what a run did, or what a killed run left behind |
//! | [`group`] | the memory cgroup of a run |
//! | [`threads`] | CPU and context switches, by thread |
//! | [`sampler`] | looks at memory and CPU of a server |
//! | [`mmap_lock`] | waits on the server's mmap lock |
//! | `tracepoint` | tracepoints of the kernel, counted and sampled |
//! | `perf_filter` | filters of tracepoints |
//! | [`machine`] | what the machine is, and how fast its memory is |

pub mod error;
pub mod group;
pub mod journal;
pub mod left_over;
pub mod machine;
pub mod mmap_lock;
#[expect(
    unsafe_code,
    reason = "one ioctl that the crate for perf events has no call for"
)]
pub(crate) mod perf_filter;
pub mod sampler;
pub mod setting;
pub mod settings;
pub mod threads;
pub(crate) mod tracepoint;

pub use error::HostError;
pub use group::Group;
pub use left_over::{Restored, restore_left_over};
pub use mmap_lock::MmapLockWatch;
pub use sampler::{Detail, Sampler};
pub use setting::Setting;
pub use settings::HostSettings;
