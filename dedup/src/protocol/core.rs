//! The protocol between the worker, exits, unmerge and registration, over any memory.

use std::io;
use std::sync::Arc as StdArc;
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::time::{Duration, Instant};

use crate::base::budget::Budget;
use crate::base::mutant::{self, Mutant};
use crate::base::stats::Stats;
use crate::base::sync::{self, Arc, Condvar, Mutex, MutexGuard, Ordering};
use crate::pages::dirty::DirtySource;
use crate::pages::region::{Entered, Region, RegionId};
use crate::protocol::control::{Control, Run};
use crate::protocol::ring::{Ring, Unlinked};
use crate::protocol::scan_state::{Batch, Work};

/// What a step costs a batch at least, in pages: a window without a page in memory takes a system
/// call, and a region that exited has items to be dropped.
const STEP_PAGES_MIN: u32 = 8;

/// How long whoever takes the worker mutex in a loop lets others go first: about what it takes a
/// thread to wake up.
const TURN: Duration = Duration::from_micros(100);

/// How a region left its engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitPath {
    /// The exit path freed the slot itself.
    Fast,
    /// The slot was left to the worker, which finishes it next.
    HandedOver,
}

/// Everything that the engine's threads share. Lock order: see the crate's documentation.
#[derive(Debug)]
pub(crate) struct Shared<W: Work> {
    /// The worker mutex: one batch, or an unmerge.
    scanner: Mutex<W>,
    /// The ring lock: never held over work.
    ring: Mutex<Ring<Region<W::Memory>>>,
    pub(crate) control: Mutex<Control>,
    pub(crate) budget: StdArc<Budget>,
    /// Wakes the worker.
    pub(crate) work: Condvar,
    published: Mutex<Stats>,
    next_id: AtomicU64,
    /// Threads that wait for the worker mutex.
    waiting: AtomicU32,
}

impl<W: Work> Shared<W> {
    pub(crate) fn new(scanner: W, control: Control) -> Shared<W> {
        let (stats, budget) = (scanner.stats(), scanner.budget());
        Shared {
            budget,
            scanner: Mutex::new(scanner),
            ring: Mutex::new(Ring::default()),
            control: Mutex::new(control),
            work: Condvar::new(),
            published: Mutex::new(stats),
            next_id: AtomicU64::new(1),
            waiting: AtomicU32::new(0),
        }
    }

    /// Puts memory on the ring.
    pub(crate) fn register(
        &self,
        memory: W::Memory,
        source: Option<Box<dyn DirtySource>>,
    ) -> Arc<Region<W::Memory>> {
        let id = RegionId(self.next_id.fetch_add(1, Ordering::Relaxed));
        let region = Arc::new(Region::new(id, memory, source));
        sync::lock(&self.ring).enter(id, Arc::clone(&region));
        self.kick();
        region
    }

    /// The shutdown sequence of a region; nobody writes to it any more.
    ///
    /// Its order is that of the 2009 patch "ksm: fix oom deadlock" in free-first form: freeing
    /// before locking feeds a worker that waits for memory while it holds the region lock, which
    /// then sees the flag and lets go; locking first would wait for that worker for ever.
    pub(crate) fn exit(&self, region: &Arc<Region<W::Memory>>) -> ExitPath {
        let id = region.id();
        // Step 0: from here on nobody enters the region.
        if !mutant::is(Mutant::PublishedLate) && !region.set_exiting() {
            return ExitPath::HandedOver;
        }
        if mutant::is(Mutant::LockBeforeFree) {
            region.lock_pass();
        }
        // Step 1: give the memory back. The range stays reserved, pool references stay counted.
        W::free_all(region.backing());
        // Whoever waits for memory inside now sees it, or sees the flag.
        self.budget.wake();
        // Fast path: judged and unlinked in one ring-lock section.
        if self.try_finish(id) {
            return ExitPath::Fast;
        }
        // Step 2: whoever was inside has left when this returns.
        if !mutant::is(Mutant::LockBeforeFree) {
            region.lock_pass();
        }
        if mutant::is(Mutant::PublishedLate) {
            region.set_exiting();
        }
        // Step 3: hand the slot to the worker, the cursor looked at anew.
        if self.try_finish(id) {
            return ExitPath::Fast;
        }
        sync::lock(&self.ring).hand_over(id);
        if !mutant::is(Mutant::ReapForgotten) {
            sync::lock(&self.control).reap = true;
        }
        self.kick();
        ExitPath::HandedOver
    }

