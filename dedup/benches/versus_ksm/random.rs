//! A seeded generator, so that both engines and all rounds see the same memory.

#[derive(Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed | 1)
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 11).unwrap_or(0) % bound
    }

    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }

    /// The numbers from `from` to `to` cut into runs of 1 to `longest`, the runs shuffled.
    pub(crate) fn runs(&mut self, from: usize, to: usize, longest: usize) -> Vec<u64> {
        let mut runs = Vec::new();
        let mut next = from;
        while next < to {
            let end = to.min(next + 1 + self.below(longest));
            runs.push(next as u64 + 1..end as u64 + 1);
            next = end;
        }
        self.shuffle(&mut runs);
        runs.into_iter().flatten().collect()
    }
}
