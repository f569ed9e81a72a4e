use super::*;

fn ring(ids: &[u64]) -> Ring<()> {
    let mut ring = Ring::default();
    for &id in ids {
        ring.enter(RegionId(id), Arc::new(()));
    }
    ring
}

/// Visits slots until the end of the pass; returns the order.
fn finish_pass(ring: &mut Ring<()>) -> Vec<u64> {
    let mut visited = Vec::new();
    while let Some((id, _, _)) = ring.current() {
        visited.push(id.0);
        if ring.advance_slot() {
            break;
        }
    }
    visited
}

#[test]
fn slots_are_visited_in_the_order_of_registration() {
    let mut ring = ring(&[1, 2, 3]);
    assert_eq!(finish_pass(&mut ring), [1, 2, 3]);
    assert_eq!(finish_pass(&mut ring), [1, 2, 3]);
}

#[test]
fn a_new_slot_is_visited_last() {
    let mut ring = ring(&[1, 2, 3]);
    ring.current();
    ring.advance_slot();
    ring.current();
    ring.enter(RegionId(4), Arc::new(()));
    assert_eq!(finish_pass(&mut ring), [2, 3]);
    assert_eq!(finish_pass(&mut ring), [1, 4, 2, 3]);
}

#[test]
fn a_slot_without_items_and_cursor_is_unlinked_by_the_exit_path() {
    let mut ring = ring(&[1, 2]);
    assert!(matches!(ring.try_unlink(RegionId(2)), Unlinked::Freed(_)));
    assert!(matches!(ring.try_unlink(RegionId(2)), Unlinked::Gone));
    assert_eq!(ring.len(), 1);
}

#[test]
fn a_slot_under_the_cursor_is_neither_unlinked_nor_moved() {
    let mut ring = ring(&[1, 2, 3]);
    ring.current();
    ring.advance_slot();
    ring.current();
    assert!(matches!(ring.try_unlink(RegionId(2)), Unlinked::Busy));
    ring.hand_over(RegionId(2));
    assert_eq!(ring.current().map(|(id, _, _)| id), Some(RegionId(2)));
}

#[test]
fn a_slot_handed_over_is_the_next_one_visited() {
    for (cursor_steps, victim) in [(0, 4), (1, 4), (1, 1), (2, 1), (3, 3)] {
        let mut ring = ring(&[1, 2, 3, 4]);
        for _ in 0..cursor_steps {
            ring.current();
            ring.advance_slot();
        }
        let under_cursor = ring.current().map(|(id, _, _)| id);
        ring.hand_over(RegionId(victim));
        if under_cursor != Some(RegionId(victim)) {
            ring.advance_slot();
        }
        assert_eq!(
            ring.current().map(|(id, _, _)| id),
            Some(RegionId(victim)),
            "{cursor_steps}"
        );
        assert_eq!(ring.len(), 4);
    }
}

#[test]
fn a_slot_handed_over_between_two_visits_is_the_next_one() {
    let mut ring = ring(&[1, 2, 3, 4]);
    ring.current();
    ring.advance_slot();
    ring.hand_over(RegionId(4));
    assert_eq!(ring.current().map(|(id, _, _)| id), Some(RegionId(4)));
    ring.unlink_current();
    assert_eq!(ring.current().map(|(id, _, _)| id), Some(RegionId(2)));
}

#[test]
fn unlinking_the_last_slot_ends_the_pass() {
    let mut ring = ring(&[1]);
    ring.current();
    let (slot, ended) = ring.unlink_current();
    assert_eq!(slot.id, RegionId(1));
    assert!(ended);
    assert!(ring.current().is_none());
}

#[test]
fn the_cursor_keeps_its_slot_when_an_earlier_one_goes() {
    let mut ring = ring(&[1, 2, 3]);
    for _ in 0..2 {
        ring.current();
        ring.advance_slot();
    }
    ring.current();
    ring.advance_page(7);
    ring.unlink(RegionId(1));
    assert_eq!(
        ring.current().map(|(id, _, page)| (id, page)),
        Some((RegionId(3), 7))
    );
}
