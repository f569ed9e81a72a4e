//! What can be shared in a fleet. Pure.

use std::collections::{HashMap, HashSet};

use super::{Fingerprint, NEVER_TOUCHED, ZERO};
use crate::density::model::Oracle;

/// Where an engine would keep a content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Spot {
    /// In a layout that guests are mapped to as a whole: at this page number.
    Place(usize),
    /// Beside it, in the order of the guest that has it first.
    First { guest: usize, page: usize },
}

impl Spot {
    fn next(self) -> Spot {
        match self {
            Spot::Place(page) => Spot::Place(page + 1),
            Spot::First { guest, page } => Spot::First {
                guest,
                page: page + 1,
            },
        }
    }
}

/// Counts what the guests' pages, one list a guest, have in common.
pub fn count(fleet: &[Vec<Fingerprint>]) -> Oracle {
    let pages = || fleet.iter().flatten().copied();
    let mut copies: HashMap<Fingerprint, u64> = HashMap::new();
    for content in pages().filter(|&content| has_content(content)) {
        *copies.entry(content).or_default() += 1;
    }
    let shared_at = shared_places(fleet);
    let same_place_pages = shared_at.iter().flat_map(HashMap::values).sum();
    let most = shared_at.iter().filter_map(|guests| guests.values().max());
    let saved_by_place_pages = most.map(|guests| guests - 1).sum();
    let is_elsewhere = |page: usize, content: Fingerprint| {
        copies.get(&content).is_some_and(|&copies| copies > 1)
            && !shared_at[page].contains_key(&content)
    };
    let spots = spots(fleet, &shared_at, is_elsewhere);
    let (elsewhere_pages, elsewhere_runs) = runs(fleet, &spots, is_elsewhere);
    Oracle {
        guests: fleet.len() as u64,
        touched_pages: pages().filter(|&page| page != NEVER_TOUCHED).count() as u64,
        zero_pages: pages().filter(|&page| page == ZERO).count() as u64,
        unique_contents: copies.len() as u64,
        same_place_pages,
        saved_by_place_pages,
        elsewhere_pages,
        elsewhere_runs,
    }
}

fn has_content(page: Fingerprint) -> bool {
    page > ZERO
}

/// For each page number, the contents that two guests or more have there, and how many have them.
fn shared_places(fleet: &[Vec<Fingerprint>]) -> Vec<HashMap<Fingerprint, u64>> {
    let longest = fleet.iter().map(Vec::len).max().unwrap_or(0);
    let at = |page: usize| {
        let mut guests: HashMap<Fingerprint, u64> = HashMap::new();
        let here = fleet.iter().filter_map(|guest| guest.get(page).copied());
        for content in here.filter(|&content| has_content(content)) {
            *guests.entry(content).or_default() += 1;
        }
        guests.retain(|_, guests| *guests > 1);
        guests
    };
    (0..longest).map(at).collect()
}

/// Where each content is that some page has elsewhere only: all places, else the first page.
fn spots(
    fleet: &[Vec<Fingerprint>],
    shared_at: &[HashMap<Fingerprint, u64>],
    is_elsewhere: impl Fn(usize, Fingerprint) -> bool,
) -> HashMap<Fingerprint, HashSet<Spot>> {
    let mut spots: HashMap<Fingerprint, HashSet<Spot>> = HashMap::new();
    for (page, contents) in shared_at.iter().enumerate() {
        for &content in contents.keys() {
            spots.entry(content).or_default().insert(Spot::Place(page));
        }
    }
    for (guest, pages) in fleet.iter().enumerate() {
        for (page, &content) in pages.iter().enumerate() {
            if is_elsewhere(page, content) {
                let first = || HashSet::from([Spot::First { guest, page }]);
                spots.entry(content).or_insert_with(first);
            }
        }
    }
    spots
}

/// Pages that are shared elsewhere, and the runs of them whose contents lie one after the other
/// there too: one mapping can show a run.
fn runs(
    fleet: &[Vec<Fingerprint>],
    spots: &HashMap<Fingerprint, HashSet<Spot>>,
    is_elsewhere: impl Fn(usize, Fingerprint) -> bool,
) -> (u64, u64) {
    let (mut pages, mut runs) = (0, 0);
    for guest in fleet {
        // Where a run may go on; nowhere after a page that is not elsewhere.
        let mut next: HashSet<Spot> = HashSet::new();
        for (page, &content) in guest.iter().enumerate() {
            if !is_elsewhere(page, content) {
                next.clear();
                continue;
            }
            let here = &spots[&content];
            let going_on: HashSet<Spot> = here.intersection(&next).copied().collect();
            pages += 1;
            if going_on.is_empty() {
                runs += 1;
            }
            let ends = if going_on.is_empty() { here } else { &going_on };
            next = ends.iter().map(|spot| spot.next()).collect();
        }
    }
    (pages, runs)
}

