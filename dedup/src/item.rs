//! What the engine remembers of one guest page, in 8 bytes (KSM's `rmap_item` takes 64).

use crate::backoff::{Backoff, Interval};
use crate::page::PoolPage;

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
    /// Its content differed from the visit before, or it was seen once only (`pages_volatile`).
    Volatile {
        /// Of the content at the last visit.
        checksum: u32,
    },
    /// Calm, and nothing equal was found in the current pass (`pages_unshared`).
    Unshared {
        /// Of the content at the last visit.
        checksum: u32,
    },
    /// The engine dropped it because it held only zeros (`pages_zero`).
    Zero,
    /// Mapped to a stable page.
    Stable(PoolPage),
}

impl PageState {
    /// Whether the page is the guest's own, with memory of its own, as far as it is known.
    pub(crate) fn is_own(self) -> bool {
        matches!(
            self,
            PageState::Volatile { .. } | PageState::Unshared { .. }
        )
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
        use PageState::{Stable, Unshared, Untracked, Volatile, Zero};
        let before = self.backoff();
        let after = match (self.state(), state) {
            (_, Untracked) => Backoff::default(),
            (Stable(_) | Zero, Volatile { .. }) => before.broken(now, worth),
            (Unshared { .. }, Volatile { .. }) => before.disturbed(now, worth),
            (Untracked | Volatile { .. }, Volatile { .. }) => before.stirred(now),
            // A partner that was taken for calm long ago is only now worth something.
            (_, Stable(_) | Zero) => before.calmed(now),
            (Unshared { .. }, Unshared { .. }) => before,
            (_, Unshared { .. }) => before.calmed(now),
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

    /// The page of the pool that is to be tried first, of a page that lies over none.
    pub(crate) fn hint(self) -> Option<PoolPage> {
        let page = self.pool_page();
        (self.0 & POOL_VMA == 0 && page.0 != 0).then_some(page)
    }

    /// Takes the place of the page under it, so a page that lies over one keeps none. Nor is the pool's
    /// first page ever one: its number stands for no hint.
    pub(crate) fn with_hint(self, page: PoolPage) -> Item {
        if self.0 & POOL_VMA != 0 {
            return self;
        }
        Item(self.0 & !(POOL_MASK << POOL_SHIFT) | u64::from(page.0) << POOL_SHIFT)
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
            (0..1u32 << 16).prop_map(|checksum| PageState::Volatile { checksum }),
            (0..1u32 << 16).prop_map(|checksum| PageState::Unshared { checksum }),
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

        #[test]
        fn a_hint_changes_nothing_else_and_goes_with_the_next_mapping(
            state in state(),
            under in proptest::option::of((0..POOL_PAGES_MAX).prop_map(PoolPage)),
            hint in (0..POOL_PAGES_MAX).prop_map(PoolPage),
            start: bool,
            backoff: u16,
        ) {
            let item = Item::default().with_state(state).with_vma_start(start);
            let item = item.with_backoff(Backoff::from_bits(backoff));
            let item = if let PageState::Stable(_) = state { item } else { item.with_pool_page(under) };
            let hinted = item.with_hint(hint);
            let may_have = item.pool_page_under().is_none() && hint.0 != 0;
            prop_assert_eq!(hinted.hint(), may_have.then_some(hint));
            prop_assert_eq!(hinted.state(), item.state());
            prop_assert_eq!(hinted.pool_page_under(), item.pool_page_under());
            prop_assert_eq!((hinted.starts_vma(), hinted.backoff()), (start, item.backoff()));
            prop_assert_eq!(hinted.with_pool_page(None).hint(), None);
        }
    }

    #[test]
    fn an_item_is_eight_bytes() {
        assert_eq!(size_of::<Item>(), 8);
    }
}
