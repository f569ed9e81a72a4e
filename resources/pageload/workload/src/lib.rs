//! What a pageload guest writes into its pages.
//!
//! A test of a merge engine needs a guest whose every page is known at every moment: by the guest,
//! which verifies without keeping a copy, and by the host, which predicts how many pages an engine
//! must find. So a page's content is a pure function of a few numbers on the kernel command line, and
//! this crate is that function. It runs in both places: `no_std`, no allocation, no dependencies.
//!
//! Guarantees:
//! - Deterministic: equal [`Workload`], page count and number of [writes](Writes) mean equal pages.
//! - A page's expected content costs O(1): no table of versions has to be kept beside the pages.
//! - Two pages are equal only if both are zero or both hold the same shared content (up to a
//!   collision of 64-bit keys).
//!
//! | module | holds |
//! |---|---|
//! | `workload` | [`Workload`]: the parameters, their limits and defaults |
//! | `cmdline` | parse from, and format to, a kernel command line |
//! | `plan` | [`Plan`]: which page holds what after filling |
//! | `writes` | [`Writes`]: which page is rewritten when, and what each page holds after n steps |
//! | `content` | [`Content`]: the 64-bit words of a page, and their verification |
//! | `permutation` | [`Permutation`]: a seeded shuffle without a table |
//! | `layout` | where the pages are in guest memory, and how many there are |
//! | `histogram` | [`Histogram`]: quantiles of the durations that a guest measures |
//! | `port` | the I/O ports and registers the guest reports by |
//! | `oracle` | [`expect`]: the merge counters that a set of workloads must lead to |
//!
//! # Locks
//! None: everything here is a value.
#![no_std]

#[cfg(test)]
extern crate std;

mod cmdline;
mod content;
mod histogram;
pub mod layout;
mod oracle;
mod permutation;
mod plan;
pub mod port;
mod workload;
mod writes;

pub use cmdline::ParseError;
pub use content::{Content, Mismatch, WORDS_PER_PAGE};
pub use histogram::Histogram;
pub use oracle::{Expected, OracleError, expect};
pub use permutation::Permutation;
pub use plan::{PageKind, Plan, RUN_PAGES};
pub use workload::{Begin, Layout, Workload, WorkloadError, WriteMode};
pub use writes::{Step, Writes};
