//! Guests until the limit refuses or ends one; then all that are left write to what they share.

use std::time::Duration;

use pageload_workload::Workload as Pageload;

use crate::density::guests::Kind;
use crate::density::model::Fleet;
use crate::density::run::{RunError, Stage};

const MEM_MIB: u64 = 64;
/// Between two launches, so that each engine has a moment to merge what came last.
const PAUSE: Duration = Duration::from_secs(1);
/// How long they write: what a guard has to do, it does in milliseconds.
const WRITING: Duration = Duration::from_secs(15);

/// Runs them.
pub(crate) async fn play(stage: &mut Stage) -> Result<(), RunError> {
    match stage.arm.fleet {
        Fleet::Vms(vms) => stage.launch_all(vms, kind).await?,
        Fleet::UntilFull(most) => stage.launch_until_full(most, kind, PAUSE).await?,
    }
    stage.wait_ready().await;
    stage.record.mark("writing");
    stage.record.phase("all write to what they share");
    stage.type_to_all().await?;
    stage.hold(WRITING).await;
    Ok(())
}

fn kind(number: usize) -> Kind {
    Kind::Pageload {
        work: Pageload::breaker(number as u64 + 1),
        mem_mib: MEM_MIB,
    }
}
