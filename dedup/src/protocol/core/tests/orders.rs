//! Orders to unmerge that meet others.

use super::*;

/// Two regions with the same content, merged.
fn merged_world() -> World {
    let world = World::filled();
    world.check_settled();
    assert_ne!(world.pool.used_pages(), 0);
    world
}

#[test]
fn a_second_unmerge_returns_when_nothing_is_merged_even_if_the_first_is_under_way() {
    let world = merged_world();
    let (pool, shared) = (world.pool.clone(), Arc::new(world.shared));
    let (second, merged_pages) = std::sync::mpsc::channel();
    world.pool.interrupt(Moment::Unshare, {
        let (pool, shared) = (pool.clone(), Arc::clone(&shared));
        move || {
            let returned = Arc::new(std::sync::Barrier::new(2));
            std::thread::spawn({
                let returned = Arc::clone(&returned);
                move || {
                    returned.wait();
                    shared.set_run(Run::Unmerge).expect("the model has memory");
                    second.send(pool.used_pages()).expect("somebody listens");
                }
            });
            returned.wait();
            // Were it to return too early, it would do so about now.
            poll_until(Duration::from_millis(100), || false);
        }
    });
    shared.set_run(Run::Unmerge).expect("the model has memory");
    let merged_pages = merged_pages.recv_timeout(Duration::from_secs(120));
    assert_eq!(merged_pages, Ok(0));
}

#[test]
fn an_unmerge_that_fails_does_not_undo_a_newer_order() {
    let world = merged_world();
    let memory = world.guests[0].memory.clone();
    let shared = Arc::new(world.shared);
    world.pool.interrupt(Moment::Unshare, {
        let shared = Arc::clone(&shared);
        move || {
            shared.set_run(Run::Merge).expect("it only says so");
            memory.calls_left.store(0, Ordering::Relaxed);
        }
    });
    shared
        .set_run(Run::Unmerge)
        .expect_err("there is no memory left");
    assert_eq!(sync::lock(&shared.control).run, Run::Merge);
}

#[test]
fn an_unmerge_that_fails_leaves_the_engine_stopped_and_its_pages_accounted_for() {
    let world = merged_world();
    world.guests[0]
        .memory
        .calls_left
        .store(2, Ordering::Relaxed);
    world
        .shared
        .set_run(Run::Unmerge)
        .expect_err("memory for two pages only");
    assert_eq!(sync::lock(&world.shared.control).run, Run::Stop);
    world.check();
    world.guests[0]
        .memory
        .calls_left
        .store(u32::MAX, Ordering::Relaxed);
    world.set_run(Run::Merge);
    world.check_settled();
}

fn poll_until(limit: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    while Instant::now() < deadline {
        if condition() {
            return true;
        }
        std::thread::yield_now();
    }
    false
}
