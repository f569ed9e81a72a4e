//! A seeded shuffle of `0..len` that needs no table.

use crate::content::mix;

const ROUNDS: u64 = 4;

/// A permutation of `0..len`, both ways in constant time on average.
///
/// A Feistel network over the next even number of bits; values beyond `len` are fed back until they
/// fall inside (fewer than 4 turns on average). An affine map `a*i + b mod len` would be shorter, but
/// there two VMs can differ by a rotation alone, which leaves long runs where none are wanted.
#[derive(Debug, Clone, Copy)]
pub struct Permutation {
    len: u64,
    seed: u64,
    half_bits: u32,
}

impl Permutation {
    /// The permutation of `0..len` that belongs to `seed`.
    #[must_use]
    pub const fn new(len: u64, seed: u64) -> Permutation {
        let bits = u64::BITS - len.saturating_sub(1).leading_zeros();
        let half_bits = if bits < 2 { 1 } else { bits.div_ceil(2) };
        Permutation {
            len,
            seed,
            half_bits,
        }
    }

    /// Where `index` goes. An index beyond the length stays where it is.
    #[must_use]
    pub fn apply(&self, index: u64) -> u64 {
        self.walk(index, |block| {
            (0..ROUNDS).fold(block, |(left, right), round| {
                (right, left ^ self.round(round, right))
            })
        })
    }

    /// The index that [`apply`](Self::apply) takes to `index`.
    #[must_use]
    pub fn invert(&self, index: u64) -> u64 {
        self.walk(index, |block| {
            (0..ROUNDS).rev().fold(block, |(left, right), round| {
                (right ^ self.round(round, left), left)
            })
        })
    }

    fn walk(&self, index: u64, network: impl Fn((u64, u64)) -> (u64, u64)) -> u64 {
        if index >= self.len {
            return index;
        }
        let mut value = index;
        loop {
            let (left, right) = network((value >> self.half_bits, value & self.half_mask()));
            value = left << self.half_bits | right;
            if value < self.len {
                return value;
            }
        }
    }

    const fn round(&self, round: u64, half: u64) -> u64 {
        mix(self.seed.wrapping_add(round << 56).wrapping_add(half)) & self.half_mask()
    }

    const fn half_mask(&self) -> u64 {
        (1 << self.half_bits) - 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec;

    proptest! {
        #[test]
        fn every_index_is_hit_once_and_found_again(len in 0u64..2000, seed: u64) {
            let permutation = Permutation::new(len, seed);
            let mut hit = vec![false; usize::try_from(len).unwrap()];
            for index in 0..len {
                let to = permutation.apply(index);
                prop_assert!(to < len);
                prop_assert!(!core::mem::replace(&mut hit[usize::try_from(to).unwrap()], true));
                prop_assert_eq!(permutation.invert(to), index);
            }
            prop_assert_eq!(permutation.apply(len), len);
        }
    }

    #[test]
    fn large_lengths_keep_neighbours_apart() {
        let permutation = Permutation::new(1 << 20, 5);
        let neighbours = (0..10_000)
            .filter(|&i| permutation.apply(i + 1) == permutation.apply(i).wrapping_add(1))
            .count();
        assert!(neighbours < 10, "{neighbours}");
    }
}
