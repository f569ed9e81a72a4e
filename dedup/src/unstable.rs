//! Calm pages that found no equal yet, by fingerprint: KSM's unstable tree, as a hash index.
//!
//! Weak knowledge: the content may change at any time, so a partner found here is compared under
//! protection. A page of a region without a dirty source is known for one pass only; a page of a
//! watched region until it is written to, which shows in its item.

use crate::fingerprint::Fingerprint;
use crate::keyed::FingerprintMap;
use crate::region::RegionId;

/// Entries that may be stale before it is worth looking for them.
const STALE_ENTRIES_MIN: usize = 4096;

type Entries = FingerprintMap<(RegionId, u32)>;

/// The index.
#[derive(Debug, Default)]
pub(crate) struct Unstable {
    /// Of regions without a source; emptied after each pass.
    passing: Entries,
    /// Of watched regions.
    lasting: Entries,
    /// Of watched regions' huge pages that are not worth splitting yet, whose equals are known in
    /// `lasting`: whichever side is looked at again finds the other.
    left_out: Entries,
    /// Size of `lasting` when it was last freed of stale entries.
    lasting_fresh: usize,
}

impl Unstable {
    /// Takes the pages with this fingerprint out, up to one that is a partner.
    pub(crate) fn take_partner(
        &mut self,
        fingerprint: Fingerprint,
        is_partner: impl Fn(&(RegionId, u32)) -> bool,
    ) -> Option<(RegionId, u32)> {
        [&mut self.lasting, &mut self.passing, &mut self.left_out]
            .into_iter()
            .filter_map(|entries| entries.remove(&fingerprint))
            .find(is_partner)
    }

    /// Keeps a page of a watched region that has an equal in the index already.
    pub(crate) fn leave_out(&mut self, fingerprint: Fingerprint, page: (RegionId, u32)) {
        self.left_out.insert(fingerprint, page);
    }

    /// Puts a page in, in place of an older one of the same fingerprint.
    pub(crate) fn insert(
        &mut self,
        fingerprint: Fingerprint,
        page: (RegionId, u32),
        watched: bool,
    ) {
        let entries = if watched {
            &mut self.lasting
        } else {
            &mut self.passing
        };
        entries.insert(fingerprint, page);
    }

    /// Ends a pass. `is_valid` tells whether a page is still calm and alone, by its item.
    pub(crate) fn end_pass(&mut self, is_valid: impl Fn(RegionId, u32, u32) -> bool) {
        self.passing.clear();
        if self.lasting.len() + self.left_out.len() > 2 * self.lasting_fresh + STALE_ENTRIES_MIN {
            for entries in [&mut self.lasting, &mut self.left_out] {
                entries.retain(|fingerprint, &mut (id, page)| {
                    is_valid(id, page, fingerprint.checksum())
                });
            }
            self.lasting_fresh = self.lasting.len() + self.left_out.len();
        }
        for entries in [&mut self.passing, &mut self.lasting, &mut self.left_out] {
            // Room counts against what is saved; a table as full as this one is not rebuilt soon.
            if entries.capacity() > 3 * entries.len() + STALE_ENTRIES_MIN {
                entries.shrink_to(entries.len() + entries.len() / 2);
            }
        }
    }

    /// Forgets every page.
    pub(crate) fn forget_all(&mut self) {
        *self = Unstable::default();
    }

    pub(crate) fn metadata_bytes(&self) -> u64 {
        let entry_bytes = size_of::<(Fingerprint, (RegionId, u32))>() + 1;
        let entries = [&self.passing, &self.lasting, &self.left_out];
        let capacity: usize = entries.map(|entries| entries.capacity()).iter().sum();
        (capacity * entry_bytes) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_without_a_source_are_known_for_one_pass() {
        let mut unstable = Unstable::default();
        unstable.insert(Fingerprint(1), (RegionId(1), 1), false);
        unstable.insert(Fingerprint(2), (RegionId(2), 2), true);
        unstable.end_pass(|_, _, _| true);
        assert_eq!(unstable.take_partner(Fingerprint(1), |_| true), None);
        let other = Some((RegionId(2), 2));
        assert_eq!(unstable.take_partner(Fingerprint(2), |_| true), other);
        assert_eq!(unstable.take_partner(Fingerprint(2), |_| true), None);
    }

    #[test]
    fn of_two_equal_pages_that_are_left_out_each_finds_the_other() {
        let (one, other) = ((RegionId(1), 1), (RegionId(2), 2));
        for (looking, found) in [(one, other), (other, one)] {
            let mut unstable = Unstable::default();
            unstable.insert(Fingerprint(1), one, true);
            unstable.leave_out(Fingerprint(1), other);
            let partner = unstable.take_partner(Fingerprint(1), |&page| page != looking);
            assert_eq!(partner, Some(found));
        }
    }

    #[test]
    fn stale_entries_do_not_pile_up() {
        let mut unstable = Unstable::default();
        for number in 0..10 * STALE_ENTRIES_MIN as u64 {
            unstable.insert(Fingerprint(number), (RegionId(1), 1), true);
            unstable.end_pass(|_, _, _| false);
        }
        assert!(unstable.lasting.len() <= STALE_ENTRIES_MIN + 1);
    }
}
