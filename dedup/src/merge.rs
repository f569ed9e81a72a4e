//! The merge itself: group, protect, compare, apply; and what undoes it.

pub(crate) mod apply;
pub(crate) mod base_block;
pub(crate) mod discard;
pub(crate) mod domain;
pub(crate) mod fill;
pub(crate) mod group;
pub(crate) mod huge;
pub(crate) mod partners;
pub(crate) mod pin;
pub(crate) mod plan;
pub(crate) mod planned;
pub(crate) mod protected;
pub(crate) mod reclaim;
pub(crate) mod tuning;
pub(crate) mod unmerge;
