//! Samepage's merge engine: gives the memory that regions have in common back to the host.
//!
//! # The problem
//! Pages are found equal while their owners go on writing to them. Whatever was learnt of a page
//! (its hash, its partner) may be wrong by the time it is used, and a page must never show a
//! content that its owner did not write. KSM solves this inside the kernel; a monitor can solve it
//! with what the kernel offers to user space: a private mapping of a memfd page breaks by itself
//! when it is written to, and `userfaultfd` stops the writers of a range for a moment.
//!
//! # What is guaranteed
//! - A merge is invisible: *protect, compare again, swap, wake*. No read returns anything but the
//!   last write; no write is lost. Writers wait for one group of pages at most, readers never.
//! - Bytes decide, never hashes.
//! - A stable page is a fresh copy in the pool, never changes, and is punched out of the pool
//!   when its last sharer has left.
//! - A region can leave at any time (see [`RegionHandle::exit`]) and waits for one window at most,
//!   even if the worker is stopped, starving, or in the middle of that region.
//! - Regions of one [`Engine`] share with each other and with nobody else.
//!
//! # What is not promised
//! - A child process has nothing of a region (`MADV_DONTFORK`): whoever touches it there gets `SIGSEGV`.
//! - The owner changes neither mappings nor protection of a region, nor drops its pages: `mprotect` and
//!   `mremap` are undone by the next merge or make it fail, and `MADV_DONTNEED` shows what the pool
//!   holds there, be it another region's. Pages are given up by [`RegionAccess::discard`].
//! - I/O that uses a page's frame may be lost, unless the page is pinned ([`RegionAccess::pin`]).
//!
//! # Vocabulary
//! KSM's: a *slot* is a region's place in the *scan ring*; the *cursor* walks it. A page's *item*
//! is what is known of it. A calm page is *unstable* knowledge until a partner is found; then its
//! content becomes a *stable page* in the *pool*.
//!
//! # Modules
//! Layers, the highest first. A layer imports only layers below it (`layers`, a rule of the house).
//! | module | holds | kind |
//! |---|---|---|
//! | `engine` | [`Engine`], [`RegionHandle`]: what users see | thin |
//! | [`host`] | what the kernel offers, asked before there is an engine | system calls |
//! | **`protocol`** | **locks and threads** | |
//! | `core` | batch, exit, unmerge, reap: the protocol | locks |
//! | `worker` | the thread | thin |
//! | `merge_now`, `discard` | what a caller has done at once, on its own thread | protocol |
//! | `scan_state` | what the protocol asks of the worker's state, as a trait | pure |
//! | `ring` | slots and cursor | pure |
//! | `control` | [`Run`], idleness | pure |
//! | `advisor` | pages of a batch, rest after it | pure |
//! | `stopwatch` | what a batch takes | thin |
//! | **`scan`** | **one window of a region** | |
//! | `visit`, `tracked` | what changed, what to merge: in each pass, or as a dirty log says | policy |
//! | **`merge`** | **pages become shared, and private again** | |
//! | `domain` | what the worker mutex guards | state |
//! | `partners` | where a page finds its equal: at its place, then elsewhere | policy |
//! | `plan` | what a window's visit found worth trying | policy |
//! | `planned`, `apply`, `protected` | protect, compare again, apply, wake | mechanism |
//! | `group` | how many pages are protected together | pure |
//! | `fill` | places get the content that two pages share | mechanism |
//! | `base_block` | a block becomes one mapping of a block of places | mechanism |
//! | `huge` | which huge pages are split | policy |
//! | `tuning` | from which on a step is worth it | pure |
//! | `discard` | pages that their owner gives up | mechanism |
//! | `pin` | pages that keep their frames for a device's I/O | locks |
//! | `unmerge` | private copies for all | mechanism |
//! | `reclaim` | pool pages that nobody shares go back | mechanism |
//! | **`backing`** | **the kernel behind a trait, and its model for tests** | system calls |
//! | `mapping` | reserved ranges | system calls |
//! | `racing` | loads from memory that others write to | unsafe |
//! | `process_memory` | [`ProcessMemory`]: what the process and the pool hold | system calls |
//! | **`index`** | **where equal contents are** | |
//! | `stable` | stable pages: what the places hold, who shares it | pure |
//! | `unstable` | calm pages that found no equal yet | pure |
//! | `layouts` | which places of the pool stand for which guest pages | pure |
//! | `fingerprint`, `prehashed` | hash and zero test; maps by hash | pure |
//! | **`pages`** | **a region's pages** | |
//! | `region` | a region, its lock, its `exiting` flag | locks |
//! | `pins` | pages that devices use, and what is replaced: who waits for whom | locks |
//! | `item`, `region_items` | 8 bytes for each page; counts; VMAs | pure |
//! | `backoff` | how long a busy page is left alone | pure |
//! | `dirty` | [`DirtySource`]: who can tell what was written to | pure |
//! | **`base`** | **what every layer uses** | |
//! | `budget` | [`MemoryGauge`]; what is promised of the memory that is left | locks |
//! | `vmas` | mappings of a domain, and of the process | pure |
//! | `pace` | [`Pace`]: how fast the worker scans | pure |
//! | `page` | units and runs | pure |
//! | `stats` | [`Stats`], [`RegionStats`] | pure |
//! | `complaints` | warnings, said now and then | thin |
//! | `failpoint` | system calls that fail on demand, for tests | thin |
//! | `mutant` | mistakes that the protocol's models must catch | pure |
//! | `sync` | locks and what poison means | thin |
//!
//! # Locks
//! Total order, outermost first; a thread may skip locks but never go back:
//! 1. the *worker mutex* (`Shared::scanner`): a batch, a reap, an unmerge, a window of a `merge now` or
//!    of a discard, or an order to stop, which waits for those. Exits never take it.
//! 2. *region locks* (`Region::lock`), for reading by the holder of 1, at most two at a time and
//!    never one twice, and by a thread that pins pages and holds nothing else; for writing by the
//!    exit path, which holds nothing else.
//! 3. the *control lock* (`Shared::control`): orders to the worker.
//! 4. the *ring lock* (`Shared::ring`): slots and cursor. Never held over work.
//! 5. leaves: `Shared::published`, `Region::stats`, `Region::pins`, `Budget::state`. An unmerge waits
//!    for memory with 1 and 2 held, and lets go of both when the region exits or an order comes. A pin
//!    waits with 2 held until the range that it overlaps is released.
//!
//! A region's last reference is never dropped under 2, 4 or 5.
//!
//! `core::models` runs all of this under loom, with every mistake that `mutant` names; the table
//! of invariants is in ARCHITECTURE.md, section 4.

#![warn(clippy::print_stdout, clippy::print_stderr)]

mod backing;
mod base;
mod engine;
pub mod host;
mod index;
mod merge;
mod pages;
mod protocol;
mod scan;

pub use backing::mapping::{Mapping, MappingError};
pub use backing::process_memory::ProcessMemory;
pub use base::budget::{Headroom, MemoryGauge};
pub use base::pace::{AdvisorMode, Pace, PaceError};
pub use base::page::{PAGE_SIZE_BYTES, PAGE_WORDS, PageBuf};
pub use base::stats::{RegionStats, Stats};
pub use engine::{Engine, EngineError, PinnedPages, RegionAccess, RegionHandle, Settings};
pub use pages::dirty::{DirtySource, PageSet};
pub use pages::pins::AccessError;
pub use pages::region::RegionId;
pub use protocol::control::Run;
pub use protocol::core::ExitPath;
pub use protocol::merge_now::{MergeNowError, MergedNow};
