//! The thread itself: what it survives.

use std::time::Duration;

use super::*;
use crate::backing::fake::{FakeMemory, FakePool, Moment};
use crate::base::pace::Pace;
use crate::merge::domain::Scanner;
use crate::protocol::control::Control;

const PAGES: u32 = 24;

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while !condition() {
        assert!(Instant::now() < deadline, "waited too long until {what}");
        thread::yield_now();
    }
}

#[test]
fn a_panic_in_a_batch_stops_merging_but_no_exit() {
    for moment in [Moment::Fill, Moment::Compare] {
        let pool = FakePool::default();
        let control = Control::new(Run::Stop, Pace::default());
        let shared = Arc::new(Shared::new(Scanner::new(pool.clone(), 1000), control));
        let regions = [1, 2, 3].map(|_| {
            let memory = FakeMemory::new(PAGES, &pool);
            (0..PAGES).for_each(|page| memory.write(page, 3 + u64::from(page)));
            (shared.register(memory.clone(), None), memory)
        });
        pool.interrupt(moment, || panic!("as the test wants it"));
        let worker = Worker::spawn(&shared).expect("a thread");
        shared.set_run(Run::Merge).expect("it only says so");
        wait_until("the panic has stopped the engine", || {
            sync::lock(&shared.control).run == Run::Stop
        });
        for (_, memory) in &regions {
            wait_until("writers are let go", || memory.is_unprotected());
            (0..PAGES).for_each(|page| assert_eq!(memory.content(page), 3 + u64::from(page)));
        }
        for (region, _) in regions {
            shared.exit(&region);
        }
        wait_until("all slots are freed", || shared.stats().slots == 0);
        assert!(
            pool.used_pages() <= PAGES as usize,
            "more than the run in hand is lost"
        );
        drop(worker);
    }
}
