//! A guest that times its writes, beside guests that keep every CPU busy and the merge engine too.

use std::time::Duration;

use pageload_workload::Workload as Pageload;
use vmm::{WriteLatency, WriteProbe};

use crate::density::guests::Kind;
use crate::density::model::{Fleet, Latency, Quantiles};
use crate::density::run::{RunError, Stage};

/// Memory of the guest that times its writes, and of those that share with it.
const PROBE_MEM_MIB: u64 = 64;
/// Least time between two timed writes.
const PROBE_US: u64 = 500;
/// Of the busy guests, those that write to what they share without a pause, so that merging goes on.
const WRITERS: usize = 4;
/// Memory of the other busy ones: the least that they can work with.
const BUSY_MEM_MIB: u64 = 3;
/// Time to merge the memory of the probe before anything is timed.
const CALM: Duration = Duration::from_secs(8);
/// Writes before this are not counted: the first ones meet a fleet that has only just become busy.
const WARM_UP: Duration = Duration::from_secs(3);
const MEASURED: Duration = Duration::from_secs(30);

const US_PER_S: f64 = 1e6;

/// Runs them.
pub(crate) async fn play(stage: &mut Stage) -> Result<(), RunError> {
    let (Fleet::Vms(busy) | Fleet::UntilFull(busy)) = stage.arm.fleet;
    let Some(probe) = stage.launch(probe_kind()).await? else {
        stage.record.error("the probe was refused".to_owned());
        return Ok(());
    };
    let writers = WRITERS.min(busy);
    stage.launch_all(writers, writer_kind).await?;
    stage.record.phase("merging");
    stage.hold(CALM).await;
    stage.launch_all(busy - writers, busy_kind).await?;
    stage.wait_ready().await;
    let Some(probe) = stage.record.guest(probe) else {
        return Ok(());
    };
    // Each byte begins a window, the first one the writes too.
    stage.type_byte(&probe.id).await?;
    stage.record.phase("timing writes");
    stage.hold(WARM_UP).await;
    stage.type_byte(&probe.id).await?;
    stage.record.mark("timing");
    stage.hold(MEASURED).await;
    let vm = stage.client.describe_vm(&probe.id).await?;
    match vm.report.and_then(|report| report.probe) {
        Some(found) if found.shared.count > 0 => stage.latency = Some(latency(&found, busy)),
        _ => stage.record.error(format!("{}: timed no write", probe.id)),
    }
    Ok(())
}

fn probe_kind() -> Kind {
    Kind::Pageload {
        work: Pageload::prober(1, PROBE_US),
        mem_mib: PROBE_MEM_MIB,
    }
}

fn writer_kind(number: usize) -> Kind {
    Kind::Pageload {
        work: Pageload::writer(number as u64 + 2),
        mem_mib: PROBE_MEM_MIB,
    }
}

fn busy_kind(number: usize) -> Kind {
    Kind::Pageload {
        work: Pageload::busy((number + WRITERS) as u64 + 2),
        mem_mib: BUSY_MEM_MIB,
    }
}

fn latency(found: &WriteProbe, busy_vcpus: usize) -> Latency {
    Latency {
        shared: quantiles(&found.shared),
        private: quantiles(&found.control),
        exit: quantiles(&found.exit),
        busy_vcpus,
    }
}

fn quantiles(found: &WriteLatency) -> Quantiles {
    let us = |ns| Duration::from_nanos(ns).as_secs_f64() * US_PER_S;
    Quantiles {
        count: found.count,
        p50_us: us(found.p50_ns),
        p99_us: us(found.p99_ns),
        p999_us: us(found.p99_9_ns),
        max_us: us(found.max_ns),
    }
}
