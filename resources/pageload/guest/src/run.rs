//! Fill, verify, rewrite.

use pageload_workload::port::{COM1_STATUS, COM1_STATUS_INPUT, PVPANIC_SHUTDOWN, Phase, Register};
use pageload_workload::{Begin, Content, Mismatch, Plan, Workload, Writes};

use crate::boot::fail;
use crate::console::print_line;
use crate::memory::Memory;
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
    let mut guest = Guest {
        memory,
        writes: Writes::new(plan),
        has_begun: workload.begin == Begin::Filled,
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
            ..
        } = *self.writes.plan().workload();
        let pause_us = u32::try_from(pace_ms.saturating_mul(1000) / slices).unwrap_or(u32::MAX);
        for slice in 0..slices {
            // Rounded so that the slices of a pass add up to what was asked for.
            let due = |slice| u128::from(writes_per_pass) * u128::from(slice) / u128::from(slices);
            if !self.has_begun {
                // The byte stays where it is: one look more or less does not matter then.
                self.has_begun = port::in_8(COM1_STATUS) & COM1_STATUS_INPUT != 0;
            }
            if self.has_begun {
                self.rewrite(due(slice + 1) - due(slice));
            }
            let first = slice * SLICE_PAGES;
            for page in first..(first + SLICE_PAGES).min(pages) {
                self.verify(page, self.writes.content(page));
            }
            // Who waits for input to begin is in a hurry then.
            let is_hasty = self.has_begun && begin == Begin::Input;
            if pause_us > 0 && !is_hasty {
                port::sleep_us(pause_us);
            }
        }
    }

    /// Writes this many pages, or as many as one round of the write order has.
    fn rewrite(&mut self, writes: u128) {
        let (mut left, mut steps_left) = (writes, self.writes.round_steps());
        while left > 0 && steps_left > 0 {
            steps_left -= 1;
            if let Some(step) = self.writes.advance() {
                self.verify(step.page, step.before);
                self.memory.write(step.page, step.after);
                self.verify(step.page, step.after);
                self.pages_written += 1;
                left -= 1;
            }
        }
    }

    fn verify(&mut self, page: u64, content: Content) {
        self.verified_pages += 1;
        if let Err(mismatch) = self.memory.verify(page, content) {
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
