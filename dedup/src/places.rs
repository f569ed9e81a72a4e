//! Guesses: which page a page is likely to be equal to.
//!
//! VMs born from one image hold the same content at the same place, and content that moved mostly
//! moved in runs. A right guess is compared under protection at once, so the page is read once
//! instead of twice, and not hashed at all. What a guess is made of is known anyway: the items of
//! the regions that shared last, or for the founding of stable pages, of those whose pages were last
//! left in the unstable index. A table of what was shared at each place was rejected: 4 bytes a
//! page, which count against what is saved.

use crate::region::RegionId;

/// Regions that are remembered: fleets of so many images can come up at the same time.
const REMEMBERED: usize = 2;

/// The regions that something was last done with, the latest first.
#[derive(Debug, Default)]
pub(crate) struct Places {
    recent: [Option<RegionId>; REMEMBERED],
}

impl Places {
    /// It was done with pages of a region.
    pub(crate) fn note(&mut self, id: RegionId) {
        if self.recent[0] == Some(id) {
            return;
        }
        let known = self.recent.iter().position(|&recent| recent == Some(id));
        self.recent[..=known.unwrap_or(REMEMBERED - 1)].rotate_right(1);
        self.recent[0] = Some(id);
    }

    /// The regions, the latest first. They may have left since.
    pub(crate) fn recent(&self) -> impl Iterator<Item = RegionId> {
        self.recent.into_iter().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_regions_are_remembered_each_once() {
        let mut places = Places::default();
        let recent = |places: &Places| places.recent().map(|id| id.0).collect::<Vec<_>>();
        for id in [1, 1, 2, 1] {
            places.note(RegionId(id));
        }
        assert_eq!(recent(&places), [1, 2]);
        places.note(RegionId(3));
        assert_eq!(recent(&places), [3, 1]);
    }
}
