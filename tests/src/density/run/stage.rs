//! What a workload has in hand: guests to launch, waits, and the one rule of when memory is at rest.

use std::sync::Arc;
use std::time::{Duration, Instant};

use samepage::client::{Client, ClientError, ConsoleConnection};
use samepage::request::{ActionType, DesiredState};
use tokio::io::AsyncWriteExt;
use tokio::task::JoinSet;

use super::error::RunError;
use super::record::{Counts, GuestIndex, Record};
use super::rest::is_at_rest;
use super::sampling::ksm_scans;
use super::wait::poll_until;
use super::watch;
use crate::density::guests::{Images, Kind};
use crate::density::model::{Arm, Engine, Latency};

/// How long memory at rest is measured.
const MEASURED: Duration = Duration::from_secs(10);
/// Scans of kernel KSM that begin or end after the guests are ready, before its memory is at rest: it
/// merges a page that two scans have found unchanged. Its slow settings change little in seconds.
const KSM_SCANS: u64 = 3;
/// Longest wait for one guest to be ready, and for each more: boots share the CPUs.
const READY_TIME: Duration = Duration::from_secs(120);
const READY_TIME_EACH: Duration = Duration::from_secs(15);

/// A server and its guests, from the workload's side.
pub(crate) struct Stage {
    pub(crate) arm: Arm,
    pub(crate) client: Client,
    pub(crate) record: Arc<Record>,
    images: Images,
    /// Consoles that are followed.
    followed: JoinSet<()>,
    /// Streams by which something was typed. A stream that is closed may take what was typed along.
    typed: Vec<ConsoleConnection>,
    /// What the probe of [`Workload::Latency`](crate::density::model::Workload::Latency) found.
    pub(crate) latency: Option<Latency>,
}

impl Stage {
    pub(crate) fn new(arm: Arm, client: Client, record: Arc<Record>, images: Images) -> Stage {
        Stage {
            arm,
            client,
            record,
            images,
            followed: JoinSet::new(),
            typed: Vec::new(),
            latency: None,
        }
    }

    /// Launches a guest, as a user would: creates it and starts it. `None` if the server refuses;
    /// the record has its reason then.
    pub(crate) async fn launch(&mut self, kind: Kind) -> Result<Option<GuestIndex>, RunError> {
        let number = self.record.counts().asked;
        let id = format!("{}-{number:03}", kind.name());
        let config = self.images.config(kind, self.arm);
        let index = self.record.asked(id.clone());
        let begun = Instant::now();
        let launched = match self.client.create_vm(&id, &config).await {
            Ok(()) => self.client.act(&id, ActionType::InstanceStart).await,
            Err(error) => Err(error),
        };
        match launched {
            Ok(()) => {}
            Err(ClientError::Fault { message, .. }) => {
                self.record.refused(index, message);
                // What was created and not started takes no memory, but its name.
                let _ = self.client.delete_vm(&id).await;
                return Ok(None);
            }
            Err(error) => return Err(error.into()),
        }
        self.record.launched(index, begun.elapsed().as_secs_f64());
        if kind.talks() {
            let expected = self.images.digests(kind);
            let (client, record) = (self.client.clone(), Arc::clone(&self.record));
            self.followed.spawn(watch::follow_console(
                client,
                record,
                (index, kind),
                expected,
            ));
        }
        Ok(Some(index))
    }

    /// Launches `count` guests one after the other, without waiting for any to be ready.
    pub(crate) async fn launch_all(
        &mut self,
        count: usize,
        kind: impl Fn(usize) -> Kind,
    ) -> Result<(), RunError> {
        for number in 0..count {
            self.record
                .phase(format!("launching {} of {count}", number + 1));
            if let Some(refusal) = self.launch_or_refusal(kind(number)).await? {
                // A fleet of a given size that does not fit has no figures to compare.
                self.record
                    .error(format!("guest {number} was refused: {refusal}"));
            }
        }
        Ok(())
    }

    async fn launch_or_refusal(&mut self, kind: Kind) -> Result<Option<String>, RunError> {
        if self.launch(kind).await?.is_some() {
            return Ok(None);
        }
        let refused = self.record.guests().pop();
        Ok(refused.and_then(|(_, guest)| guest.refusal))
    }

