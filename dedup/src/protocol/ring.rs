//! The scan ring: slots in the order in which they are visited, and the cursor.
//!
//! Pure data; the engine keeps it behind the ring lock. The rules are those of `mm/ksm.c`
//! (`__ksm_enter`, `__ksm_exit`, `scan_get_next_rmap_item`):
//! - a new slot goes just behind the cursor and is visited last;
//! - the exit path unlinks a slot itself only if it has no items and is not under the cursor;
//! - otherwise the slot goes just after the cursor and is the next to be visited;
//! - a slot under the cursor is neither unlinked nor moved by anybody but the cursor's owner.

use crate::base::mutant::{self, Mutant};
use crate::base::sync::Arc;
use crate::pages::region::RegionId;

/// A registered region's place in the ring.
#[derive(Debug)]
pub(crate) struct Slot<R> {
    pub(crate) id: RegionId,
    pub(crate) region: Arc<R>,
    /// Whether the worker ever attached items to the slot.
    pub(crate) has_items: bool,
}

/// What the exit path found when it looked for its slot.
#[derive(Debug)]
pub(crate) enum Unlinked<R> {
    /// No items, not under the cursor: unlinked here and now.
    Freed(Arc<R>),
    /// The worker must finish it.
    Busy,
    /// The worker was faster and has finished it already.
    Gone,
}

/// Slots and cursor.
#[derive(Debug)]
pub(crate) struct Ring<R> {
    slots: Vec<Slot<R>>,
    /// Index of the slot under the cursor; `slots.len()` between two passes.
    cursor: usize,
    /// Whether the cursor's owner is, or will be, working on the slot under the cursor.
    engaged: bool,
    /// Page of that slot to be visited next.
    page: u32,
}

impl<R> Default for Ring<R> {
    fn default() -> Ring<R> {
        Ring {
            slots: Vec::new(),
            cursor: 0,
            engaged: false,
            page: 0,
        }
    }
}

impl<R> Ring<R> {
    pub(crate) fn len(&self) -> usize {
        self.slots.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Links a new slot just behind the cursor.
    pub(crate) fn enter(&mut self, id: RegionId, region: Arc<R>) {
        let slot = Slot {
            id,
            region,
            has_items: false,
        };
        self.slots.insert(self.cursor, slot);
        // Between passes the cursor stands past the end, and stays there.
        self.cursor += 1;
    }

    /// The slot under the cursor and the page to go on with; steps onto the first slot at the
    /// start of a pass. From here on the slot has items as far as the exit path can tell.
    pub(crate) fn current(&mut self) -> Option<(RegionId, Arc<R>, u32)> {
        if self.cursor >= self.slots.len() {
            self.cursor = 0;
            self.page = 0;
        }
        let page = self.page;
        let slot = self.slots.get_mut(self.cursor)?;
        slot.has_items = true;
        self.engaged = true;
        Some((slot.id, Arc::clone(&slot.region), page))
    }

    /// Has a slot count as one with items, for somebody who is about to attach some without being
    /// the cursor's owner. False if it is not linked any more.
    pub(crate) fn mark_items(&mut self, id: RegionId) -> bool {
        let slot = self.slots.iter_mut().find(|slot| slot.id == id);
        slot.map(|slot| slot.has_items = true).is_some()
    }

    /// Moves the cursor to `page` of the slot it is on.
    pub(crate) fn advance_page(&mut self, page: u32) {
        self.page = page;
    }

    /// Moves the cursor to the next slot. True at the end of a pass.
    pub(crate) fn advance_slot(&mut self) -> bool {
        self.cursor += 1;
        self.page = 0;
        self.engaged = false;
        self.cursor >= self.slots.len()
    }

    /// Unlinks the slot under the cursor, which thereby is on the next one. True at the end of a pass.
    pub(crate) fn unlink_current(&mut self) -> (Slot<R>, bool) {
        let slot = self.slots.remove(self.cursor);
        self.page = 0;
        self.engaged = false;
        (slot, self.cursor >= self.slots.len())
    }

    /// Puts the cursor between two passes.
    pub(crate) fn rewind(&mut self) {
        self.cursor = self.slots.len();
        self.page = 0;
        self.engaged = false;
    }

    /// Every linked slot, in ring order.
    pub(crate) fn regions(&self) -> Vec<(RegionId, Arc<R>)> {
        self.slots
            .iter()
            .map(|slot| (slot.id, Arc::clone(&slot.region)))
            .collect()
    }

    /// The exit path's look at its slot: unlinks it if nothing keeps it.
    pub(crate) fn try_unlink(&mut self, id: RegionId) -> Unlinked<R> {
        let Some(index) = self.slots.iter().position(|slot| slot.id == id) else {
            return Unlinked::Gone;
        };
        if self.is_kept(index) {
            return Unlinked::Busy;
        }
        Unlinked::Freed(self.remove(index).region)
    }

    /// Unlinks a slot for somebody who holds the worker mutex.
    pub(crate) fn unlink(&mut self, id: RegionId) -> Option<Slot<R>> {
        let index = self.slots.iter().position(|slot| slot.id == id)?;
        if index == self.cursor {
            self.page = 0;
            self.engaged = false;
        }
        Some(self.remove(index))
    }

    /// Places a slot just after the cursor, unless the cursor is on it.
    pub(crate) fn hand_over(&mut self, id: RegionId) {
        let Some(index) = self.slots.iter().position(|slot| slot.id == id) else {
            return;
        };
        if self.is_under_cursor(index) && !mutant::is(Mutant::CursorUnchecked) {
            return;
        }
        if self.cursor >= self.slots.len() {
            // Between passes: the first slot of the next pass is the next to be visited.
            let slot = self.slots.remove(index);
            self.slots.insert(0, slot);
            return;
        }
        let slot = self.remove(index);
        // An engaged slot is left where it is; a slot that is merely next makes room.
        let place = if self.engaged {
            self.cursor + 1
        } else {
            self.cursor
        };
        self.slots.insert(place, slot);
    }

    /// Whether the exit path must leave the slot to the worker.
    fn is_kept(&self, index: usize) -> bool {
        let has_items = self.slots[index].has_items && !mutant::is(Mutant::ItemsIgnored);
        has_items || self.is_under_cursor(index)
    }

    fn is_under_cursor(&self, index: usize) -> bool {
        self.engaged && index == self.cursor
    }

    fn remove(&mut self, index: usize) -> Slot<R> {
        let slot = self.slots.remove(index);
        if index < self.cursor {
            self.cursor -= 1;
        }
        slot
    }
}

/// What a mutant needs.
#[cfg(loom)]
impl<R> Ring<R> {
    /// [`Ring::try_unlink`]'s judgement without its deed.
    pub(crate) fn would_unlink(&self, id: RegionId) -> bool {
        let index = self.slots.iter().position(|slot| slot.id == id);
        index.is_some_and(|index| !self.is_kept(index))
    }
}

/// What the models look at.
#[cfg(all(test, loom))]
impl<R> Ring<R> {
    /// The slot that the worker is on.
    pub(crate) fn engaged(&self) -> Option<RegionId> {
        assert!(self.cursor <= self.slots.len(), "the cursor is lost");
        self.engaged.then(|| self.slots[self.cursor].id)
    }

    pub(crate) fn is_linked(&self, id: RegionId) -> bool {
        let places = self.slots.iter().filter(|slot| slot.id == id).count();
        assert!(places <= 1, "region {} has {places} slots", id.0);
        places == 1
    }
}

#[cfg(test)]
mod tests;
