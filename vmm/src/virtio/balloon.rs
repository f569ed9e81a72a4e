//! virtio-balloon: memory that a guest gives back to its host (virtio 1.2, section 5.5).
//!
//! The guest names pages by two queues: those that the balloon takes (inflate), when the host asks for
//! them, and those that it just does not use (free page reporting), unasked. Both are given up on the
//! monitor's thread for that (`lane`), and the guest does not use them before it is told that this
//! is done. Deflating gives nothing back: a page has memory again when it is written to.
//!
//! Of what the guest names, pages that are no RAM are left out, and the request counts as failed. The
//! guest may name any page that is its own, as it may write to it.
//!
//! Rejected: free page hinting. A guest that runs out of memory takes hinted pages back without a word,
//! and they would be given up under it; reporting has the guest wait.

mod counts;
mod handle;
mod lane;
mod ram_pages;
mod request;
mod statistics;

use std::fmt;
use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::Queue;

pub use self::counts::BalloonCounts;
pub use self::handle::BalloonHandle;
pub use self::lane::{Discard, DiscardThread, Discards};
use self::lane::{Lane, Outcome, Polled};
use self::ram_pages::{FRAME_BYTES, RamPages, Runs};
use self::request::{Failure, frame_numbers, read, whole_frames};
pub use self::statistics::BalloonStatistics;
use super::chain::{Buffers, CHAIN_LENGTH_MAX};
use super::ring::{self, Finished};
use super::{
    Activation, Budget, Device, GuestMemory, LogLimit, Progress, RingError, Served, Settle, Waker,
};
use crate::config::BalloonConfig;

/// `VIRTIO_BALLOON_F_STATS_VQ` (5.5.3).
const F_STATS_VQ: u32 = 1;
/// `VIRTIO_BALLOON_F_DEFLATE_ON_OOM`.
const F_DEFLATE_ON_OOM: u32 = 2;
/// `VIRTIO_BALLOON_F_PAGE_REPORTING`.
const F_PAGE_REPORTING: u32 = 5;
/// Where the driver writes how many pages the balloon has: `actual` (5.5.4).
const ACTUAL_OFFSET: u64 = 4;
/// The queue of statistics, where there is one: the two before it are always there.
const STATISTICS_QUEUE: u32 = 2;
/// What a request costs of a turn on the event loop, in bytes moved: it is read, sorted and handed on.
const REQUEST_COST: u64 = 64 << 10;

/// A balloon device.
#[derive(Debug)]
pub struct Balloon {
    handle: BalloonHandle,
    features: u64,
    queue_sizes: Vec<u16>,
    counts: Arc<BalloonCounts>,
    active: Option<Active>,
    log_limit: LogLimit,
}

#[derive(Debug)]
struct Active {
    memory: Arc<GuestMemory>,
    ram: RamPages,
    queues: Vec<(Role, Queue)>,
    label: Arc<str>,
}

/// What a queue is for.
#[derive(Debug)]
enum Role {
    Inflate(GiveUp),
    Deflate,
    /// With the buffer that the driver gets back when it is to fill it anew.
    Statistics(Option<u16>),
    Report(GiveUp),
}

/// A queue of pages to be given up.
#[derive(Debug)]
struct GiveUp {
    lane: Arc<Lane>,
    /// The request that lies in the lane.
    head: Option<u16>,
}

impl Balloon {
    /// A device as configured, with what is absent filled in, that no driver has set up. Pages of its
    /// guest are given up by `discard`, in the line of `discards`.
    ///
    /// # Errors
    /// No timer can be made.
    pub fn new(
        config: &BalloonConfig,
        discard: &Arc<dyn Discard>,
        discards: &Discards,
        counts: Arc<BalloonCounts>,
    ) -> io::Result<Balloon> {
        let has_statistics = config.stats_polling_interval_s > 0;
        let reports = config.free_page_reporting == Some(true);
        let features = 1 << VIRTIO_RING_F_EVENT_IDX
            | u64::from(has_statistics) << F_STATS_VQ
            | u64::from(config.deflate_on_oom) << F_DEFLATE_ON_OOM
            | u64::from(reports) << F_PAGE_REPORTING;
        let queues = 2 + usize::from(has_statistics) + usize::from(reports);
        let lanes = [(); 2].map(|()| Lane::new(discard.clone(), discards.clone()));
        Ok(Balloon {
            handle: BalloonHandle::new(config, lanes)?,
            features,
            queue_sizes: vec![CHAIN_LENGTH_MAX; queues],
            counts,
            active: None,
            log_limit: LogLimit::new(),
        })
    }

