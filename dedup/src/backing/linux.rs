//! The kernel behind the engine: reserved ranges, a memfd as pool, userfaultfd write protection.

pub(crate) mod check;
mod memory;
pub(crate) mod pagemap;
mod pool;
mod replace;
mod staging;
mod urgent;
mod userfaultfd;

pub(crate) use memory::LinuxMemory;
pub(crate) use pool::{LinuxPool, allocated_pages};
pub(crate) use urgent::Urgent;
pub(crate) use userfaultfd::Userfaultfd;
