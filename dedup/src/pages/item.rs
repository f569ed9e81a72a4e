//! What the engine remembers of one guest page, in 8 bytes (KSM's `rmap_item` takes 64).

use crate::base::page::PoolPage;
use crate::pages::backoff::{Backoff, Interval};

const TAG_SHIFT: u32 = 61;
const VMA_START: u64 = 1 << 60;
const POOL_VMA: u64 = 1 << 59;
const POOL_SHIFT: u32 = 32;
const POOL_MASK: u64 = (1 << 27) - 1;
const BACKOFF_SHIFT: u32 = 16;
const BACKOFF_MASK: u64 = 0xffff;
const CHECKSUM_MASK: u64 = 0xffff;

/// Pages that the pool may hold at most: what an item's 27 bits can name (512 GiB).
pub(crate) const POOL_PAGES_MAX: u32 = 1 << 27;

/// What is known of a page since its last visit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PageState {
    /// Never visited, or absent at the last visit: no item in KSM's terms.
    Untracked,
    /// It got memory of its own from the engine, and nothing else is known of it.
    Private,
    /// Its region's source named it, and nobody looked at it since. It may have been read only, and show
    /// the kernel's zero page.
    Dirty,
    /// Its content differed from the visit before, or it was seen once only (`pages_volatile`).
    Volatile {
        /// Of the content at the last visit; 0 if it was not read.
        checksum: u32,
    },
    /// Calm, and nothing equal was found in the current pass (`pages_unshared`).
    Unshared {
        /// Of the content at the last visit.
        checksum: u32,
    },
    /// Calm, and equal to another page, but not worth a mapping of its own as long as so many are in
    /// use (`pages_over_vma_budget`).
    LeftOut {
        /// Of the content at the last visit.
        checksum: u32,
    },
    /// The engine dropped it because it held only zeros (`pages_zero`).
    Zero,
    /// Mapped to a stable page.
    Stable(PoolPage),
}

impl PageState {
    /// Whether the page has memory of its own for sure, which it keeps until it is merged.
    pub(crate) fn is_private(self) -> bool {
        use PageState::{LeftOut, Private, Unshared, Volatile};
        matches!(
            self,
            Private | Volatile { .. } | Unshared { .. } | LeftOut { .. }
        )
    }

    /// Whether the page counts as one that changed since the visit before.
    pub(crate) fn is_volatile(self) -> bool {
        matches!(self, PageState::Volatile { .. } | PageState::Dirty)
    }

    /// The checksum of a calm page's content, if it has memory of its own.
    pub(crate) fn calm_checksum(self) -> Option<u32> {
        match self {
            PageState::Unshared { checksum } | PageState::LeftOut { checksum } => Some(checksum),
            _ => None,
        }
    }
}

/// A page's packed item. The bits beside the state describe the mapping under the page, which
/// outlives the state: a page that its guest wrote to is private again, yet still lies over a page
/// of the pool, which `MADV_DONTNEED` would uncover, whatever that pool page holds by then.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Item(u64);

impl Item {
    pub(crate) fn state(self) -> PageState {
        let checksum = (self.0 & CHECKSUM_MASK) as u32;
        match self.0 >> TAG_SHIFT {
            0 => PageState::Untracked,
            1 => PageState::Volatile { checksum },
            2 => PageState::Unshared { checksum },
            3 => PageState::Zero,
            5 => PageState::LeftOut { checksum },
            6 => PageState::Private,
            7 => PageState::Dirty,
            _ => PageState::Stable(self.pool_page()),
        }
    }

    /// A stable page's item also takes on that pool page as the one under it.
    pub(crate) fn with_state(self, state: PageState) -> Item {
        let (tag, checksum) = match state {
            PageState::Untracked => (0, 0),
            PageState::Volatile { checksum } => (1, checksum),
            PageState::Unshared { checksum } => (2, checksum),
            PageState::Zero => (3, 0),
            PageState::Stable(_) => (4u64, 0),
            PageState::LeftOut { checksum } => (5, checksum),
            PageState::Private => (6, 0),
            PageState::Dirty => (7, 0),
        };
        let mapped = match state {
            PageState::Stable(page) => self.with_pool_page(Some(page)),
            _ => self,
        };
        let rest = VMA_START | POOL_VMA | POOL_MASK << POOL_SHIFT | BACKOFF_MASK << BACKOFF_SHIFT;
        Item(mapped.0 & rest | tag << TAG_SHIFT | u64::from(checksum) & CHECKSUM_MASK)
    }