    /// For others than its driver.
    pub fn handle(&self) -> BalloonHandle {
        self.handle.clone()
    }
}

impl Device for Balloon {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, bytes: &mut [u8]) {
        bytes.fill(0);
        let space = self.handle.0.config_space();
        let rest = usize::try_from(offset).ok().and_then(|at| space.get(at..));
        for (byte, value) in bytes.iter_mut().zip(rest.unwrap_or_default()) {
            *byte = *value;
        }
    }

    fn write_config(&mut self, offset: u64, bytes: &[u8]) {
        if let (ACTUAL_OFFSET, Ok(pages)) = (offset, bytes.try_into()) {
            self.handle.0.set_actual_pages(u32::from_le_bytes(pages));
        }
    }

    /// The queues of features that the driver did not take are not there, and those behind them move
    /// up (5.5.2), as Linux has it.
    fn activate(&mut self, activation: Activation) {
        let has = |bit: u32| activation.features & 1 << bit != 0;
        let [inflate, report] = &self.handle.0.lanes;
        let give_up = |lane: &Arc<Lane>| GiveUp {
            lane: lane.clone(),
            head: None,
        };
        let mut roles = vec![Role::Inflate(give_up(inflate)), Role::Deflate];
        roles.extend(has(F_STATS_VQ).then_some(Role::Statistics(None)));
        if has(F_PAGE_REPORTING) {
            report.connect(activation.doorbells.clone(), roles.len());
            roles.push(Role::Report(give_up(report)));
        }
        inflate.connect(activation.doorbells, 0);
        self.handle.0.connect(Some(activation.interrupt));
        self.active = Some(Active {
            ram: RamPages::of(&activation.memory),
            memory: activation.memory,
            queues: roles.into_iter().zip(activation.queues).collect(),
            label: activation.label,
        });
    }

    fn process_queue(&mut self, index: usize) -> Result<Progress, RingError> {
        let Some(active) = &mut self.active else {
            return Ok(Progress::default());
        };
        let Some((role, queue)) = active.queues.get_mut(index) else {
            return Ok(Progress::default());
        };
        let (log_limit, label) = (&mut self.log_limit, &*active.label);
        let mut service = Service {
            ram: &active.ram,
            memory: &active.memory,
            counts: &self.counts,
            complain: |problem: &dyn fmt::Display| log_limit.warn(label, problem),
        };
        match role {
            Role::Inflate(give_up) => service.serve_pages(queue, give_up, Kind::Inflate),
            Role::Report(give_up) => service.serve_pages(queue, give_up, Kind::Report),
            Role::Deflate => ring::drain(queue, service.memory, Budget::SLICE, None, |_| {
                BalloonCounts::add(&self.counts.deflations, 1);
                Some(ACKNOWLEDGED)
            }),
            Role::Statistics(held) => service.serve_statistics(queue, held, &self.handle),
        }
    }

    fn wakers(&self) -> Vec<Waker> {
        let queue = STATISTICS_QUEUE;
        let waker = self.handle.0.waker();
        waker.map(|fd| Waker { fd, queue }).into_iter().collect()
    }

    fn reset(&mut self) {
        self.active = None;
        self.handle.0.connect(None);
        self.handle.0.lanes.iter().for_each(|lane| lane.abandon());
    }

    fn settle(&self) -> Option<Settle> {
        let lanes = self.handle.0.lanes.clone();
        Some(Box::new(move || {
            lanes.iter().for_each(|lane| lane.settle());
        }))
    }
}

/// What becomes of every request: its buffer goes back with nothing written.
const ACKNOWLEDGED: Served = Served {
    used_bytes: 0,
    cost_bytes: REQUEST_COST,
};

/// How pages are named.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// By numbers in the buffers.
    Inflate,
    /// By the buffers themselves.
    Report,
}

/// What a turn serves requests with.
struct Service<'a, F> {
    ram: &'a RamPages,
    memory: &'a GuestMemory,
    counts: &'a BalloonCounts,
    complain: F,
}

