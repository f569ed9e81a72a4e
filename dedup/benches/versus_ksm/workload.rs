//! What memory holds: for each region the content of each page, and what an oracle makes of it.

use std::collections::HashMap;

use crate::random::Random;

/// The content of a page, by number; 0 is a page of zeros.
pub(crate) type Content = u64;

/// Contents of all regions.
#[derive(Debug, Clone)]
pub(crate) struct Workload {
    pub(crate) regions: Vec<Vec<Content>>,
    /// Whether the memory is in transparent huge pages before anything is merged.
    pub(crate) has_huge_pages: bool,
}

/// What the contents allow to be shared.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Oracle {
    /// Pages that need not be there: zeros, and copies beyond the first.
    pub(crate) duplicate_pages: u64,
}

const UNIQUE: u64 = 1 << 40;

impl Workload {
    /// Same content, same place.
    pub(crate) fn clones(regions: usize, pages: usize) -> Workload {
        Workload {
            regions: vec![(1..=pages as u64).collect(); regions],
            has_huge_pages: false,
        }
    }

    /// The same, and one region more of which no page has an equal.
    pub(crate) fn with_a_stranger(mut self) -> Workload {
        let pages = self.regions[0].len() as u64;
        self.regions
            .push((0..pages).map(|page| UNIQUE + page).collect());
        self
    }

    /// The same in transparent huge pages.
    pub(crate) fn huge(self) -> Workload {
        Workload {
            has_huge_pages: true,
            ..self
        }
    }

    /// Same content, every page elsewhere.
    pub(crate) fn shuffled(regions: usize, pages: usize) -> Workload {
        let mut random = Random::new(7);
        let regions = (0..regions)
            .map(|_| {
                let mut contents: Vec<Content> = (1..=pages as u64).collect();
                random.shuffle(&mut contents);
                contents
            })
            .collect();
        Workload {
            regions,
            has_huge_pages: false,
        }
    }

    /// VMs of one image: 25 % zeros, 45 % same place, 15 % elsewhere in runs of 1 to 32, 15 % unique.
    pub(crate) fn image(regions: usize, pages: usize) -> Workload {
        let mut random = Random::new(11);
        let moved_from = pages * 85 / 100;
        let regions = (0..regions)
            .map(|region| {
                let mut contents: Vec<Content> = (0..pages)
                    .map(|page| match page * 100 / pages {
                        0..25 => 0,
                        25..70 => page as u64 + 1,
                        70..85 => 0,
                        _ => UNIQUE * (region as u64 + 1) + page as u64,
                    })
                    .collect();
                let moved = random.runs(pages * 70 / 100, moved_from, 32);
                contents[pages * 70 / 100..moved_from].copy_from_slice(&moved);
                contents
            })
            .collect();
        Workload {
            regions,
            has_huge_pages: false,
        }
    }

    /// Half of the pages, at random, are zeros; no other page has an equal.
    pub(crate) fn zeros(regions: usize, pages: usize) -> Workload {
        let mut random = Random::new(13);
        let regions = (0..regions)
            .map(|region| {
                (0..pages)
                    .map(|page| match random.below(2) {
                        0 => 0,
                        _ => UNIQUE * (region as u64 + 1) + page as u64,
                    })
                    .collect()
            })
            .collect();
        Workload {
            regions,
            has_huge_pages: false,
        }
    }

    /// Same content, same place, but each page is unique to its region with a probability of 10 %.
    pub(crate) fn patchy(regions: usize, pages: usize) -> Workload {
        let mut random = Random::new(13);
        let regions = (0..regions as u64)
            .map(|region| {
                let content = |page| match random.below(10) {
                    0 => UNIQUE * (region + 1) + page,
                    _ => page + 1,
                };
                (0..pages as u64).map(content).collect()
            })
            .collect();
        Workload {
            regions,
            has_huge_pages: false,
        }
    }

    pub(crate) fn oracle(&self) -> Oracle {
        let mut copies: HashMap<Content, u64> = HashMap::new();
        for &content in self.regions.iter().flatten() {
            *copies.entry(content).or_default() += 1;
        }
        let zero_pages = copies.remove(&0).unwrap_or(0);
        let shared = copies.values().filter(|&&count| count > 1);
        Oracle {
            duplicate_pages: zero_pages + shared.map(|count| count - 1).sum::<u64>(),
        }
    }
}

/// Writes a page's content.
pub(crate) fn fill(page: &mut [u64], content: Content) {
    let mut word = content.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for slot in page {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        *slot = word;
    }
}