    /// As [`Item::with_state`], at a moment: what the change says of how busy the page is.
    pub(crate) fn with_state_at(self, state: PageState, now: Interval, worth: u16) -> Item {
        use PageState::{Dirty, LeftOut, Private, Stable, Unshared, Untracked, Volatile, Zero};
        let before = self.backoff();
        let after = match (self.state(), state) {
            (_, Untracked | Private) => Backoff::default(),
            (Stable(_) | Zero, Volatile { .. } | Dirty) => before.broken(now, worth),
            (Unshared { .. } | LeftOut { .. }, Volatile { .. } | Dirty) => {
                before.disturbed(now, worth)
            }
            (_, Volatile { .. } | Dirty) => before.stirred(now),
            // A partner that was taken for calm long ago is only now worth something.
            (_, Stable(_) | Zero) => before.calmed(now),
            (Unshared { .. } | LeftOut { .. }, Unshared { .. } | LeftOut { .. }) => before,
            (_, Unshared { .. } | LeftOut { .. }) => before.calmed(now),
        };
        self.with_state(state).with_backoff(after)
    }

    pub(crate) fn backoff(self) -> Backoff {
        let bits = self.0 >> BACKOFF_SHIFT & BACKOFF_MASK;
        Backoff::from_bits(u16::try_from(bits).unwrap_or(u16::MAX))
    }

    pub(crate) fn with_backoff(self, backoff: Backoff) -> Item {
        let rest = self.0 & !(BACKOFF_MASK << BACKOFF_SHIFT);
        Item(rest | u64::from(backoff.bits()) << BACKOFF_SHIFT)
    }

    /// The page of the pool that the guest page is mapped to, written over or not.
    pub(crate) fn pool_page_under(self) -> Option<PoolPage> {
        (self.0 & POOL_VMA != 0).then(|| self.pool_page())
    }

    pub(crate) fn with_pool_page(self, under: Option<PoolPage>) -> Item {
        let rest = self.0 & !(POOL_VMA | POOL_MASK << POOL_SHIFT);
        Item(match under {
            Some(page) => rest | POOL_VMA | u64::from(page.0) << POOL_SHIFT,
            None => rest,
        })
    }

    fn pool_page(self) -> PoolPage {
        PoolPage((self.0 >> POOL_SHIFT & POOL_MASK) as u32)
    }

    /// Whether a VMA is taken to begin at this page.
    pub(crate) fn starts_vma(self) -> bool {
        self.0 & VMA_START != 0
    }

    pub(crate) fn with_vma_start(self, starts: bool) -> Item {
        Item(if starts {
            self.0 | VMA_START
        } else {
            self.0 & !VMA_START
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn state() -> impl Strategy<Value = PageState> {
        prop_oneof![
            Just(PageState::Untracked),
            Just(PageState::Private),
            Just(PageState::Dirty),
            (0..1u32 << 16).prop_map(|checksum| PageState::Volatile { checksum }),
            (0..1u32 << 16).prop_map(|checksum| PageState::Unshared { checksum }),
            (0..1u32 << 16).prop_map(|checksum| PageState::LeftOut { checksum }),
            Just(PageState::Zero),
            (0..POOL_PAGES_MAX).prop_map(|page| PageState::Stable(PoolPage(page))),
        ]
    }

    proptest! {
        #[test]
        fn what_is_packed_comes_back(
            first in state(),
            second in state(),
            under in proptest::option::of((0..POOL_PAGES_MAX).prop_map(PoolPage)),
            start: bool,
            backoff: u16,
        ) {
            let backoff = Backoff::from_bits(backoff);
            let item = Item::default().with_state(first).with_vma_start(start);
            let item = item.with_backoff(backoff);
            prop_assert_eq!(item.state(), first);
            let item = item.with_pool_page(under).with_state(second);
            prop_assert_eq!(item.state(), second);
            prop_assert_eq!(item.starts_vma(), start);
            prop_assert_eq!(item.backoff(), backoff);
            let expected = match second {
                PageState::Stable(page) => Some(page),
                _ => under,
            };
            prop_assert_eq!(item.pool_page_under(), expected);
        }
    }

    #[test]
    fn an_item_is_eight_bytes() {
        assert_eq!(size_of::<Item>(), 8);
    }
}
