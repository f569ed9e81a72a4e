//! Memory and work that are as small as can be, and check what the protocol promises them.

use std::io;
use std::sync::{Arc, Weak};

// Loom's as well: it tries no order that only what it does not see could tell from another.
use loom::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use loom::thread::{self, JoinHandle};

use super::super::*;
use super::Pace;
use crate::base::page::PageRange;
use crate::pages::region::{Entered, RegionRef};
use crate::protocol::scan_state::Visited;

/// The one page of a region that is ever replaced.
const PAGE: PageRange = 0..1;
/// A region's windows in a pass.
const WINDOWS: u32 = 2;
/// Page frames in a world where memory is no matter.
const FRAMES_PLENTY: u32 = 16;

/// The host's memory. Who finds none waits, for ever if need be: loom reports it.
#[derive(Debug)]
struct Frames {
    free: Mutex<u32>,
    given_back: Condvar,
    all: u32,
    dropped: Mutex<u32>,
    drop_seen: Condvar,
    made: AtomicU32,
    /// Scanning has been stopped.
    is_stopped: AtomicBool,
    /// Whether a scan enters the other regions too.
    is_merging: AtomicBool,
    /// Whether a scan takes a frame for each window.
    is_short: AtomicBool,
    /// Whether a scan replaces a page. Not loom's: it never changes while threads run, and models
    /// without pins shall not grow by it.
    is_replacing: std::sync::atomic::AtomicBool,
}

impl Frames {
    fn take(&self) {
        let mut free = sync::lock(&self.free);
        while *free == 0 {
            free = sync::wait(&self.given_back, free);
        }
        *free -= 1;
    }

    fn give_back(&self, frames: u32) {
        if frames > 0 {
            *sync::lock(&self.free) += frames;
            self.given_back.notify_all();
        }
    }
}

/// A region's memory.
#[derive(Debug)]
pub(super) struct Memory {
    frames: Arc<Frames>,
    held: AtomicU32,
    /// Its exit has returned: nobody may come here any more.
    is_left: AtomicBool,
    /// It has items.
    is_attached: AtomicBool,
    refuses: AtomicBool,
    /// Which frame the page has.
    frame: AtomicU32,
    shared: Weak<Shared<Toy>>,
}

impl Memory {
    /// Takes a frame for this memory, as a guest's write does, or a copy that is made for it.
    pub(super) fn fill(&self) {
        self.frames.take();
        self.touch();
        self.held.fetch_add(1, Ordering::SeqCst);
    }

    /// Makes copies fail.
    pub(super) fn refuse(&self) {
        self.refuses.store(true, Ordering::SeqCst);
    }

    fn touch(&self) {
        let is_left = self.is_left.load(Ordering::SeqCst);
        assert!(!is_left, "memory is touched after its exit's lock pass");
    }

    fn free(&self) {
        self.frames.give_back(self.held.swap(0, Ordering::SeqCst));
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let is_attached = self.is_attached.load(Ordering::SeqCst);
        assert!(!is_attached, "a region goes before its items");
        if let Some(shared) = self.shared.upgrade() {
            // Whoever dropped the last reference under the ring lock waits for itself here.
            shared.has_regions();
        }
        self.free();
        *sync::lock(&self.frames.dropped) += 1;
        self.frames.drop_seen.notify_all();
    }
}

/// The worker's state: the regions it has met.
#[derive(Debug)]
pub(super) struct Toy {
    attached: Vec<RegionRef<Memory>>,
    /// Somebody works on a region without being the cursor's owner.
    hurried: bool,
    shared: Weak<Shared<Toy>>,
    frames: Arc<Frames>,
}

impl Toy {
    /// What a merge does with partners: a second region lock, under that of the region in hand.
    fn merge_with_others(&self, id: RegionId) {
        for other in self.attached.iter().filter(|other| other.id() != id) {
            if let Some(partner) = other.enter() {
                partner.backing().touch();
            }
        }
    }
}

impl Work for Toy {
    type Memory = Memory;

    fn free_all(memory: &Memory) {
        memory.free();
    }

    fn attach(&mut self, region: &RegionRef<Memory>) {
        if !self.is_attached(region.id()) {
            region.backing().is_attached.store(true, Ordering::SeqCst);
            self.attached.push(sync::Arc::clone(region));
        }
    }

