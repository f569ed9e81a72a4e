//! Samepage: vmm.

pub mod bus;
pub mod events;
pub mod memory;
mod panics;
pub mod virtio;
