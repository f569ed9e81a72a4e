//! The words of a page.

/// 64-bit words in a page of 4 KiB.
pub const WORDS_PER_PAGE: usize = 512;

/// Odd, so that `index * WORD_STRIDE` visits distinct values (2^64 / golden ratio).
const WORD_STRIDE: u64 = 0x9e37_79b9_7f4a_7c15;
const SHARED_TAG: u64 = 0x5348_4152_4544_0001;
const OWN_TAG: u64 = 0x4f57_4e00_0000_0001;

/// Everything a page can hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Content {
    /// All words are zero.
    Zero,
    /// Words made from this key; different keys differ in every word.
    Generated(u64),
}

/// The first word that is not what it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mismatch {
    /// Index of the word in the page.
    pub word: usize,
    /// What was read.
    pub found: u64,
    /// What was written last.
    pub expected: u64,
}

impl Content {
    /// Content number `id`, the same in every VM.
    #[must_use]
    pub const fn shared(id: u64) -> Content {
        Content::Generated(mix(mix(SHARED_TAG).wrapping_add(id)))
    }

    /// Content that only page `page` of the VM with this seed has, in its version `version`.
    #[must_use]
    pub const fn own(seed: u64, page: u64, version: u64) -> Content {
        let vm = mix(mix(OWN_TAG).wrapping_add(seed));
        Content::Generated(mix(mix(vm.wrapping_add(page)).wrapping_add(version)))
    }

    /// Word `index` of the page. The whole page costs about one multiplication a word.
    #[inline]
    #[must_use]
    pub const fn word(self, index: usize) -> u64 {
        match self {
            Content::Zero => 0,
            // `mix` maps distinct keys to distinct words, so equal words mean equal keys.
            Content::Generated(key) => {
                mix_word(key.wrapping_add((index as u64).wrapping_mul(WORD_STRIDE)))
            }
        }
    }

    /// Hands every word to `store`, in order.
    #[inline]
    pub fn write(self, mut store: impl FnMut(usize, u64)) {
        for index in 0..WORDS_PER_PAGE {
            store(index, self.word(index));
        }
    }

    /// Compares all words of a page, read by `load`, with what they should be.
    ///
    /// # Errors
    /// The first word that differs.
    #[inline]
    pub fn verify(self, mut load: impl FnMut(usize) -> u64) -> Result<(), Mismatch> {
        for word in 0..WORDS_PER_PAGE {
            let (found, expected) = (load(word), self.word(word));
            if found != expected {
                return Err(Mismatch {
                    word,
                    found,
                    expected,
                });
            }
        }
        Ok(())
    }
}

/// Finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection whose every output bit depends on
/// every input bit. For keys, of which there is one a page.
pub(crate) const fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(WORD_STRIDE);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// A cheaper bijection for the words: a guest makes 512 of them for each page it verifies.
#[inline]
const fn mix_word(value: u64) -> u64 {
    let value = (value ^ (value >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    value ^ (value >> 32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::vec::Vec;

    fn page(content: Content) -> Vec<u64> {
        let mut words = Vec::new();
        content.write(|_, word| words.push(word));
        words
    }

    #[test]
    fn written_page_verifies() {
        for content in [Content::Zero, Content::shared(3), Content::own(1, 2, 3)] {
            let words = page(content);
            assert_eq!(content.verify(|index| words[index]), Ok(()));
        }
    }

    #[test]
    fn one_flipped_bit_in_the_last_word_is_found() {
        let content = Content::own(7, 9, 0);
        let mut words = page(content);
        words[WORDS_PER_PAGE - 1] ^= 1;
        let mismatch = content.verify(|index| words[index]).unwrap_err();
        assert_eq!(mismatch.word, WORDS_PER_PAGE - 1);
        assert_eq!(mismatch.found ^ mismatch.expected, 1);
    }

    #[test]
    fn pages_of_different_origin_differ_in_their_first_word() {
        let mut first_words = HashSet::new();
        for id in 0..1000 {
            assert!(first_words.insert(Content::shared(id).word(0)));
            for seed in 0..4 {
                assert!(first_words.insert(Content::own(seed, id, 0).word(0)));
                assert!(first_words.insert(Content::own(seed, id, 1).word(0)));
            }
        }
        assert!(!first_words.contains(&0));
    }
}