    fn is_attached(&self, id: RegionId) -> bool {
        self.attached.iter().any(|region| region.id() == id)
    }

    fn detach(&mut self, id: RegionId) {
        let place = self.attached.iter().position(|region| region.id() == id);
        if let Some(place) = place {
            let region = self.attached.remove(place);
            region.backing().is_attached.store(false, Ordering::SeqCst);
        }
    }

    fn visit(&mut self, inside: &Entered<'_, Memory>, page: u32) -> Visited {
        let memory = inside.backing();
        memory.touch();
        if let Some(shared) = self.shared.upgrade() {
            // Lock order: worker mutex -> region lock -> ring lock.
            let (id, ring) = (inside.region.id(), sync::lock(&shared.ring));
            assert!(ring.is_linked(id), "a region is visited without a slot");
            let is_under_cursor = ring.engaged() == Some(id);
            assert!(is_under_cursor || self.hurried, "the cursor is elsewhere");
        }
        if self.frames.is_merging.load(Ordering::SeqCst) {
            self.merge_with_others(inside.region.id());
        }
        if self.frames.is_short.load(Ordering::SeqCst) && !inside.is_exiting() {
            memory.fill();
        }
        if self.frames.is_replacing.load(Ordering::SeqCst) {
            let replacing = inside.region.pins.begin_replacing(&PAGE);
            if !replacing.is_pinned(PAGE.start) {
                memory.frame.fetch_add(1, Ordering::SeqCst);
            }
        }
        memory.touch();
        let is_stopped = self.frames.is_stopped.load(Ordering::SeqCst);
        assert!(!is_stopped, "scanning goes on after it was stopped");
        Visited {
            pages: 1,
            next: (page + 1 < WINDOWS).then_some(page + 1),
        }
    }

    fn unmerge(&mut self, inside: &Entered<'_, Memory>) -> io::Result<()> {
        for _ in 0..WINDOWS {
            if inside.is_exiting() {
                return Ok(());
            }
            if inside.backing().refuses.load(Ordering::SeqCst) {
                return Err(io::Error::from(io::ErrorKind::OutOfMemory));
            }
            inside.backing().fill();
        }
        Ok(())
    }

    fn discard(&mut self, inside: &Entered<'_, Memory>, _pages: &PageRange) -> io::Result<u32> {
        inside.backing().touch();
        if let Some(shared) = self.shared.upgrade() {
            let is_linked = sync::lock(&shared.ring).is_linked(inside.region.id());
            assert!(is_linked, "pages of a region without a slot are given up");
        }
        inside.backing().touch();
        Ok(1)
    }

    fn set_hurried(&mut self, hurried: bool, _is_short: bool) {
        self.hurried = hurried;
    }

    fn due_pages(&self) -> u64 {
        0
    }

    fn budget(&self) -> Arc<Budget> {
        // Not what makes anybody wait here: see `Frames`.
        Budget::new()
    }

    fn reclaim(&mut self) {}

    fn end_pass(&mut self) -> u64 {
        0
    }

    fn start_over(&mut self) {}

    fn stats(&self) -> Stats {
        Stats::default()
    }
}

/// An engine over toys.
#[derive(Clone, Debug)]
pub(super) struct World {
    pub(super) shared: Arc<Shared<Toy>>,
    frames: Arc<Frames>,
}

impl World {
    pub(super) fn new(run: Run) -> World {
        World::with_frames(run, FRAMES_PLENTY)
    }

    pub(super) fn with_frames(run: Run, frames: u32) -> World {
        let frames = Arc::new(Frames {
            free: Mutex::new(frames),
            given_back: Condvar::new(),
            all: frames,
            dropped: Mutex::new(0),
            drop_seen: Condvar::new(),
            made: AtomicU32::new(0),
            is_stopped: AtomicBool::new(false),
            is_merging: AtomicBool::new(false),
            is_short: AtomicBool::new(false),
            is_replacing: std::sync::atomic::AtomicBool::new(false),
        });
        let shared = Arc::new_cyclic(|shared| {
            let toy = Toy {
                attached: Vec::new(),
                hurried: false,
                shared: Weak::clone(shared),
                frames: Arc::clone(&frames),
            };
            Shared::new(toy, Control::new(run, Pace::default()))
        });
        World { shared, frames }
    }

