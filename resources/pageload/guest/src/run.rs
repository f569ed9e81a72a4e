//! Fill, verify, rewrite.

use pageload_workload::port::{
    COM1, COM1_STATUS, COM1_STATUS_INPUT, PVPANIC_SHUTDOWN, Phase, Register, TSC_KHZ,
};
use pageload_workload::{Begin, Content, Mismatch, Plan, Step, Workload, WriteMode, Writes};

use crate::boot::fail;
use crate::clock::now_ticks;
use crate::console::print_line;
use crate::memory::Memory;
use crate::probe::Probe;
use crate::{port, report};

/// Pages verified in one go; writes and pauses are spread over a pass at this grain.
const SLICE_PAGES: u64 = 256;
/// Bad pages that are printed; all are counted.
const PRINTED_ERRORS_MAX: u64 = 8;

struct Guest {
    memory: Memory,
    writes: Writes,
    /// Pages are being rewritten.
    has_begun: bool,
    /// Times them, if the workload wants that.
    probe: Option<Probe>,
    verify_errors: u64,
    pages_written: u64,
    verified_pages: u64,
}

/// The whole life of the guest.
pub(crate) fn run(command_line: &str, memory: Memory) -> ! {
    let workload = match Workload::parse(command_line) {
        Ok(workload) => workload,
        Err(error) => {
            print_line(format_args!("command line: {error}"));
            fail()
        }
    };
    let plan = Plan::new(workload, memory.pages());
    print_line(format_args!(
        "{} pages, seed {}",
        plan.pages(),
        workload.seed
    ));
    if plan.pages() == 0 {
        print_line(format_args!("no memory beyond the image"));
        fail()
    }
    let probe = match workload.probe_us {
        0 => None,
        us => match Probe::new(us) {
            Some(probe) => Some(probe),
            None => {
                print_line(format_args!(
                    "probe_us: {us} needs a monitor that tells the clock's frequency at port {TSC_KHZ:#x}"
                ));
                fail()
            }
        },
    };
    let mut guest = Guest {
        memory,
        writes: Writes::new(plan),
        has_begun: workload.begin == Begin::Filled,
        probe,
        verify_errors: 0,
        pages_written: 0,
        verified_pages: 0,
    };
    guest.fill();
    guest.verify_passes();
    guest.finish()
}

impl Guest {
    fn fill(&mut self) {
        report::write_phase(Phase::Filling);
        for page in 0..self.writes.plan().pages() {
            self.memory.write(page, self.writes.content(page));
        }
        report::write_phase(Phase::Verifying);
        print_line(format_args!("filled"));
    }

    fn verify_passes(&mut self) {
        let passes = self.writes.plan().workload().passes;
        let mut done = 0;
        while passes == 0 || done < passes {
            self.pass();
            done += 1;
            report::write(Register::VerifiedPages, self.verified_pages);
            report::write(Register::PagesWritten, self.pages_written);
            if let Some(probe) = &self.probe {
                probe.report();
            }
            report::write(Register::VerifyPasses, done);
        }
    }

    fn pass(&mut self) {
        let pages = self.writes.plan().pages();
        let slices = pages.div_ceil(SLICE_PAGES);
        let Workload {
            writes_per_pass,
            pace_ms,
            begin,
            write,
            ..
        } = *self.writes.plan().workload();
        let pause_us = u32::try_from(pace_ms.saturating_mul(1000) / slices).unwrap_or(u32::MAX);
        for slice in 0..slices {
            // Rounded so that the slices of a pass add up to what was asked for.
            let due = |slice| u128::from(writes_per_pass) * u128::from(slice) / u128::from(slices);
            self.look_for_input();
            if self.has_begun && self.probe.is_none() {
                self.rewrite(due(slice + 1) - due(slice));
            }
            let first = slice * SLICE_PAGES;
            for page in first..(first + SLICE_PAGES).min(pages) {
                self.verify(page, self.writes.content(page));
                self.probe_when_due();
            }
            // Who waits for input to begin is in a hurry then, unless the time of its writes is what
            // counts. A wave has a length of its own.
            let is_paced = self.probe.is_some() || write == WriteMode::Wave;
            let is_hasty = self.has_begun && begin == Begin::Input && !is_paced;
            if pause_us > 0 && !is_hasty {
                self.pause(pause_us);
            }
        }
    }

