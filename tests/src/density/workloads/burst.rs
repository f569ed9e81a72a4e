//! Guests that come and go: a launch every half a second to two seconds, each lives for 30 s.
//!
//! The guests are pageload ones. A Linux guest takes 6 s of CPU to boot where KVM emulates the guest's
//! kernel mode, so 2 CPUs boot one each 3 s at best; a launch every 1.25 s would only queue up boots,
//! and none of them would be ready before its 30 s are over.

use std::time::{Duration, Instant};

use pageload_workload::Workload as Pageload;

use crate::density::guests::Kind;
use crate::density::model::Fleet;
use crate::density::run::{GuestIndex, RunError, Stage, poll_until};

/// How long each guest lives.
const LIFE: Duration = Duration::from_secs(30);
/// Time between two launches: at least, and by how much it varies.
const GAP_MIN_MS: u64 = 500;
const GAP_SPREAD_MS: u64 = 1500;
const MEM_MIB: u64 = 64;

/// What is to happen when, since the first launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// The guest with this number ends.
    Remove(usize),
    /// The guest with this number is launched.
    Launch(usize),
}

/// Runs them.
pub(crate) async fn play(stage: &mut Stage) -> Result<(), RunError> {
    let (Fleet::Vms(launches) | Fleet::UntilFull(launches)) = stage.arm.fleet;
    let is_until_full = matches!(stage.arm.fleet, Fleet::UntilFull(_));
    let begun = Instant::now();
    let mut guests: Vec<Option<GuestIndex>> = vec![None; launches];
    for (at, event) in schedule(launches) {
        stage.record.phase(format!("{event:?}"));
        // Who is behind the schedule, because the server took its time, does not wait.
        poll_until(begun + at, || begun.elapsed() >= at).await;
        match event {
            Event::Launch(number) => {
                guests[number] = stage.launch(kind(number)).await?;
                if guests[number].is_none() && !is_until_full {
                    stage.record.error(format!("launch {number} was refused"));
                }
            }
            Event::Remove(number) => {
                if let Some(index) = guests[number] {
                    stage.remove(index).await?;
                }
            }
        }
    }
    Ok(())
}

fn kind(number: usize) -> Kind {
    Kind::Pageload {
        work: Pageload {
            seed: number as u64 + 1,
            ..Pageload::default()
        },
        mem_mib: MEM_MIB,
    }
}

/// All events in order. The gaps are pseudo-random, and the same in each run.
fn schedule(launches: usize) -> Vec<(Duration, Event)> {
    let mut events = Vec::new();
    let mut at = Duration::ZERO;
    let mut state = 1_u64;
    for number in 0..launches {
        events.push((at, Event::Launch(number)));
        events.push((at + LIFE, Event::Remove(number)));
        // The generator of Knuth's MMIX: its high bits are good enough to spread launches.
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        at += Duration::from_millis(GAP_MIN_MS + (state >> 33) % GAP_SPREAD_MS);
    }
    events.sort_unstable();
    events
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_guest_lives_as_long_and_launches_are_apart() {
        let events = schedule(40);
        let at = |event| events.iter().find(|(_, one)| *one == event).unwrap().0;
        for number in 0..40 {
            let launched = at(Event::Launch(number));
            assert_eq!(at(Event::Remove(number)) - launched, LIFE);
            if number > 0 {
                let gap = launched - at(Event::Launch(number - 1));
                assert!(gap >= Duration::from_millis(500), "{number}: {gap:?}");
                assert!(gap <= Duration::from_secs(2), "{number}: {gap:?}");
            }
        }
        assert!(events.is_sorted());
        assert_eq!(events, schedule(40));
    }
}
