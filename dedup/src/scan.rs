//! One window of a region: what became of its pages, and what to merge.

pub(crate) mod tracked;
pub(crate) mod visit;
