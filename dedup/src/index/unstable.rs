//! Calm pages that found no equal yet, by fingerprint: KSM's unstable tree, as a hash index.
//!
//! Weak knowledge: the content may change at any time, so a partner found here is compared under
//! protection. A page of a region without a dirty source is known for one pass only; a page of a
//! watched region until it is written to, which shows in its item.

use crate::index::fingerprint::Fingerprint;
use crate::index::prehashed::FingerprintMap;
use crate::pages::region::RegionId;

/// Entries that may be stale before it is worth looking for them.
const STALE_ENTRIES_MIN: usize = 4096;

type Entries = FingerprintMap<(RegionId, u32)>;

/// Entries that fit into what is allocated, seven in eight places. What the map calls its capacity
/// leaves out the places of entries that were taken out, until it is rebuilt.
fn room(entries: &Entries) -> usize {
    let place_bytes = size_of::<(Fingerprint, (RegionId, u32))>() + 1;
    entries.allocation_size() / place_bytes / 8 * 7
}

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
    /// Takes a page with this fingerprint out that is a partner. The others stay: one may be that of a pair
    /// which is not merged in the end.
    pub(crate) fn take_partner(
        &mut self,
        fingerprint: Fingerprint,
        is_partner: impl Fn(&(RegionId, u32)) -> bool,
    ) -> Option<(RegionId, u32)> {
        let entries = [&mut self.lasting, &mut self.passing, &mut self.left_out];
        let mut holding = entries.into_iter().filter(|entries| {
            let known = entries.get(&fingerprint);
            known.is_some_and(&is_partner)
        });
        holding.next()?.remove(&fingerprint)
    }

    /// A page other than this that is known by a fingerprint.
    pub(crate) fn another(
        &self,
        fingerprint: Fingerprint,
        page: (RegionId, u32),
    ) -> Option<(RegionId, u32)> {
        let entries = [&self.passing, &self.lasting, &self.left_out].into_iter();
        let known = entries.filter_map(|entries| entries.get(&fingerprint).copied());
        known.into_iter().find(|&known| known != page)
    }

    /// The page of a watched region that is known by a fingerprint, if it is the only one, and not this.
    pub(crate) fn only_other(
        &self,
        fingerprint: Fingerprint,
        page: (RegionId, u32),
    ) -> Option<(RegionId, u32)> {
        let mut others = [&self.passing, &self.left_out].into_iter();
        let is_only = !others.any(|entries| entries.contains_key(&fingerprint));
        let known = self.lasting.get(&fingerprint).copied();
        known.filter(|&known| is_only && known != page)
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
        let lasting = self.lasting.len() + self.left_out.len();
        if lasting > 2 * self.lasting_fresh + STALE_ENTRIES_MIN {
            for entries in [&mut self.lasting, &mut self.left_out] {
                entries.retain(|fingerprint, &mut (id, page)| {
                    is_valid(id, page, fingerprint.checksum())
                });
            }
            self.lasting_fresh = self.lasting.len() + self.left_out.len();
        }
        for entries in [&mut self.passing, &mut self.lasting, &mut self.left_out] {
            // Room counts against what is saved. Half of it is too little again only once there are
            // an eighth more.
            let wanted = entries.len() + entries.len() / 8;
            if room(entries) > 2 * wanted {
                entries.shrink_to(wanted);
            }
        }
    }

    /// Forgets every page.
    pub(crate) fn forget_all(&mut self) {
        *self = Unstable::default();
    }

    pub(crate) fn metadata_bytes(&self) -> u64 {
        let entries = [&self.passing, &self.lasting, &self.left_out];
        let allocated = entries.map(|entries| entries.allocation_size());
        allocated.iter().sum::<usize>() as u64
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
    fn a_page_that_is_no_partner_stays_known() {
        let page = (RegionId(1), 1);
        let mut unstable = Unstable::default();
        unstable.insert(Fingerprint(1), page, true);
        assert_eq!(unstable.take_partner(Fingerprint(1), |_| false), None);
        assert_eq!(unstable.take_partner(Fingerprint(1), |_| true), Some(page));
    }

    #[test]
    fn room_of_entries_that_were_taken_out_is_counted_until_it_is_given_back() {
        const ENTRIES: u64 = 7 << 11;
        let mut unstable = Unstable::default();
        let scattered = |number: u64| Fingerprint(number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        for number in 0..ENTRIES {
            unstable.insert(scattered(number), (RegionId(1), 1), true);
        }
        let full_bytes = unstable.metadata_bytes();
        for number in 100..ENTRIES {
            unstable.take_partner(scattered(number), |_| true);
        }
        assert_eq!(unstable.metadata_bytes(), full_bytes);
        unstable.end_pass(|_, _, _| true);
        assert!(unstable.metadata_bytes() < full_bytes / 50);
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