    /// Launches guests until one is refused or ended, or there are `most`. As many boot at a time as
    /// there are CPUs, so that it is guests at work that fill the memory, and not boots.
    pub(crate) async fn launch_until_full(
        &mut self,
        most: usize,
        kind: impl Fn(usize) -> Kind,
        pause: Duration,
    ) -> Result<(), RunError> {
        let booting_max = std::thread::available_parallelism().map_or(1, usize::from);
        for number in 0..most {
            self.record.phase(format!("filling: guest {}", number + 1));
            if self.launch(kind(number)).await?.is_none() || self.is_full() {
                break;
            }
            let has_room = |counts: Counts| counts.running - counts.ready < booting_max;
            self.wait_for(READY_TIME, |record| {
                let counts = record.counts();
                has_room(counts) || counts.lost > 0
            })
            .await;
            self.hold(pause).await;
            if self.is_full() {
                break;
            }
        }
        let limit = if self.is_full() {
            "full"
        } else {
            "all launched"
        };
        self.record.mark(limit);
        Ok(())
    }

    /// Whether the limit was reached: a guest was refused or ended. (The OOM killer ends the server,
    /// and with it the run.)
    pub(crate) fn is_full(&self) -> bool {
        let counts = self.record.counts();
        counts.refused > 0 || counts.lost > 0
    }

    /// Waits until every guest that still runs is ready.
    pub(crate) async fn wait_ready(&mut self) {
        let running = self.record.counts().running;
        let time = READY_TIME + READY_TIME_EACH * u32::try_from(running).unwrap_or(u32::MAX);
        self.record.phase("waiting until all are ready");
        let all = |record: &Record| {
            let counts = record.counts();
            counts.ready == counts.running
        };
        if !self.wait_for(time, all).await {
            let counts = self.record.counts();
            let late = counts.running - counts.ready;
            self.record
                .error(format!("not ready within {time:?}: {late} guests"));
        }
        self.record.mark("last guest ready");
    }

    /// Waits until memory is at rest, then measures it.
    pub(crate) async fn rest(&mut self) {
        let since_s = self.record.now_s();
        self.record.phase("waiting for memory to come to rest");
        let scans = ksm_scans() + KSM_SCANS;
        let has_scanned = || !self.arm.engine.is_ksm() || ksm_scans() >= scans;
        let calm =
            |record: &Record| has_scanned() && is_at_rest(&record.usage(), since_s, record.now_s());
        // Who does not come to rest is measured all the same, later than the others: the marks tell.
        self.wait_for(self.rest_time(), calm).await;
        self.record.mark("at rest");
        self.record.phase("measuring at rest");
        self.hold(MEASURED).await;
    }

    /// The longest wait for rest. The slow settings of KSM need minutes for a large fleet.
    fn rest_time(&self) -> Duration {
        Duration::from_secs(match self.arm.engine {
            Engine::KsmDefaults | Engine::KsmAdvisor => 180,
            Engine::Off | Engine::KsmFast | Engine::Samepage => 60,
        })
    }

    /// Waits for a condition of the record; false if it does not come within `time`.
    pub(crate) async fn wait_for(
        &self,
        time: Duration,
        condition: impl Fn(&Record) -> bool,
    ) -> bool {
        poll_until(Instant::now() + time, || condition(&self.record)).await
    }

    /// Lets the guests go on for `time`.
    pub(crate) async fn hold(&self, time: Duration) {
        self.wait_for(time, |_| false).await;
    }

    /// Types one byte on the console of a guest.
    pub(crate) async fn type_byte(&mut self, id: &str) -> Result<(), RunError> {
        let mut stream = self.client.console_stream(id).await?;
        let sent = async {
            stream.write_all(b"\n").await?;
            stream.flush().await
        };
        sent.await.map_err(RunError::os("type on a console"))?;
        self.typed.push(stream);
        Ok(())
    }

    /// Types one byte on the console of every guest that runs.
    pub(crate) async fn type_to_all(&mut self) -> Result<(), RunError> {
        for (_, guest) in self.record.guests() {
            if guest.launch_s.is_some() && guest.ended.is_none() {
                match self.type_byte(&guest.id).await {
                    // It may have been ended since.
                    Ok(()) | Err(RunError::Client(ClientError::Fault { .. })) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }

    /// Stops a guest and removes it, as the workload has it.
    pub(crate) async fn remove(&self, index: GuestIndex) -> Result<(), RunError> {
        let Some(guest) = self.record.guest(index) else {
            return Ok(());
        };
        if guest.ended.is_none() {
            self.record.stops(index);
            self.client.act(&guest.id, ActionType::InstanceStop).await?;
            self.record.ended(index, "stopped");
        }
        self.client.delete_vm(&guest.id).await?;
        Ok(())
    }

    /// Stands all guests still, so that their memory can be read.
    pub(crate) async fn pause_all(&self) -> Result<(), RunError> {
        for (_, guest) in self.record.guests() {
            if guest.launch_s.is_some() && guest.ended.is_none() {
                self.client
                    .set_vm_state(&guest.id, DesiredState::Paused)
                    .await?;
            }
        }
        Ok(())
    }
}
