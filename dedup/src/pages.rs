//! What is known of a region's pages, and a region with its lock.

pub(crate) mod backoff;
pub(crate) mod dirty;
pub(crate) mod item;
pub(crate) mod pins;
pub(crate) mod region;
pub(crate) mod region_items;
