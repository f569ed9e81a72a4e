//! From which on a step of merging is worth it, unless the settings say otherwise.

use crate::base::page::HUGE_PAGE_PAGES;

/// Mappings in a block of 512 pages below which it is left alone: building it anew takes as long as
/// merging a thousand pages.
pub(crate) const HEAL_VMAS_MIN: u32 = 16;

/// Shareable pages of a huge page's 512 from which on it is split, unless the settings say
/// otherwise: half of it must come back.
pub(crate) const HUGE_PAGE_SHARED_PAGES_MIN: u32 = HUGE_PAGE_PAGES / 2;

/// Pages of a block that must equal their places before it is based: building it aside takes as long
/// as merging some hundred pages.
pub(crate) const BASE_PAGES_MIN: u32 = 8;
