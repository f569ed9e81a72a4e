//! Pages that a device uses while the engine is at work on them.

use super::*;
use crate::merge::pin::Pin;
use crate::pages::pins::AccessError;

impl World {
    /// A pass while a device uses pages, and then perhaps an unmerge. The device writes to the first
    /// page while pages are compared, if any are, else afterwards.
    pub(super) fn pinned_pass(
        &mut self,
        guest: usize,
        pages: &Range<u32>,
        written: Option<Content>,
        unmerge: bool,
    ) {
        let (first, memory) = (pages.start, self.guests[guest].memory.clone());
        let pin = Pin::new(&self.guests[guest].region, pages.clone()).expect("there is memory");
        memory.hold_frames(pages.clone());
        let write = {
            let memory = memory.clone();
            move || {
                let content = written.into_iter();
                content.for_each(|content| memory.write_by_device(first, content));
            }
        };
        self.pool.interrupt(Moment::Compare, write.clone());
        self.pass();
        // Once more, which changes nothing, if it has happened already.
        self.pool.interrupt(Moment::Compare, || {});
        write();
        if let Some(content) = written {
            self.guests[guest].expected[first as usize] = content;
        }
        self.check();
        if unmerge {
            self.unmerge();
        }
        memory.let_frames_go();
        pages.clone().for_each(|page| memory.name_dirty(page));
        drop(pin);
    }
}

#[test]
fn pages_that_a_device_uses_are_not_merged_until_it_has_done() {
    let world = World::filled();
    let Guest { region, memory, .. } = &world.guests[0];
    let pin = Pin::new(region, 8..16).expect("they are there");
    memory.hold_frames(8..16);
    (0..12).for_each(|_| world.pass());
    assert!(world.shared.stats().pages_sharing <= 16);
    memory.let_frames_go();
    (8..16).for_each(|page| memory.name_dirty(page));
    drop(pin);
    world.check_settled();
    assert_eq!(world.shared.stats().pages_sharing, u64::from(PAGES));
}

#[test]
fn what_a_device_writes_after_a_page_was_compared_is_not_lost() {
    let mut world = World::filled();
    world.pass();
    // Found equal by now, and compared in this pass.
    (0..4).for_each(|_| world.pinned_pass(0, &(0..PAGES), Some(90), false));
    assert_eq!(world.guests[0].memory.content(0), 90);
    world.check_settled();
}

#[test]
fn merged_pages_that_a_device_uses_get_frames_that_an_unmerge_leaves_alone() {
    let mut world = World::filled();
    world.check_settled();
    world.pinned_pass(0, &(3..5), None, true);
    world.check_settled();
}

#[test]
fn a_pinned_page_in_a_block_that_is_to_be_based_keeps_its_frame() {
    let world = World::filled();
    let Guest { region, memory, .. } = &world.guests[1];
    let pin = Pin::new(region, PAGES - 1..PAGES).expect("it is there");
    memory.hold_frames(PAGES - 1..PAGES);
    (0..12).for_each(|_| world.pass());
    assert_eq!(memory.replaced.load(Ordering::Relaxed), 0);
    memory.let_frames_go();
    drop(pin);
}

#[test]
fn pages_that_there_are_not_and_a_region_that_leaves_are_not_pinned() {
    let world = World::new();
    let region = &world.guests[0].region;
    let error = Pin::new(region, 20..PAGES + 1).expect_err("not a part of it");
    assert!(error.to_string().contains("24 pages"), "{error}");
    region.set_exiting();
    let error = Pin::new(region, 0..1).expect_err("it leaves");
    assert!(error.to_string().contains("given back"), "{error}");
    assert!(!region.pins.has_any(&(0..PAGES)));
}

#[test]
fn a_pin_that_found_no_memory_pins_nothing() {
    let world = World::new();
    let Guest { region, memory, .. } = &world.guests[0];
    memory.fail(&[Call::Unshare], 0);
    Pin::new(region, 0..4).expect_err("no memory");
    assert!(!region.pins.has_any(&(0..PAGES)));
}

#[test]
fn a_long_pin_lets_go_of_a_region_that_exits() {
    // 512 pages and more.
    let mut world = World::of_blocks(2);
    let guest = world.guests.swap_remove(0);
    let (region, pages) = (Arc::clone(&guest.region), page_at(world.pages() - 1) + 1);
    world.pool.interrupt(Moment::Unshare, move || {
        region.set_exiting();
    });
    let error = Pin::new(&guest.region, 0..pages).expect_err("it leaves");
    assert!(matches!(error, AccessError::Exiting), "{error}");
    assert!(!guest.region.pins.has_any(&(0..pages)));
    assert_eq!(guest.memory.page(pages - 1), FakePage::Absent);
}

#[test]
fn a_pin_of_no_pages_is_none() {
    let world = World::new();
    let region = &world.guests[0].region;
    let pin = Pin::new(region, 5..5).expect("nothing to do");
    assert!(!region.pins.has_any(&(0..PAGES)));
    drop(pin);
}
