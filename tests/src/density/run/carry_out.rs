//! One run: the host's settings, the cgroup, the server, the workload, and everything back again.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::interval;

use super::error::RunError;
use super::progress::Progress;
use super::record::Record;
use super::sampling;
use super::server::Server;
use super::stage::Stage;
use super::stop::StopSignals;
use super::watch;
use crate::density::guests::{DOMAIN, Images};
use crate::density::host::{Group, HostSettings, MmapLockWatch, Sampler};
use crate::density::model::{Arm, Engine, Latency, MmapLock, Oracle, Run};
use crate::density::oracle::{count::count, memory::read_fleet};
use crate::density::workloads;

/// Time between two looks at the mmap lock.
const LOCK_INTERVAL: Duration = Duration::from_secs(1);
/// How a guest ended whose server the kernel's OOM killer ended.
const OOM_KILLED: &str = "oom_kill";

/// How a run ended.
pub(crate) enum Ended {
    /// By itself, with or without errors.
    Over(Box<Run>),
    /// A signal ended it; what was found until then is of no use.
    Interrupted,
}

/// What is found beside the record.
#[derive(Default)]
struct Findings {
    settings: Vec<(String, String)>,
    peak_bytes: u64,
    oom_kills: u64,
    latency: Option<Latency>,
    oracle: Option<Oracle>,
    mmap_lock: Option<MmapLock>,
}

/// Carries `arm` out. Whatever goes wrong is in the run that is returned, and nothing of it is left
/// on the host but the settings, which are the next run's to change.
pub(crate) async fn carry_out(
    arm: Arm,
    images: &Images,
    settings: &mut HostSettings,
    stop: &mut StopSignals,
    progress: &Progress,
) -> Ended {
    let record = Arc::new(Record::new());
    let mut findings = Findings::default();
    let shown = progress.follow(Arc::clone(&record));
    let ended = in_group(arm, images, settings, stop, (&record, &mut findings)).await;
    shown.abort();
    match ended {
        Ok(true) => {}
        Ok(false) => return Ended::Interrupted,
        Err(error) => record.error(error.to_string()),
    }
    let found = record.take();
    Ended::Over(Box::new(Run {
        arm,
        settings: findings.settings,
        guests: found.guests,
        samples: found.samples,
        marks: found.marks,
        peak_bytes: findings.peak_bytes,
        oom_kills: findings.oom_kills,
        latency: findings.latency,
        oracle: findings.oracle,
        mmap_lock: findings.mmap_lock,
        errors: found.errors,
    }))
}

/// False if a signal came.
async fn in_group(
    arm: Arm,
    images: &Images,
    settings: &mut HostSettings,
    stop: &mut StopSignals,
    (record, findings): (&Arc<Record>, &mut Findings),
) -> Result<bool, RunError> {
    settings.apply_engine(arm.engine)?;
    settings.apply_thp(arm.thp)?;
    findings.settings = settings.snapshot()?;
    let unread = RunError::os("reading the guests' files");
    images.read_into_page_cache().map_err(unread)?;
    let group = Group::new(arm.memory_limit_bytes, settings)?;
    record.phase("starting the server");
    let mut server = Server::start(&group, settings).await?;
    let sampler = Sampler::new(server.pid(), &group, record.began())?;

    // Not every kernel has the tracepoints, and a run goes on without.
    let mut lock = MmapLockWatch::start(server.pid(), &group).ok();
    let mut followers = JoinSet::new();
    let client = server.client().clone();
    followers.spawn(watch::follow_list(client.clone(), Arc::clone(record)));
    let samples = sampling::follow(sampler, client.clone(), arm.engine, Arc::clone(record));
    followers.spawn(samples);
    let mut stage = Stage::new(arm, client, Arc::clone(record), images.clone());
    let played = tokio::select! {
        played = play(&mut stage, server.pid(), &mut findings.oracle) => Some(played),
        died = server.died() => Some(Err(died)),
        () = stop.came() => None,
        () = look_at(&mut lock) => None,
    };
    findings.mmap_lock = lock.and_then(|mut lock| lock.total().ok());
    // The last look at the guests: what the server's stop does to them is no finding.
    if let Ok(vms) = server.client().list_vms().await {
        watch::note(record, &vms);
    }
    followers.shutdown().await;
    findings.latency = stage.latency;
    drop(stage);
    record.phase("stopping the server");
    let stopped = server.stop().await;
    findings.peak_bytes = group.usage().peak_bytes()?;
    findings.oom_kills = group.usage().oom_kills()?;
    group.remove()?;
    settings.forget_run()?;
    let Some(played) = played else {
        return Ok(false);
    };
    match played {
        Err(RunError::ServerDied { .. }) if findings.oom_kills > 0 => note_oom_kill(record),
        played => played?,
    }
    stopped?;
    Ok(true)
}

/// The workload, then the look at the guests' memory.
async fn play(stage: &mut Stage, pid: u32, oracle: &mut Option<Oracle>) -> Result<(), RunError> {
    workloads::play(stage).await?;
    if workloads::has_oracle(stage.arm.workload) {
        stage.record.phase("reading the guests' memory");
        stage.pause_all().await?;
        *oracle = Some(read_oracle(stage, pid).await?);
    }
    Ok(())
}

async fn read_oracle(stage: &Stage, pid: u32) -> Result<Oracle, RunError> {
    let vms = stage.client.list_vms().await?;
    let alive = vms.iter().filter(|vm| vm.end_reason.is_none());
    let sizes_bytes: Vec<u64> = alive.map(|vm| vm.mem_size_bytes).collect();
    // Gigabytes are hashed: on a thread of its own, so that signals are heeded.
    let read = tokio::task::spawn_blocking(move || read_fleet(pid, &sizes_bytes));
    let fleet = read.await.map_err(|error| RunError::Os {
        what: "read the guests' memory",
        source: error.into(),
    })??;
    let mut oracle = count(&fleet);
    if stage.arm.engine == Engine::Samepage {
        // Zeros that our engine gave back are holes, which look untouched from outside. Where kernel
        // KSM gave them back there is its zero page.
        let domain = stage.client.describe_domain(DOMAIN).await?;
        oracle.touched_pages += domain.stats.pages_zero;
        oracle.zero_pages += domain.stats.pages_zero;
    }
    Ok(oracle)
}

/// Empties the kernel's buffers once a second, for ever.
async fn look_at(lock: &mut Option<MmapLockWatch>) {
    let mut ticks = interval(LOCK_INTERVAL);
    loop {
        ticks.tick().await;
        if let Some(lock) = lock {
            lock.look();
        }
    }
}

/// That the limit ends the server is a finding about the engine, and no failure of the benchmark.
fn note_oom_kill(record: &Record) {
    record.mark("the OOM killer ended the server");
    for (index, guest) in record.guests() {
        if guest.launch_s.is_some() {
            record.ended(index, OOM_KILLED);
        }
    }
}