    pub(super) fn register(&self) -> RegionRef<Memory> {
        self.frames.made.fetch_add(1, Ordering::SeqCst);
        let memory = Memory {
            frames: Arc::clone(&self.frames),
            held: AtomicU32::new(0),
            is_left: AtomicBool::new(false),
            is_attached: AtomicBool::new(false),
            refuses: AtomicBool::new(false),
            frame: AtomicU32::new(0),
            shared: Arc::downgrade(&self.shared),
        };
        self.shared.register(memory, None)
    }

    /// Makes each window of a scan need memory.
    pub(super) fn starve_scans(&self) {
        self.frames.is_short.store(true, Ordering::SeqCst);
    }

    /// Makes each window of a scan find partners in all other regions.
    pub(super) fn merge_windows(&self) {
        self.frames.is_merging.store(true, Ordering::SeqCst);
    }

    /// Makes each window of a scan replace a page.
    pub(super) fn replace_pages(&self) {
        self.frames.is_replacing.store(true, Ordering::SeqCst);
    }

    /// What a device does with a pinned page: it is given the frame, and uses it.
    pub(super) fn do_io(region: &RegionRef<Memory>) {
        region.pins.add(&PAGE);
        let frame = || region.backing().frame.load(Ordering::SeqCst);
        let given = frame();
        assert_eq!(frame(), given, "a pinned page is replaced");
        region.pins.remove(&PAGE);
    }

    /// Visits this many windows, one after the other.
    pub(super) fn visit_windows(&self, windows: u32) {
        for _ in 0..windows {
            self.shared.batch(1);
        }
    }

    pub(super) fn spawn(&self, body: impl FnOnce(&Shared<Toy>) + 'static) -> JoinHandle<()> {
        let shared = Arc::clone(&self.shared);
        thread::spawn(move || body(&shared))
    }

    /// What a VM's end does, and what it may rely on afterwards.
    pub(super) fn exit(&self, region: RegionRef<Memory>) {
        let path = self.shared.exit(&region);
        let memory = region.backing();
        memory.is_left.store(true, Ordering::SeqCst);
        let has_items = memory.is_attached.load(Ordering::SeqCst);
        assert!(
            path == ExitPath::HandedOver || !has_items,
            "the fast path left items behind"
        );
        if path == ExitPath::Fast {
            let is_linked = sync::lock(&self.shared.ring).is_linked(region.id());
            assert!(!is_linked, "the fast path left a slot behind");
        }
        // Perhaps the last reference, dropped where a VM's handle is: with no lock held.
        drop(region);
    }

    pub(super) fn assert_linked(&self, region: &RegionRef<Memory>) {
        let is_linked = sync::lock(&self.shared.ring).is_linked(region.id());
        assert!(is_linked, "a live region has lost its slot");
    }

    /// Gives an order, after which no window is scanned.
    pub(super) fn stop_scanning(&self, run: Run) {
        self.shared.set_run(run).expect("there is memory");
        self.frames.is_stopped.store(true, Ordering::SeqCst);
    }

    /// Ends the worker as a drop of the engine does.
    pub(super) fn stop(&self) {
        sync::lock(&self.shared.control).stop = true;
        self.shared.work.notify_all();
    }

    pub(super) fn wait_until_dropped(&self, regions: u32) {
        let mut dropped = sync::lock(&self.frames.dropped);
        while *dropped < regions {
            dropped = sync::wait(&self.frames.drop_seen, dropped);
        }
    }

    /// What a stopped engine does with what it was handed, and then nothing is left.
    pub(super) fn finish(&self) {
        self.shared.reap();
        self.assert_empty();
    }

    pub(super) fn assert_empty(&self) {
        assert_eq!(self.shared.stats().slots, 0, "slots are left");
        let attached = sync::lock(&self.shared.scanner).attached.len();
        assert_eq!(attached, 0, "items are left");
        let made = self.frames.made.load(Ordering::SeqCst);
        assert_eq!(*sync::lock(&self.frames.dropped), made, "regions are left");
        assert_eq!(
            *sync::lock(&self.frames.free),
            self.frames.all,
            "frames are left"
        );
    }
}
