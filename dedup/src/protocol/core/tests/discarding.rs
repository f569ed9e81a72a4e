//! Pages that guests give up.

use super::*;
use crate::pages::pins::AccessError;

impl World {
    /// A guest gives pages up, and finds zeros there or, where that failed, what it wrote.
    pub(super) fn discard(
        &mut self,
        guest: usize,
        pages: &Range<u32>,
        failing: Option<(Call, u32)>,
    ) -> Result<u32, AccessError> {
        let is_refused = self.shared.lock_scanner().vmas.are_refused();
        let may_fail = failing.is_some() || is_refused;
        let guest = &mut self.guests[guest];
        *sync::lock(&guest.memory.given_up) = pages.clone();
        if let Some((kind, calls)) = &failing {
            guest.memory.fail(std::slice::from_ref(kind), *calls);
        }
        let discarded = self.shared.discard(&guest.region, pages);
        guest.memory.recover();
        *sync::lock(&guest.memory.given_up) = 0..0;
        if !may_fail {
            let given_up = discarded.as_ref().expect("no call fails");
            assert_eq!(*given_up, pages.end - pages.start);
        }
        for page in pages.clone() {
            let (shows, expected) = (
                guest.memory.content(page),
                &mut guest.expected[page as usize],
            );
            assert!(shows == 0 || may_fail, "page {page} shows {shows}");
            *expected = if shows == 0 { 0 } else { *expected };
        }
        discarded
    }

    fn under(&self, guest: usize, page: u32) -> Option<crate::base::page::PoolPage> {
        let id = self.guests[guest].region.id();
        self.shared.lock_scanner().items(id).pool_page_under(page)
    }
}

/// Two regions of whole blocks that share all that they hold.
fn settled() -> World {
    let world = World::filled();
    world.check_settled();
    assert!(world.under(0, 0).is_some() && world.under(1, 0).is_some());
    world
}

#[test]
fn pages_given_up_show_zeros_and_their_stable_pages_go_with_the_last_sharer() {
    let mut world = settled();
    let stable_pages = world.pool.used_pages();
    world.discard(0, &(2..6), None).expect("no call fails");
    world.check();
    assert_eq!(world.pool.used_pages(), stable_pages);
    assert_eq!(world.shared.stats().pages_sharing, stable_pages as u64 - 4);
    world.discard(1, &(3..5), None).expect("no call fails");
    world.check();
    assert_eq!(world.pool.used_pages(), stable_pages - 2);
    assert_eq!(world.shared.stats().pages_discarded, 6);
}

#[test]
fn what_is_filled_into_a_place_does_not_show_where_a_page_over_it_was_given_up() {
    let mut world = settled();
    world.discard(0, &(0..PAGES), None).expect("no call fails");
    world.register();
    for guest in [1, 2] {
        world.write(guest, 0..PAGES, 77, 1);
    }
    world.check_settled();
    world.check();
}

#[test]
fn a_block_given_up_as_a_whole_lies_over_nothing_until_it_is_worth_basing_again() {
    let mut world = settled();
    world.discard(0, &(0..PAGES), None).expect("no call fails");
    assert_eq!(world.under(0, 0), None);
    assert_eq!(world.shared.stats().vmas, 2);
    world.write(0, 0..PAGES, 3, 1);
    world.check_settled();
    assert!(world.under(0, 0).is_some());
    assert_eq!(world.shared.stats().vmas, 2);
}

#[test]
fn a_pinned_page_is_not_given_up() {
    let mut world = settled();
    let region = Arc::clone(&world.guests[0].region);
    region.pins.add(&(7..8));
    let discarded = world.shared.discard(&region, &(4..10));
    assert_eq!(discarded.expect("no call fails"), 0);
    world.check();
    region.pins.remove(&(7..8));
    world.discard(0, &(4..10), None).expect("no call fails");
    world.check();
}

#[test]
fn where_no_mapping_is_left_a_part_of_a_block_stays_and_a_whole_one_goes() {
    let mut world = settled();
    let vmas = u32::try_from(world.shared.stats().vmas).expect("few");
    let account = crate::base::vmas::VmaAccount::new(2);
    {
        let mut scanner = world.shared.lock_scanner();
        scanner.vmas = crate::base::vmas::Vmas::new(2, account);
        scanner.vmas.change(0, vmas);
    }
    let region = Arc::clone(&world.guests[0].region);
    let discarded = world.shared.discard(&region, &(4..6));
    assert_eq!(discarded.expect("no call fails"), 0);
    world.check();
    world.discard(0, &(0..PAGES), None).expect("no call fails");
    world.check();
    assert_eq!(world.shared.stats().vmas, 2);
}

#[test]
fn a_block_given_up_bit_by_bit_lies_over_nothing_and_keeps_no_page_of_the_pool() {
    let mut world = settled();
    for guest in [0, 1] {
        for page in (0..PAGES).rev() {
            world
                .discard(guest, &(page..page + 1), None)
                .expect("no call fails");
            world.pass();
        }
        let id = world.guests[guest].region.id();
        assert_eq!(world.shared.lock_scanner().base_of(id, 0), None);
        assert_eq!(world.under(guest, 0), None);
    }
    world.pass();
    world.check();
    assert_eq!(world.pool.used_pages(), 0);
}

#[test]
fn what_is_given_up_beside_private_pages_goes_as_one() {
    let mut world = settled();
    for page in (0..PAGES).step_by(2) {
        world
            .discard(0, &(page..page + 1), None)
            .expect("no call fails");
    }
    let before = world.guests[0].memory.replaced.load(Ordering::Relaxed);
    world.discard(0, &(0..PAGES), None).expect("no call fails");
    let after = world.guests[0].memory.replaced.load(Ordering::Relaxed);
    assert_eq!(after - before, 1);
    assert_eq!(world.shared.stats().vmas, 2);
}

#[test]
fn what_is_given_up_while_calls_fail_can_be_given_up_later() {
    for kind in Call::ALL {
        for calls in 0..3 {
            let mut world = settled();
            let _ = world.discard(0, &(4..10), Some((kind, calls)));
            world.check();
            // What the kernel refused is tried again in the next pass.
            world.pass();
            world.discard(0, &(4..10), None).expect("no call fails");
            world.check();
            world.unmerge();
        }
    }
}
