//! Times single writes to pages with shared content, and beside each two things to compare it with.
//!
//! The control is a write to a page that was written the moment before: it costs what any write costs.
//! The exit takes about as long as a page fault of the host. So the vCPU loses its CPU in the middle
//! of an exit about as often as in the middle of a fault, which the control, a thousand times shorter,
//! does not show. What writes to shared pages take beyond both is the merge engine's.

use core::sync::atomic::{AtomicU64, Ordering};

use pageload_workload::Histogram;
use pageload_workload::port::{COM1_STATUS, Register};

use crate::clock::{Clock, exchange_timed, now_ticks};
use crate::{port, report};

/// A page that no other page equals while it counts, and that has nothing else in it.
#[repr(align(4096))]
struct ControlPage(AtomicU64);

static CONTROL: ControlPage = ControlPage(AtomicU64::new(0));

/// What was measured in this window, and when the next write is due.
pub(crate) struct Probe {
    clock: Clock,
    interval_ticks: u64,
    due_ticks: u64,
    window: u64,
    shared: Histogram,
    control: Histogram,
    exit: Histogram,
}

impl Probe {
    /// Times a write every `interval_us`. `None` if the monitor does not know the clock's frequency.
    pub(crate) fn new(interval_us: u64) -> Option<Probe> {
        let clock = Clock::new()?;
        Some(Probe {
            interval_ticks: clock.ticks(interval_us),
            clock,
            due_ticks: 0,
            window: 0,
            shared: Histogram::default(),
            control: Histogram::default(),
            exit: Histogram::default(),
        })
    }

    /// Whether it is time for the next write.
    pub(crate) fn is_due(&self) -> bool {
        now_ticks() >= self.due_ticks
    }

    /// The time from now to the next write, or to `until_ticks` if that is earlier; rounded up.
    pub(crate) fn us_to(&self, until_ticks: u64) -> u64 {
        let ticks = self.due_ticks.min(until_ticks).saturating_sub(now_ticks());
        self.clock.us_ceil(ticks)
    }

    /// The counter's value after this time from now.
    pub(crate) fn ticks_after(&self, us: u64) -> u64 {
        now_ticks().saturating_add(self.clock.ticks(us))
    }

    /// Forgets what was measured: a new window begins.
    pub(crate) fn restart(&mut self) {
        self.window += 1;
        self.shared.clear();
        self.control.clear();
        self.exit.clear();
    }

    /// Times the control write.
    pub(crate) fn time_control(&mut self) {
        let next = CONTROL.0.load(Ordering::Relaxed).wrapping_add(1);
        // From here on the page is this VM's own and writable, whatever was done to it before.
        CONTROL.0.store(next, Ordering::SeqCst);
        let (_, ticks) = exchange_timed(&CONTROL.0, next.wrapping_add(1));
        self.control.record(self.clock.ns(ticks));
    }

    /// Times an exit to the monitor and back.
    pub(crate) fn time_exit(&mut self) {
        let begin = now_ticks();
        port::in_8(COM1_STATUS);
        let ticks = now_ticks().saturating_sub(begin);
        self.exit.record(self.clock.ns(ticks));
    }

    /// Takes the time of a write to a page with shared content.
    pub(crate) fn note_shared(&mut self, ticks: u64) {
        self.shared.record(self.clock.ns(ticks));
    }

    /// The next write is due an interval from now: one that waited long is one write, and none is
    /// made up for.
    pub(crate) fn set_due(&mut self) {
        self.due_ticks = now_ticks().saturating_add(self.interval_ticks);
    }

    /// Reports what was measured in this window.
    pub(crate) fn report(&self) {
        let Probe {
            shared,
            control,
            exit,
            ..
        } = self;
        for (register, value) in [
            (Register::SharedCount, shared.count()),
            (Register::SharedP50, shared.quantile(500)),
            (Register::SharedP99, shared.quantile(990)),
            (Register::SharedP99_9, shared.quantile(999)),
            (Register::SharedMax, shared.max()),
            (Register::ControlCount, control.count()),
            (Register::ControlP50, control.quantile(500)),
            (Register::ControlP99, control.quantile(990)),
            (Register::ControlP99_9, control.quantile(999)),
            (Register::ControlMax, control.max()),
            (Register::ExitCount, exit.count()),
            (Register::ExitP50, exit.quantile(500)),
            (Register::ExitP99, exit.quantile(990)),
            (Register::ExitP99_9, exit.quantile(999)),
            (Register::ExitMax, exit.max()),
            (Register::ProbeWindow, self.window),
        ] {
            report::write(register, value);
        }
    }
}
