//! Follows what guests say: those with a console by a stream each, pageload guests and all ends by
//! one look at the list of VMs, twice a second.
//!
//! A stream costs the server nothing while the guest is silent, and a guest that boots with `quiet`
//! is silent until it is ready. Rejected: asking each console twice a second. With 40 guests that is
//! 80 requests a second to a server whose CPUs are busy booting, and a quarter of a second of error.

use std::sync::Arc;
use std::time::Duration;

use samepage::client::Client;
use samepage::model::VmDescription;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::time::{MissedTickBehavior, interval};

use super::record::{GuestIndex, Record};
use crate::density::guests::{Kind, Said, read_line};

/// Time between two looks at the list of VMs.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// `phase` of a pageload guest whose memory is filled,
const PHASE_VERIFYING: u64 = 2;
/// and of one that gave up.
const PHASE_FAILED: u64 = 4;

/// What a guest is to print in its first rounds; empty where nobody knows.
pub(crate) type Digests = Vec<String>;

/// Reads a guest's console until its end.
pub(crate) async fn follow_console(
    client: Client,
    record: Arc<Record>,
    (index, kind): (GuestIndex, Kind),
    expected: Digests,
) {
    let Some(guest) = record.guest(index) else {
        return;
    };
    let id = guest.id;
    let stream = match client.console_stream(&id).await {
        Ok(stream) => stream,
        Err(error) => return record.error(format!("{id}: no console: {error}")),
    };
    let mut lines = BufReader::new(stream).split(b'\n');
    // An error is the end of the stream, which follows the end of the guest; that is noted elsewhere.
    while let Ok(Some(line)) = lines.next_segment().await {
        match read_line(kind, &String::from_utf8_lossy(&line)) {
            Some(Said::Ready) => record.ready(index),
            Some(Said::Round { number, digest }) => {
                record.rounds(index, number);
                let place = usize::try_from(number).ok().and_then(|n| n.checked_sub(1));
                let expected = place.and_then(|place| expected.get(place));
                if let Some(expected) = expected.filter(|expected| **expected != digest) {
                    record.error(format!(
                        "{id}: round {number} gave {digest}, must give {expected}"
                    ));
                }
            }
            None => {}
        }
    }
}

/// Looks at all VMs until the server does not answer any more.
pub(crate) async fn follow_list(client: Client, record: Arc<Record>) {
    let mut ticks = interval(LOOK_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        if let Ok(vms) = client.list_vms().await {
            note(&record, &vms);
        }
    }
}

/// Notes what the list tells.
pub(crate) fn note(record: &Record, vms: &[VmDescription]) {
    for (index, guest) in record.guests() {
        let Some(vm) = vms.iter().find(|vm| vm.id == guest.id) else {
            continue;
        };
        if let Some(reason) = &vm.end_reason {
            record.ended(index, reason);
        }
        let Some(report) = &vm.report else {
            continue;
        };
        if report.phase >= PHASE_VERIFYING && report.phase != PHASE_FAILED {
            record.ready(index);
        }
        record.rounds(index, report.verify_passes);
        if report.verify_errors > 0 {
            let (id, errors) = (&guest.id, report.verify_errors);
            record.error(format!("{id}: {errors} pages with wrong contents"));
        } else if report.phase == PHASE_FAILED {
            record.error(format!("{}: the guest failed", guest.id));
        }
    }
}
