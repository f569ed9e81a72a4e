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
//!   last write; no write is lost. Readers never wait, writers wait for one run of pages at most.
//! - Bytes decide, never hashes.
//! - A stable page is a fresh copy in the pool, never changes, and is punched out of the pool
//!   when its last sharer has left.
//! - A region can leave at any time (see [`RegionHandle::exit`]) and waits for one batch at most,
//!   even if the worker is stopped, starving, or in the middle of that region.
//! - Regions of one [`Engine`] share with each other and with nobody else.
//!
//! # Vocabulary
//! KSM's: a *slot* is a region's place in the *scan ring*; the *cursor* walks it. A page's *item*
//! is what is known of it. A calm page is *unstable* knowledge until a partner is found; then its
//! content becomes a *stable page* in the *pool*.
//!
//! # Modules
//! | module | holds | kind |
//! |---|---|---|
//! | `engine` | [`Engine`], [`RegionHandle`]: what users see | thin |
//! | `worker` | the thread | thin |
//! | `shared` | batch, exit, unmerge, reap: the protocol | locks |
//! | `ring` | slots and cursor | pure |
//! | `region` | a region, its lock, its `exiting` flag | locks |
//! | `control` | [`Run`], [`Pace`], idleness | pure |
//! | `advisor` | [`AdvisorMode`]: pages of a batch, rest after it | pure |
//! | `scanner` | what the worker mutex guards | state |
//! | `visit`, `watched` | one window: what changed, what to merge | policy |
//! | `backoff` | how long a busy page is left alone | pure |
//! | `dirty` | [`DirtySource`]: who can tell what was written to | pure |
//! | `unstable` | calm pages that found no equal yet | pure |
//! | `merge`, `protected` | protect, compare again, swap, wake | mechanism |
//! | `merge_now` | one region at once, on its caller's thread | protocol |
//! | `unmerge` | private copies for all | mechanism |
//! | `item`, `items` | 8 bytes for each page; counts; VMAs | pure |
//! | `stable`, `pool_map` | stable pages, free pool pages | pure |
//! | `fingerprint` | hash and zero test | pure |
//! | `backing` | the kernel behind a trait, and its model for tests | system calls |
//! | `mapping` | reserved ranges | system calls |
//! | `page` | units and runs | pure |
//! | `stats` | [`Stats`], [`RegionStats`] | pure |
//! | `stopwatch` | what a batch takes | thin |
//! | `sync` | locks and what poison means | thin |
//!
//! # Locks
//! Total order, outermost first; a thread may skip locks but never go back:
//! 1. the *worker mutex* (`Shared::scanner`): a batch, a reap, an unmerge, or a window of a
//!    `merge now`. Exits never take it.
//! 2. *region locks* (`Region::lock`), for reading by the holder of 1, at most two at a time and
//!    never one twice; for writing by the exit path, which holds nothing else.
//! 3. the *control lock* (`Shared::control`): orders to the worker.
//! 4. the *ring lock* (`Shared::ring`): slots and cursor. Never held over work.
//! 5. leaves: `Shared::published`, `Region::stats`.
//!
//! A region's last reference is never dropped under 2, 4 or 5.

mod advisor;
mod backing;
mod backoff;
mod control;
mod dirty;
mod engine;
mod fingerprint;
mod item;
mod items;
#[expect(
    unsafe_code,
    reason = "maps, unmaps and reads memory that others write to"
)]
mod mapping;
mod merge;
mod merge_now;
mod page;
mod pool_map;
mod protected;
mod region;
mod ring;
mod scanner;
mod shared;
mod stable;
mod stats;
mod stopwatch;
mod sync;
mod unmerge;
mod unstable;
mod visit;
mod watched;
mod worker;

pub use advisor::AdvisorMode;
pub use control::{Pace, PaceError, Run};
pub use dirty::{DirtySource, PageSet};
pub use engine::{Engine, EngineError, RegionHandle, RegionMerger, Settings};
pub use mapping::{Mapping, MappingError};
pub use merge_now::{MergeNowError, MergedNow};
pub use page::{PAGE_SIZE_BYTES, PAGE_WORDS, PageBuf};
pub use region::RegionId;
pub use shared::ExitPath;
pub use stats::{RegionStats, Stats};
