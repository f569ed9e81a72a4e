//! `merge now`: one region scanned at once, for a VM that has just been filled (UPM's idea).
//!
//! The caller's own thread scans, in turns with the worker. Nobody knows better than the caller
//! that the region has calmed, so its pages are looked at three times in a row, with no interval between,
//! and none is put off.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::backing::Backing;
use crate::base::sync;
use crate::merge::domain::Scanner;
use crate::pages::region::RegionRef;
use crate::protocol::control::Run;
use crate::protocol::core::Shared;
use crate::protocol::scan_state::{Visited, Work};

/// The first look finds what was written to since the last pass; what is left alone between the
/// first and the second is calm; what equals a page at another place then is mapped at the third.
const LOOKS: u32 = 3;

/// What a `merge now` came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MergedNow {
    /// Page visits.
    pub pages_scanned: u64,
    /// Pages of the region that are mapped to a stable page now.
    pub pages_merging: u64,
    /// Pages of the region that are given back now because they held only zeros.
    pub pages_zero: u64,
    /// By how many pages those two grew; negative if the guest wrote to more than was merged.
    pub pages_gained: i64,
    /// Pages that were written to all the while: the worker goes on with them.
    pub pages_volatile: u64,
    /// How long it took, in microseconds.
    pub duration_us: u64,
}

/// Why a region was not merged at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum MergeNowError {
    /// The engine was told not to merge, before or meanwhile.
    #[error("run is not merge")]
    NotMerging,
    /// The memory is being given back.
    #[error("its memory is being given back")]
    Exiting,
}

impl<B: Backing + std::fmt::Debug> Shared<Scanner<B>> {
    /// Scans a region at once.
    pub(crate) fn merge_now(&self, region: &RegionRef<B>) -> Result<MergedNow, MergeNowError> {
        let begun = Instant::now();
        let merged_pages = || {
            let stats = *sync::lock(&region.stats);
            (stats.pages_merging, stats.pages_zero)
        };
        let before = merged_pages();
        let mut pages_scanned = 0;
        for _ in 0..LOOKS {
            let mut next = Some(0);
            while let Some(page) = next {
                let visited = self.turn(region, page)?;
                pages_scanned += u64::from(visited.pages);
                next = visited.next;
            }
        }
        let (after, stats) = (merged_pages(), *sync::lock(&region.stats));
        let signed =
            |(merging, zero): (u64, u64)| i64::try_from(merging + zero).unwrap_or(i64::MAX);
        Ok(MergedNow {
            pages_scanned,
            pages_merging: after.0,
            pages_zero: after.1,
            pages_gained: signed(after) - signed(before),
            pages_volatile: stats.pages_volatile,
            duration_us: as_micros(begun.elapsed()),
        })
    }
}

impl<W: Work> Shared<W> {
    /// Visits the next window from `next` on. Gives up the worker mutex afterwards, so that the
    /// worker, an unmerge, or an exit wait for one window at most.
    pub(crate) fn turn(
        &self,
        region: &RegionRef<W::Memory>,
        page: u32,
    ) -> Result<Visited, MergeNowError> {
        let mut scanner = self.lock_scanner_in_turn();
        // Lock order: worker mutex -> control, released at once.
        if sync::lock(&self.control).run != Run::Merge {
            return Err(MergeNowError::NotMerging);
        }
        let visited = self.take_turn(&mut scanner, region, |scanner, inside| {
            // Each batch says anew whether it hurries.
            scanner.set_hurried(true, false);
            let visited = scanner.visit(inside, page);
            scanner.set_hurried(false, false);
            visited
        });
        let visited = visited.ok_or(MergeNowError::Exiting)?;
        self.publish(&scanner);
        Ok(visited)
    }
}

fn as_micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