impl Oracle {
    /// Pages that an ideal engine gives back for equal pages, zeros apart.
    pub fn ideal_saved_pages(&self) -> u64 {
        let with_content = self.touched_pages.saturating_sub(self.zero_pages);
        with_content.saturating_sub(self.unique_contents)
    }

    /// Pages that an ideal engine gives back, those of zeros included.
    pub fn ideal_given_back_pages(&self) -> u64 {
        self.ideal_saved_pages() + self.zero_pages
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_fleet_has_nothing() {
        assert_eq!(count(&[]), Oracle::default());
        let untouched = count(&[vec![0; 4], vec![0; 2]]);
        let expected = Oracle {
            guests: 2,
            ..Oracle::default()
        };
        assert_eq!(untouched, expected);
    }

    #[test]
    fn equal_guests_are_shared_by_place() {
        let guest = vec![10, 11, 1, 0, 12];
        let oracle = count(&[guest.clone(), guest.clone(), guest]);
        let expected = Oracle {
            guests: 3,
            touched_pages: 12,
            zero_pages: 3,
            unique_contents: 3,
            same_place_pages: 9,
            saved_by_place_pages: 6,
            elsewhere_pages: 0,
            elsewhere_runs: 0,
        };
        assert_eq!(oracle, expected);
        assert_eq!(oracle.ideal_saved_pages(), 6);
        assert_eq!(oracle.ideal_given_back_pages(), 9);
    }

    #[test]
    fn of_two_contents_at_one_place_the_more_common_one_is_kept() {
        let oracle = count(&[vec![10], vec![10], vec![10], vec![11], vec![11], vec![12]]);
        assert_eq!(oracle.same_place_pages, 5);
        assert_eq!(oracle.saved_by_place_pages, 2);
        assert_eq!(oracle.ideal_saved_pages(), 3);
    }

    #[test]
    fn moved_pages_are_elsewhere_in_the_runs_that_keep_their_order() {
        // Pages 10 to 13 are at places 0 to 3 of the first two; the third has them moved, and the
        // last of them apart from the rest.
        let guest = vec![10, 11, 12, 13, 0, 0];
        let moved = vec![20, 10, 11, 12, 21, 13];
        let oracle = count(&[guest.clone(), guest, moved]);
        assert_eq!((oracle.elsewhere_pages, oracle.elsewhere_runs), (4, 2));
        assert_eq!(oracle.same_place_pages, 8);
        assert_eq!(oracle.ideal_saved_pages(), 14 - 6);
    }

    #[test]
    fn neighbours_in_another_order_are_a_run_each() {
        let oracle = count(&[vec![10, 11, 0], vec![10, 11, 0], vec![0, 10, 10]]);
        assert_eq!((oracle.elsewhere_pages, oracle.elsewhere_runs), (2, 2));
    }

    #[test]
    fn a_content_that_one_guest_has_twice_is_elsewhere() {
        let oracle = count(&[vec![10, 0, 10], vec![11, 12, 13]]);
        assert_eq!((oracle.elsewhere_pages, oracle.elsewhere_runs), (2, 2));
        assert_eq!(oracle.same_place_pages, 0);
        assert_eq!(oracle.ideal_saved_pages(), 1);
    }

    #[test]
    fn zeros_are_never_shared_by_content() {
        let oracle = count(&[vec![1, 1], vec![1, 1]]);
        assert_eq!((oracle.zero_pages, oracle.unique_contents), (4, 0));
        assert_eq!((oracle.same_place_pages, oracle.elsewhere_pages), (0, 0));
    }

    /// Every page with a content that another page has too is in exactly one of the two.
    #[test]
    fn shared_pages_are_at_a_place_or_elsewhere() {
        let mut state = 7_u64;
        let mut random = |below: u64| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 33) % below
        };
        for _ in 0..200 {
            let fleet: Vec<Vec<u64>> = (0..3)
                .map(|_| (0..16).map(|_| random(12)).collect())
                .collect();
            let oracle = count(&fleet);
            let with_content = oracle.touched_pages - oracle.zero_pages;
            let mut copies: HashMap<u64, u64> = HashMap::new();
            for &page in fleet.iter().flatten().filter(|&&page| page > 1) {
                *copies.entry(page).or_default() += 1;
            }
            let alone = copies.values().filter(|&&copies| copies == 1).count() as u64;
            let shared = oracle.same_place_pages + oracle.elsewhere_pages;
            assert_eq!(shared, with_content - alone, "{fleet:?}");
            assert!(oracle.elsewhere_runs <= oracle.elsewhere_pages);
            assert!(
                oracle.saved_by_place_pages <= oracle.ideal_saved_pages(),
                "{fleet:?}"
            );
        }
    }
}