    /// Frees a slot that has no items and is not under the cursor.
    fn try_finish(&self, id: RegionId) -> bool {
        #[cfg(loom)]
        if mutant::is(Mutant::JudgedOutside) && !sync::lock(&self.ring).would_unlink(id) {
            return false;
        } else if mutant::is(Mutant::JudgedOutside) {
            let slot = sync::lock(&self.ring).unlink(id);
            return slot.is_some();
        }
        // Bound first: the ring's reference must be dropped without the lock.
        let unlinked = sync::lock(&self.ring).try_unlink(id);
        match unlinked {
            Unlinked::Freed(region) => {
                drop(region);
                true
            }
            Unlinked::Busy | Unlinked::Gone => false,
        }
    }

    /// Scans until `pages` pages were visited, one pass is over, or `run` says stop.
    pub(crate) fn batch(&self, pages: u32) -> Batch {
        let mut scanner = self.lock_scanner();
        // Lock order: worker mutex -> control.
        {
            let control = sync::lock(&self.control);
            scanner.set_hurried(control.waiters > 0, control.hurry);
        }
        let mut batch = Batch::default();
        let mut left = i64::from(pages);
        while left > 0 && batch.passes == 0 && sync::lock(&self.control).run == Run::Merge {
            let Some(visited) = self.step(&mut scanner, &mut batch) else {
                break;
            };
            batch.pages += u64::from(visited);
            left -= i64::from(visited.max(STEP_PAGES_MIN));
        }
        batch.due_pages = scanner.due_pages();
        self.publish(&scanner);
        batch
    }

    /// Visits one window, or finishes one exiting region. `None` when nothing is registered.
    fn step(&self, scanner: &mut W, batch: &mut Batch) -> Option<u32> {
        // Lock order: worker mutex -> ring lock, released before the region lock is taken.
        let (id, region, page) = sync::lock(&self.ring).current()?;
        let Some(inside) = region.enter() else {
            let (slot, ended) = sync::lock(&self.ring).unlink_current();
            scanner.detach(id);
            drop(slot);
            if ended {
                end_pass(scanner, batch);
            }
            return Some(0);
        };
        scanner.attach(&region);
        let visited = scanner.visit(&inside, page);
        drop(inside);
        let ended = {
            let mut ring = sync::lock(&self.ring);
            match visited.next {
                Some(page) => {
                    ring.advance_page(page);
                    false
                }
                None => ring.advance_slot(),
            }
        };
        if ended {
            end_pass(scanner, batch);
        }
        Some(visited.pages)
    }

    /// Finishes every exiting region, whatever `run` says: a stopped worker leaks nothing.
    pub(crate) fn reap(&self) {
        let mut scanner = self.lock_scanner();
        sync::lock(&self.control).reap = false;
        let regions = sync::lock(&self.ring).regions();
        for (id, region) in regions {
            if region.is_exiting() {
                scanner.detach(id);
                let slot = sync::lock(&self.ring).unlink(id);
                drop(slot);
            }
        }
        self.publish(&scanner);
    }

    /// Has the engine merge, stop, or stop and unmerge. Stopping waits for the window in hand: once
    /// this returns, nothing is merged. An unmerge always looks at every region, even if `run` says
    /// so already: another caller's may still be under way.
    ///
    /// # Errors
    /// When a private copy can't be had; `run` is `Stop` then, unless it was set anew meanwhile.
    pub(crate) fn set_run(&self, run: Run) -> io::Result<()> {
        {
            let mut control = sync::lock(&self.control);
            if control.run == run && run != Run::Unmerge {
                return Ok(());
            }
            control.run = run;
        }
        // An unmerge that waits for memory waits for an order that is not given any more.
        self.budget.cancel_waiters();
        self.kick();
        match run {
            Run::Merge => return Ok(()),
            Run::Stop => {
                if !mutant::is(Mutant::StopUnawaited) {
                    drop(self.lock_scanner());
                }
                return Ok(());
            }
            Run::Unmerge => {}
        }
        let unmerged = self.unmerge_all();
        let mut control = sync::lock(&self.control);
        if unmerged.is_err() && control.run == Run::Unmerge {
            control.run = Run::Stop;
        }
        unmerged
    }

