//! Guests that are launched one after the other and stay: `idle`, `agents`, `two-images`.

use std::time::Duration;

use crate::density::guests::Kind;
use crate::density::model::{Fleet, Workload};
use crate::density::run::{Record, RunError, Stage};

/// Rounds that each working guest does before anything is measured at rest.
const ROUNDS: u64 = 3;
/// How long they may take for these, once all are ready.
const ROUNDS_TIME: Duration = Duration::from_secs(60);
/// And more for each of them: they share the CPUs.
const ROUNDS_TIME_EACH: Duration = Duration::from_secs(30);
/// Their work goes on when it is measured, for this long.
const WORKING: Duration = Duration::from_secs(20);

/// Runs them.
pub(crate) async fn play(stage: &mut Stage) -> Result<(), RunError> {
    let workload = stage.arm.workload;
    let kind = move |number| kind(workload, number);
    match stage.arm.fleet {
        Fleet::Vms(vms) => stage.launch_all(vms, kind).await?,
        Fleet::UntilFull(most) => stage.launch_until_full(most, kind, Duration::ZERO).await?,
    }
    stage.wait_ready().await;
    if workload == Workload::Idle {
        stage.rest().await;
        return Ok(());
    }
    wait_worked(stage).await;
    stage.record.mark("at rest");
    stage.record.phase("measuring at work");
    stage.hold(WORKING).await;
    Ok(())
}

fn kind(workload: Workload, number: usize) -> Kind {
    let number = number as u64;
    match workload {
        Workload::Agents => Kind::Agent(number + 1),
        Workload::TwoImages if number % 2 == 1 => Kind::Agent(number / 2 + 1),
        _ => Kind::Idle,
    }
}

/// Waits until every guest that works has done its rounds.
async fn wait_worked(stage: &Stage) {
    let working = |record: &Record| {
        let guests = record.guests().into_iter().map(|(_, guest)| guest);
        guests
            .filter(|guest| guest.id.starts_with(Kind::Agent(0).name()))
            .filter(|guest| guest.launch_s.is_some() && guest.ended.is_none())
            .filter(|guest| guest.rounds < ROUNDS)
            .count()
    };
    let left = u32::try_from(working(&stage.record)).unwrap_or(u32::MAX);
    let time = ROUNDS_TIME + ROUNDS_TIME_EACH * left;
    stage
        .record
        .phase(format!("waiting for {ROUNDS} rounds of work"));
    if !stage.wait_for(time, |record| working(record) == 0).await {
        let left = working(&stage.record);
        stage.record.error(format!(
            "{ROUNDS} rounds not within {time:?}: {left} guests"
        ));
    }
}
