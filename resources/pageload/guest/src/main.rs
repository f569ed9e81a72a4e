//! Pageload: a bare-metal guest that knows what every page of its memory holds.
//!
//! Booted by the Linux 64-bit protocol, it fills all memory beyond 2 MiB as its command line says
//! (`pageload-workload` has the syntax and the contents), then verifies every page again and again,
//! rewriting some, and reports by I/O ports. A hypervisor that merges pages under it must stay
//! invisible: whatever it gets wrong shows up as a page that does not verify.
//!
//! Kernel mode is `boot.s`, a few dozen instructions; everything in Rust runs in user mode, which is
//! fast under any hypervisor (see there).
//!
//! | module | holds | unsafe |
//! |---|---|---|
//! | `boot` | entry into user mode, faults | yes |
//! | `boot_params` | memory map and command line from the boot loader | yes |
//! | `port` | port writes | yes |
//! | `libc` | the memory functions that compilers call | yes |
//! | `clock` | the time-stamp counter | yes |
//! | `memory` | the workload's pages and their mapping | yes |
//! | `console` | text on COM1 | |
//! | `report` | the counters shown to the monitor | |
//! | `probe` | times single writes | |
//! | `run` | fill, verify, rewrite | |
//!
//! # Locks
//! None: one vCPU, no interrupts.
#![no_std]
#![no_main]

#[expect(unsafe_code, reason = "first instructions, fault entry")]
mod boot;
#[expect(unsafe_code, reason = "reads what the boot loader left in memory")]
mod boot_params;
#[expect(unsafe_code, reason = "the time-stamp counter")]
mod clock;
mod console;
#[expect(unsafe_code, reason = "defines symbols that the compiler calls")]
mod libc;
#[expect(unsafe_code, reason = "physical memory as pages")]
mod memory;
#[expect(unsafe_code, reason = "port instructions")]
mod port;
mod probe;
mod report;
mod run;
