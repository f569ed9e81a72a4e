use super::*;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Holds each call up until it is let go, and counts them.
#[derive(Debug, Default)]
struct Held {
    begun: AtomicU32,
    done: AtomicU32,
    let_go: Mutex<bool>,
    changed: Condvar,
}

impl Held {
    fn let_go(&self) {
        *self.let_go.lock().unwrap() = true;
        self.changed.notify_all();
    }

    fn wait_begun(&self, count: u32) {
        wait_until(|| self.begun.load(Ordering::SeqCst) == count);
    }
}

impl Discard for Held {
    fn discard(&self, pages: Range<u32>) -> Result<u32, AccessError> {
        self.begun.fetch_add(1, Ordering::SeqCst);
        let is_held = |let_go: &mut bool| !*let_go;
        drop(
            self.changed
                .wait_while(self.let_go.lock().unwrap(), is_held),
        );
        self.done.fetch_add(1, Ordering::SeqCst);
        Ok(pages.end - pages.start)
    }
}

fn wait_until(mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while !condition() {
        assert!(Instant::now() < deadline, "it does not come");
        std::thread::yield_now();
    }
}

fn pages_apart(count: u32) -> Runs {
    Runs::of((0..count).map(|page| 2 * page..2 * page + 1).collect())
}

fn done(lane: &Lane) -> Outcome {
    let mut outcome = None;
    wait_until(|| {
        if let Polled::Done(done) = lane.poll() {
            outcome = Some(done);
        }
        outcome.is_some()
    });
    outcome.unwrap()
}

#[test]
fn a_request_is_done_on_the_thread_which_rings_for_its_queue() {
    let (discards, thread) = Discards::start().unwrap();
    let held = Arc::new(Held::default());
    let lane = Lane::new(held.clone(), discards);
    let event = || EventFd::new(EFD_NONBLOCK).unwrap();
    let doorbells: Doorbells = Arc::new([event(), event()]);
    lane.connect(doorbells.clone(), 1);
    lane.submit(pages_apart(3));
    held.wait_begun(1);
    assert!(matches!(lane.poll(), Polled::Busy));
    held.let_go();
    wait_until(|| doorbells[1].read().is_ok());
    let outcome = done(&lane);
    assert_eq!(outcome.pages, 3);
    assert!(outcome.failure.is_none());
    assert!(matches!(lane.poll(), Polled::Idle));
    doorbells[0].read().unwrap_err();
    drop(lane);
    drop(thread);
}

#[test]
fn a_long_request_goes_to_the_back_of_the_line_after_each_turn() {
    let (discards, _thread) = Discards::start().unwrap();
    let (held, free) = (Arc::new(Held::default()), Arc::new(Held::default()));
    free.let_go();
    let long = Lane::new(held.clone(), discards.clone());
    let short = Lane::new(free, discards);
    long.submit(pages_apart(1000));
    held.wait_begun(1);
    short.submit(pages_apart(1));
    held.let_go();
    done(&short);
    // Those that came behind it waited for one turn of it, not for all of it; which turn it is in by
    // now is the scheduler's.
    let outcome = done(&long);
    assert_eq!(outcome.pages, 1000);
}

#[test]
fn a_turn_is_bounded_by_calls_and_by_pages() {
    let all = std::iter::once(0..1 << 20).collect();
    for (runs, most) in [(pages_apart(1000), 64), (Runs::of(all), 8)] {
        let held = Arc::new(Held::default());
        held.let_go();
        // A line that nobody serves: one turn, and what is left lies in it.
        let (line, lanes) = channel();
        let lane = Lane::new(held.clone(), Discards { line: Some(line) });
        lane.submit(runs);
        lanes.recv().unwrap().work();
        let calls = held.done.load(Ordering::SeqCst);
        assert!((1..=most).contains(&calls), "{calls}");
        assert!(matches!(lane.poll(), Polled::Busy));
        lanes.try_recv().unwrap();
    }
}

#[test]
fn after_a_reset_nothing_is_given_up_once_it_has_settled() {
    let (discards, _thread) = Discards::start().unwrap();
    let held = Arc::new(Held::default());
    let lane = Lane::new(held.clone(), discards);
    lane.submit(pages_apart(9));
    held.wait_begun(1);
    lane.abandon();
    let resetting = lane.clone();
    let seen = held.clone();
    let vcpu = std::thread::spawn(move || {
        resetting.settle();
        seen.done.load(Ordering::SeqCst)
    });
    held.let_go();
    assert_eq!(vcpu.join().unwrap(), 1, "the call in hand was waited for");
    assert!(matches!(lane.poll(), Polled::Idle));
    lane.submit(pages_apart(2));
    assert_eq!(done(&lane).pages, 2);
    assert_eq!(held.done.load(Ordering::SeqCst), 3, "and no other was made");
}

#[test]
fn a_vm_that_ends_waits_for_nothing() {
    let (discards, thread) = Discards::start().unwrap();
    let held = Arc::new(Held::default());
    let lane = Lane::new(held.clone(), discards);
    lane.submit(pages_apart(9));
    held.wait_begun(1);
    lane.abandon();
    lane.close();
    lane.settle();
    assert_eq!(held.done.load(Ordering::SeqCst), 0);
    held.let_go();
    drop(lane);
    drop(thread);
    assert_eq!(held.done.load(Ordering::SeqCst), 1);
}

/// Panics.
#[derive(Debug)]
struct Broken;

impl Discard for Broken {
    fn discard(&self, _pages: Range<u32>) -> Result<u32, AccessError> {
        panic!("as this test wants it");
    }
}

#[test]
fn a_panic_fails_its_request_and_no_other() {
    let (discards, _thread) = Discards::start().unwrap();
    let broken = Lane::new(Arc::new(Broken), discards.clone());
    let free = Arc::new(Held::default());
    free.let_go();
    let other = Lane::new(free, discards);
    broken.submit(pages_apart(1));
    other.submit(pages_apart(1));
    let failure = done(&broken).failure.unwrap().to_string();
    assert!(failure.contains("as this test wants it"), "{failure}");
    assert_eq!(done(&other).pages, 1);
}
