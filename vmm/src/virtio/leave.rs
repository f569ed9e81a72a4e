//! Leave for the pages that a turn touches.

use std::collections::BTreeSet;

use vm_memory::GuestAddress;

use super::Allowance;

/// What a turn may touch of guest memory. Each page is asked for once: frames lie side by side, and a
/// page that this turn touched is there until the turn is over.
///
/// Rejected: remembering pages from turn to turn. The guest may have given one back since, or the
/// merge engine may have shared it, and writing to it takes memory again.
pub(super) struct Leave<'a> {
    allowance: &'a dyn Allowance,
    page_bytes: u64,
    pages: BTreeSet<u64>,
}

impl<'a> Leave<'a> {
    pub(super) fn new(allowance: &'a dyn Allowance) -> Leave<'a> {
        Leave {
            allowance,
            page_bytes: allowance.page_bytes(),
            pages: BTreeSet::new(),
        }
    }

    /// What the kernel gives at a time when a page is touched.
    pub(super) fn page_bytes(&self) -> u64 {
        self.page_bytes
    }

    /// Asks for the pages of a range, which does not wrap around, as a whole. False, and nothing is
    /// taken, if there is no leave for it now.
    pub(super) fn take(&mut self, address: GuestAddress, length_bytes: u64) -> bool {
        let Some(last_byte) = length_bytes.checked_sub(1) else {
            return true;
        };
        let pages = address.0 / self.page_bytes..=(address.0 + last_byte) / self.page_bytes;
        let is_new = |page: &u64| !self.pages.contains(page);
        let new_pages = pages.clone().filter(is_new).count() as u64;
        if new_pages > 0 {
            if !self.allowance.take(new_pages * self.page_bytes) {
                return false;
            }
            self.pages.extend(pages);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::Doorbells;
    use std::sync::atomic::{AtomicU64, Ordering};

    /// Gives up to a number of bytes.
    #[derive(Debug)]
    struct Purse(AtomicU64);

    impl Allowance for Purse {
        fn is_open(&self) -> bool {
            true
        }
        fn take(&self, bytes: u64) -> bool {
            let order = Ordering::Relaxed;
            let rest = |have: u64| have.checked_sub(bytes);
            self.0.fetch_update(order, order, rest).is_ok()
        }
        fn page_bytes(&self) -> u64 {
            4096
        }
        fn ring_later(&self, _doorbells: &Doorbells, _queue: usize) {}
    }

    #[test]
    fn a_page_is_asked_for_once_and_a_refused_one_again() {
        let purse = Purse(AtomicU64::new(2 * 4096));
        let mut leave = Leave::new(&purse);
        let left = || purse.0.load(Ordering::Relaxed);
        assert!(leave.take(GuestAddress(4000), 200), "two pages");
        assert_eq!(left(), 0);
        assert!(leave.take(GuestAddress(0), 8192), "the same");
        assert!(leave.take(GuestAddress(0x9000), 0), "none");
        assert!(!leave.take(GuestAddress(8191), 2), "a third");
        purse.0.store(4096, Ordering::Relaxed);
        assert!(leave.take(GuestAddress(8191), 2), "as it is there now");
        assert_eq!(left(), 0);
    }
}
