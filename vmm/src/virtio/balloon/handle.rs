//! What is told of a balloon, and changed of it, while its VM runs.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::timerfd::TimerFd;

use super::super::Interrupt;
use super::lane::Lane;
use super::statistics::BalloonStatistics;
use crate::config::{BalloonConfig, BalloonPatch};

/// Pages of the balloon in a MiB.
const PAGES_PER_MIB: u32 = 256;

/// A balloon, for others than its driver.
#[derive(Clone, Debug)]
pub struct BalloonHandle(pub(super) Arc<Shared>);

/// What the device and its handles have in common.
#[derive(Debug)]
pub(super) struct Shared {
    /// A leaf, held for moments.
    state: Mutex<State>,
    /// Lanes of the queues by which pages are given up.
    pub(super) lanes: [Arc<Lane>; 2],
    waker: Option<RawFd>,
}

struct State {
    target_pages: u32,
    actual_pages: u32,
    interval: Duration,
    /// When the guest is to tell of its memory next.
    due: Instant,
    /// There where statistics are.
    timer: Option<TimerFd>,
    guest: BTreeMap<&'static str, u64>,
    /// There while a driver is.
    interrupt: Option<Arc<Interrupt>>,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State")
            .field("target_pages", &self.target_pages)
            .field("actual_pages", &self.actual_pages)
            .finish_non_exhaustive()
    }
}

impl BalloonHandle {
    pub(super) fn new(config: &BalloonConfig, lanes: [Arc<Lane>; 2]) -> io::Result<BalloonHandle> {
        let has_statistics = config.stats_polling_interval_s > 0;
        let timer = has_statistics.then(TimerFd::new).transpose()?;
        let waker = timer.as_ref().map(AsRawFd::as_raw_fd);
        let state = State {
            target_pages: config.amount_mib.saturating_mul(PAGES_PER_MIB),
            actual_pages: 0,
            interval: Duration::from_secs(config.stats_polling_interval_s.into()),
            due: Instant::now(),
            timer,
            guest: BTreeMap::new(),
            interrupt: None,
        };
        Ok(BalloonHandle(Arc::new(Shared {
            state: Mutex::new(state),
            lanes,
            waker,
        })))
    }

    /// Changes the size that it is to have, or how often the guest tells of its memory; the next time
    /// is now.
    pub fn update(&self, patch: BalloonPatch) {
        let mut state = self.0.lock();
        match patch {
            BalloonPatch::Amount(mib) => {
                state.target_pages = mib.saturating_mul(PAGES_PER_MIB);
                if let Some(interrupt) = &state.interrupt {
                    interrupt.signal_config_change();
                }
            }
            BalloonPatch::Interval(seconds) => {
                state.interval = Duration::from_secs(seconds.into());
                state.wait(Duration::ZERO);
            }
        }
    }

    /// What the guest told last.
    pub fn statistics(&self) -> BalloonStatistics {
        let state = self.0.lock();
        BalloonStatistics {
            target_pages: state.target_pages,
            actual_pages: state.actual_pages,
            target_mib: state.target_pages / PAGES_PER_MIB,
            actual_mib: state.actual_pages / PAGES_PER_MIB,
            guest: state.guest.clone(),
        }
    }

    /// Has nobody wait for pages to be given up any more: the guest does not run again.
    pub fn close(&self) {
        self.0.lanes.iter().for_each(|lane| lane.close());
    }
}

impl State {
    /// Asks for statistics after `time`.
    fn wait(&mut self, time: Duration) {
        self.due = Instant::now() + time;
        // A timer of 0 never goes off.
        let timer_time = time.max(Duration::from_nanos(1));
        let timer = self.timer.as_mut();
        if let Some(Err(error)) = timer.map(|timer| timer.reset(timer_time, None)) {
            log::error!("balloon: cannot set a timer of {time:?}: {error}");
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Its fields are set one at a time: whole after any panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Becomes readable when statistics are due, where there are any. To be watched edge-triggered:
    /// nobody reads it.
    pub(super) fn waker(&self) -> Option<RawFd> {
        self.waker
    }

    /// `num_pages` and `actual` of the configuration space (5.5.4).
    pub(super) fn config_space(&self) -> [u8; 8] {
        let state = self.lock();
        let mut space = [0; 8];
        space[..4].copy_from_slice(&state.target_pages.to_le_bytes());
        space[4..].copy_from_slice(&state.actual_pages.to_le_bytes());
        space
    }

    pub(super) fn set_actual_pages(&self, pages: u32) {
        self.lock().actual_pages = pages;
    }

    /// A driver is there, or none.
    pub(super) fn connect(&self, interrupt: Option<Arc<Interrupt>>) {
        let mut state = self.lock();
        if interrupt.is_none() {
            state.actual_pages = 0;
        }
        state.interrupt = interrupt;
    }

    /// Notes what the guest told, if that made sense, and when it is asked again.
    pub(super) fn note_statistics(&self, told: Option<BTreeMap<&'static str, u64>>) {
        let mut state = self.lock();
        state.guest = told.unwrap_or_else(|| std::mem::take(&mut state.guest));
        let interval = state.interval;
        state.wait(interval);
    }

    pub(super) fn is_due(&self) -> bool {
        Instant::now() >= self.lock().due
    }
}