    /// The first byte of input begins the writes, if they wait for it; each byte begins a window of
    /// what is measured.
    fn look_for_input(&mut self) {
        if self.has_begun && self.probe.is_none() {
            return;
        }
        if port::in_8(COM1_STATUS) & COM1_STATUS_INPUT != 0 {
            port::in_8(COM1);
            self.has_begun = true;
            if let Some(probe) = &mut self.probe {
                probe.restart();
            }
        }
    }

    /// Has the monitor hold the vCPU, except for the timed writes that are due in the meantime.
    fn pause(&mut self, us: u32) {
        let until = match &self.probe {
            Some(probe) if self.has_begun => probe.ticks_after(u64::from(us)),
            _ => return port::sleep_us(us),
        };
        while let Some(probe) = &self.probe {
            if now_ticks() >= until {
                return;
            }
            port::sleep_us(u32::try_from(probe.us_to(until)).unwrap_or(u32::MAX));
            self.probe_when_due();
        }
    }

    /// Times a write to the next page that holds shared content, if it is time.
    fn probe_when_due(&mut self) {
        if !self.has_begun || !self.probe.as_ref().is_some_and(Probe::is_due) {
            return;
        }
        for _ in 0..self.writes.round_steps() {
            match self.writes.advance() {
                Some(step) if step.before == self.writes.plan().content(step.page) => {
                    self.write_timed(step);
                    break;
                }
                Some(step) => self.write(step),
                None => {}
            }
        }
        if let Some(probe) = &mut self.probe {
            probe.set_due();
        }
    }

    fn write_timed(&mut self, step: Step) {
        if let Some(probe) = &mut self.probe {
            probe.time_control();
            let (ticks, before) = self.memory.write_timed(step.page, step.before, step.after);
            probe.note_shared(ticks);
            probe.time_exit();
            self.note_verified(step.page, before);
            self.verify(step.page, step.after);
            self.pages_written += 1;
        }
    }

    /// Writes a page, and verifies it before and after.
    fn write(&mut self, step: Step) {
        self.verify(step.page, step.before);
        self.memory.write(step.page, step.after);
        self.verify(step.page, step.after);
        self.pages_written += 1;
    }

    /// Writes this many pages, or as many as one round of the write order has.
    fn rewrite(&mut self, writes: u128) {
        let (mut left, mut steps_left) = (writes, self.writes.round_steps());
        while left > 0 && steps_left > 0 {
            steps_left -= 1;
            if let Some(step) = self.writes.advance() {
                self.write(step);
                left -= 1;
            }
        }
    }

    fn verify(&mut self, page: u64, content: Content) {
        self.note_verified(page, self.memory.verify(page, content));
    }

    fn note_verified(&mut self, page: u64, result: Result<(), Mismatch>) {
        self.verified_pages += 1;
        if let Err(mismatch) = result {
            self.note_error(page, mismatch);
        }
    }

    #[cold]
    fn note_error(&mut self, page: u64, mismatch: Mismatch) {
        self.verify_errors += 1;
        report::write(Register::VerifyErrors, self.verify_errors);
        if self.verify_errors == 1 {
            report::write(Register::FirstBadPage, page + 1);
            report::write_phase(Phase::Failed);
        }
        if self.verify_errors <= PRINTED_ERRORS_MAX {
            let Mismatch {
                word,
                found,
                expected,
            } = mismatch;
            let kind = self.writes.plan().kind(page);
            print_line(format_args!(
                "page {page} ({kind:?}): word {word} is {found:#018x}, must be {expected:#018x}"
            ));
        }
    }

    fn finish(&self) -> ! {
        if self.verify_errors > 0 {
            print_line(format_args!("failed, {} bad pages", self.verify_errors));
            fail()
        }
        report::write_phase(Phase::Finished);
        print_line(format_args!(
            "finished, {} pages verified",
            self.verified_pages
        ));
        port::end(PVPANIC_SHUTDOWN)
    }
}
