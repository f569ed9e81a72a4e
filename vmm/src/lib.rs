//! Samepage: vmm.

pub mod boot;
pub mod bus;
pub mod config;
pub mod console;
mod device;
mod drives;
pub mod error;
pub mod events;
pub mod id;
pub mod info;
mod kvm;
mod machine;
pub mod memory;
pub mod monitor;
mod panics;
mod reaper;
pub mod start;
pub mod state;
pub mod virtio;
mod vm;

pub use config::VmConfig;
pub use console::{Console, ConsoleRead, ConsoleReader};
pub use error::{ErrorKind, MonitorError};
pub use id::{MergeDomain, VmId};
pub use info::{GuestReport, VmInfo};
pub use monitor::Monitor;
pub use state::{EndReason, VmState};