    /// Unmerges every region. Waits for the batch in hand, and keeps the worker out meanwhile.
    pub(crate) fn unmerge_all(&self) -> io::Result<()> {
        let mut scanner = self.lock_scanner();
        let regions = {
            let mut ring = sync::lock(&self.ring);
            ring.rewind();
            ring.regions()
        };
        let mut failed = None;
        for (id, region) in regions {
            let Some(inside) = region.enter() else {
                scanner.detach(id);
                let slot = sync::lock(&self.ring).unlink(id);
                drop(slot);
                continue;
            };
            // A slot without items stays without: a fast exit remains possible.
            let unmerged = match scanner.is_attached(id) {
                true => scanner.unmerge(&inside),
                false => Ok(()),
            };
            let is_exiting = inside.is_exiting();
            drop(inside);
            if is_exiting {
                // Ended early, perhaps: what is left is its exit's, and must not count any more.
                scanner.detach(id);
                let slot = sync::lock(&self.ring).unlink(id);
                drop(slot);
                continue;
            }
            if let Err(error) = unmerged {
                failed = Some(error);
                break;
            }
            scanner.reclaim();
            self.publish(&scanner);
        }
        if failed.is_none() {
            scanner.start_over();
        }
        scanner.reclaim();
        self.publish(&scanner);
        failed.map_or(Ok(()), Err)
    }

    /// Counters as of the last batch.
    pub(crate) fn stats(&self) -> Stats {
        let slots = sync::lock(&self.ring).len() as u64;
        let worker_cpu = sync::lock(&self.control).worker_cpu;
        Stats {
            slots,
            worker_cpu_us: u64::try_from(worker_cpu.as_micros()).unwrap_or(u64::MAX),
            ..*sync::lock(&self.published)
        }
    }

    pub(crate) fn has_regions(&self) -> bool {
        !sync::lock(&self.ring).is_empty()
    }

    /// Waits until `more` passes have begun and ended from now on. False at the deadline, or when
    /// the worker stops.
    pub(crate) fn wait_full_scans(&self, more: u64, deadline: Instant) -> bool {
        let mut control = sync::lock(&self.control);
        control.waiters += 1;
        // The pass in hand began before now.
        let target = control.passes + more + 1;
        self.work.notify_all();
        while control.passes < target && control.run == Run::Merge && !control.stop {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                break;
            };
            control = sync::wait_timeout(&self.work, control, left);
        }
        control.waiters -= 1;
        control.passes >= target
    }

    pub(crate) fn kick(&self) {
        sync::lock(&self.control).kicked = true;
        self.work.notify_all();
    }

    /// Changes [`Control::hurry`]. False if the orders are in use just now.
    pub(crate) fn try_set_hurry(&self, hurry: bool) -> bool {
        let Some(mut control) = sync::try_lock(&self.control) else {
            return false;
        };
        control.hurry = hurry;
        control.kicked = true;
        drop(control);
        self.work.notify_all();
        true
    }

    /// Takes the worker mutex.
    pub(crate) fn lock_scanner(&self) -> MutexGuard<'_, W> {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let scanner = sync::lock(&self.scanner);
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        scanner
    }

    /// Takes the worker mutex again and again: others who wait for it come first. A lock that is
    /// released and taken at once goes to the thread that runs.
    pub(crate) fn lock_scanner_in_turn(&self) -> MutexGuard<'_, W> {
        if self.waiting.load(Ordering::Relaxed) > 0 {
            std::thread::sleep(TURN);
        }
        self.lock_scanner()
    }

    /// Does a caller's work in a region, between two windows of the worker. `None` if it is exiting.
    pub(crate) fn take_turn<R>(
        &self,
        scanner: &mut W,
        region: &Arc<Region<W::Memory>>,
        work: impl FnOnce(&mut W, &Entered<'_, W::Memory>) -> R,
    ) -> Option<R> {
        // Lock order: worker mutex -> region lock -> ring. The slot must have items in the exit
        // path's eyes before it has any: an exit that unlinked it by itself would leave them behind.
        let inside = region.enter()?;
        let id = region.id();
        if !mutant::is(Mutant::ItemsUnmarked) && !sync::lock(&self.ring).mark_items(id) {
            return None;
        }
        scanner.attach(region);
        Some(work(scanner, &inside))
    }

    pub(crate) fn publish(&self, scanner: &W) {
        *sync::lock(&self.published) = scanner.stats();
    }
}

fn end_pass<W: Work>(scanner: &mut W, batch: &mut Batch) {
    batch.passes += 1;
    batch.changes = scanner.end_pass();
}

#[cfg(all(test, loom))]
mod models;
#[cfg(all(test, not(loom)))]
mod tests;
