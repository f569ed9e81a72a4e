//! Guests that load the same data, diverge, and converge.

use std::time::Duration;

use pageload_workload::{Begin, Plan, Workload as Pageload, WriteMode, layout};

use crate::density::guests::Kind;
use crate::density::model::Fleet;
use crate::density::run::{RunError, Stage};

const MEM_MIB: u64 = 64;
/// After the load, and after the guests have converged: time for every engine to merge.
const CALM: Duration = Duration::from_secs(10);
/// How long memory is measured at the end.
const MEASURED: Duration = Duration::from_secs(5);
/// Passes over memory in which all shared pages get a content of their own; as many for the way back.
const WAVE_PASSES: u64 = 8;
/// A pass takes this long, and the time for verifying all pages.
const PACE_MS: u64 = 1000;
/// Bound of each half of the wave, far beyond its length.
const WAVE_TIME: Duration = Duration::from_secs(180);

/// Runs them.
pub(crate) async fn play(stage: &mut Stage) -> Result<(), RunError> {
    match stage.arm.fleet {
        Fleet::Vms(vms) => stage.launch_all(vms, kind).await?,
        Fleet::UntilFull(most) => stage.launch_until_full(most, kind, Duration::ZERO).await?,
    }
    stage.wait_ready().await;
    stage.record.phase("merging what was loaded");
    stage.hold(CALM).await;
    stage.record.mark("diverging");
    stage.record.phase("diverging");
    let passes = passes_now(stage);
    stage.type_to_all().await?;
    // One more: the pass in which the input comes is not a whole one.
    wait_passes(stage, &passes, WAVE_PASSES + 1).await;
    stage.record.mark("diverged");
    stage.record.phase("converging");
    wait_passes(stage, &passes, 2 * WAVE_PASSES + 1).await;
    stage.record.mark("converged");
    stage.record.phase("merging what is alike again");
    stage.hold(CALM).await;
    stage.record.mark("at rest");
    stage.hold(MEASURED).await;
    Ok(())
}

fn kind(number: usize) -> Kind {
    let mut work = Pageload {
        seed: number as u64 + 1,
        write: WriteMode::Wave,
        begin: Begin::Input,
        pace_ms: PACE_MS,
        ..Pageload::default()
    };
    let plan = Plan::new(work, layout::page_count(MEM_MIB << 20));
    let shared_pages = plan.calm_pages() * u64::from(work.shared) / 100;
    work.writes_per_pass = shared_pages.div_ceil(WAVE_PASSES);
    Kind::Pageload {
        work,
        mem_mib: MEM_MIB,
    }
}

/// Passes that each guest has made.
fn passes_now(stage: &Stage) -> Vec<u64> {
    let guests = stage.record.guests();
    guests.iter().map(|(_, guest)| guest.rounds).collect()
}

/// Waits until every guest that still runs has made `more` passes.
async fn wait_passes(stage: &Stage, since: &[u64], more: u64) {
    let is_done = |record: &crate::density::run::Record| {
        let guests = record.guests().into_iter().map(|(_, guest)| guest);
        guests
            .zip(since)
            .filter(|(guest, _)| guest.launch_s.is_some() && guest.ended.is_none())
            .all(|(guest, before)| guest.rounds >= before + more)
    };
    if !stage.wait_for(WAVE_TIME, is_done).await {
        stage
            .record
            .error(format!("{more} passes not within {WAVE_TIME:?}"));
    }
}