impl<F: FnMut(&dyn fmt::Display)> Service<'_, F> {
    /// Hands the next request to the lane, once the one before is done.
    fn serve_pages(
        &mut self,
        queue: &mut Queue,
        give_up: &mut GiveUp,
        kind: Kind,
    ) -> Result<Progress, RingError> {
        let finished = match give_up.lane.poll() {
            Polled::Busy => return Ok(Progress::default()),
            Polled::Idle => None,
            Polled::Done(outcome) => {
                self.note(kind, outcome);
                let head = give_up.head.take();
                head.map(|head| Finished {
                    head,
                    served: ACKNOWLEDGED,
                })
            }
        };
        let (memory, lane, head) = (self.memory, &give_up.lane, &mut give_up.head);
        let drained = ring::drain(queue, memory, Budget::SLICE, finished, |chain| {
            let chain_head = chain.head_index();
            let runs = match Buffers::of(chain).map_err(Failure::from) {
                Ok(buffers) => self.runs_of(kind, &buffers),
                Err(failure) => Err(failure),
            };
            let runs = runs.unwrap_or_else(|failure| {
                self.fail(kind, &failure);
                Runs::default()
            });
            if runs.is_empty() {
                return Some(ACKNOWLEDGED);
            }
            *head = Some(chain_head);
            lane.submit(runs);
            None
        })?;
        // The lane rings by itself.
        Ok(Progress {
            starved: false,
            ..drained
        })
    }

    /// The pages that a request names.
    fn runs_of(&mut self, kind: Kind, buffers: &Buffers) -> Result<Runs, Failure> {
        let frames = match kind {
            Kind::Inflate => frame_numbers(self.memory, &buffers.readable)?,
            Kind::Report => whole_frames(&buffers.writable),
        };
        let named: u64 = frames.iter().map(|frames| frames.end - frames.start).sum();
        let pages = frames
            .into_iter()
            .flat_map(|frames| self.ram.pages(frames))
            .collect::<Vec<_>>();
        let found: u64 = pages.iter().map(|pages| pages.len() as u64).sum();
        if found < named {
            self.fail(kind, &Failure::NoRam(named - found));
        }
        Ok(Runs::of(pages))
    }

    fn note(&mut self, kind: Kind, outcome: Outcome) {
        if let Some(failure) = outcome.failure {
            self.fail(kind, &Failure::Discard(failure));
        }
        match kind {
            Kind::Inflate => BalloonCounts::add(&self.counts.inflations, 1),
            Kind::Report => {
                let bytes = FRAME_BYTES * u64::from(outcome.pages);
                BalloonCounts::add(&self.counts.reports, 1);
                BalloonCounts::add(&self.counts.reported_bytes, bytes);
            }
        }
    }

    fn fail(&mut self, kind: Kind, failure: &Failure) {
        (self.complain)(failure);
        let count = match kind {
            Kind::Inflate => &self.counts.failures,
            Kind::Report => &self.counts.failed_reports,
        };
        BalloonCounts::add(count, 1);
    }

    /// Keeps the driver's buffer until it is to be filled anew (5.5.6.3).
    fn serve_statistics(
        &mut self,
        queue: &mut Queue,
        held: &mut Option<u16>,
        handle: &BalloonHandle,
    ) -> Result<Progress, RingError> {
        if held.is_some() && !handle.0.is_due() {
            return Ok(Progress::default());
        }
        let finished = held.take().map(|head| Finished {
            head,
            served: ACKNOWLEDGED,
        });
        let memory = self.memory;
        let drained = ring::drain(queue, memory, Budget::SLICE, finished, |chain| {
            *held = Some(chain.head_index());
            let buffers = Buffers::of(chain).map_err(Failure::from);
            let read = buffers.and_then(|buffers| {
                let unit = statistics::ENTRY_BYTES;
                read(
                    memory,
                    &buffers.readable,
                    unit,
                    statistics::BUFFER_BYTES_MAX,
                )
            });
            match &read {
                Ok(_) => BalloonCounts::add(&self.counts.statistics, 1),
                Err(failure) => {
                    (self.complain)(failure);
                    BalloonCounts::add(&self.counts.bad_statistics, 1);
                }
            }
            let told = read.ok().map(|buffer| statistics::parse(&buffer));
            handle.0.note_statistics(told);
            None
        })?;
        // The timer rings by itself.
        Ok(Progress {
            starved: false,
            ..drained
        })
    }
}

#[cfg(test)]
mod tests;
