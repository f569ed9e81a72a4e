//! Each mistake that [`Mutant`] knows is made, and a model must fail for it, as it should.
//!
//! In a process of its own: what a failed model leaves behind is not fit for another.

use std::process::Command;

use crate::base::mutant::Mutant;

/// Runs a model with a mistake in the protocol.
fn assert_caught(mutant: Mutant, model: &str, complaint: &str) {
    let tests = std::env::current_exe().expect("the test program has a path");
    let output = Command::new(tests)
        .args([
            "--exact",
            &format!("protocol::core::models::{model}"),
            "--nocapture",
        ])
        .env("SAMEPAGE_MUTANT", format!("{mutant:?}"))
        .env("RUST_BACKTRACE", "0")
        .output()
        .expect("the test program starts");
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("running 1 test"), "no model {model}: {text}");
    assert!(!output.status.success(), "{mutant:?} passes {model}");
    assert!(text.contains(complaint), "{mutant:?}: {text}");
}

#[test]
fn locking_before_freeing_deadlocks_with_a_worker_that_starves() {
    for model in [
        "a_worker_that_starves_inside_a_region_is_fed_by_its_exit",
        "an_unmerge_that_starves_inside_a_region_is_fed_by_its_exit",
    ] {
        assert_caught(Mutant::LockBeforeFree, model, "deadlock");
    }
}

#[test]
fn entering_without_a_look_at_the_flag_touches_memory_that_is_gone() {
    for model in [
        "an_exit_meets_the_scan_of_a_region_that_has_items",
        "an_exit_finds_the_cursor_on_its_slot",
        "an_exit_meets_a_merge_that_has_its_region_as_partner",
    ] {
        assert_caught(Mutant::EnteredUntested, model, "touched after");
    }
}

#[test]
fn moving_the_slot_under_the_cursor_loses_another_region() {
    let model = "an_exit_finds_the_cursor_on_its_slot";
    assert_caught(Mutant::CursorUnchecked, model, "has lost its slot");
}

#[test]
fn judging_the_fast_path_outside_the_ring_lock_frees_a_slot_in_use() {
    let model = "an_exit_meets_the_scan_of_its_region";
    assert_caught(Mutant::JudgedOutside, model, "panicked");
}

#[test]
fn freeing_a_slot_with_items_leaks_them() {
    let model = "an_exit_meets_the_scan_of_a_region_that_has_items";
    assert_caught(Mutant::ItemsIgnored, model, "left items behind");
}

#[test]
fn publishing_an_exit_late_lets_the_worker_in_again() {
    for (model, complaint) in [
        ("an_exit_meets_an_unmerge", "touched after"),
        (
            "an_unmerge_that_starves_inside_a_region_is_fed_by_its_exit",
            "deadlock",
        ),
    ] {
        assert_caught(Mutant::PublishedLate, model, complaint);
    }
}

#[test]
fn telling_nobody_of_a_slot_that_was_handed_over_leaks_the_region() {
    let model = "an_exit_needs_no_running_worker";
    assert_caught(Mutant::ReapForgotten, model, "deadlock");
}

#[test]
fn not_waiting_for_the_window_in_hand_lets_a_merge_happen_after_the_stop() {
    let model = "nothing_is_scanned_once_stopping_has_returned";
    assert_caught(Mutant::StopUnawaited, model, "goes on after it was stopped");
}

#[test]
fn giving_a_slot_items_unseen_leaks_them() {
    let model = "an_exit_meets_a_merge_now";
    assert_caught(Mutant::ItemsUnmarked, model, "without a slot");
}

#[test]
fn a_pin_that_is_not_looked_at_or_does_not_wait_has_its_page_replaced() {
    let model = "a_pin_meets_a_merge_of_its_page";
    for mutant in [Mutant::PinUnlooked, Mutant::PinUnwaited] {
        assert_caught(mutant, model, "a pinned page is replaced");
    }
}
