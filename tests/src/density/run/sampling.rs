//! Looks at the server each second, and what the engine says of itself.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use samepage::client::Client;
use tokio::time::{MissedTickBehavior, interval};

use super::record::Record;
use crate::density::guests::DOMAIN;
use crate::density::host::{Detail, HostError, Sampler};
use crate::density::model::{Engine, Sample};

/// Time between two looks.
const INTERVAL: Duration = Duration::from_secs(1);
/// Each so many looks are close ones: PSS makes the kernel walk all page tables of the server.
const CLOSE_EVERY: u64 = 5;
/// Where kernel KSM tells what it did.
const KSM: &str = "/sys/kernel/mm/ksm";

/// What an engine says it did, in pages.
#[derive(Debug, Clone, Copy, Default)]
struct Merged {
    given_back: u64,
    shared: u64,
}

/// Samples until the server is gone.
pub(crate) async fn follow(
    mut sampler: Sampler,
    client: Client,
    engine: Engine,
    record: Arc<Record>,
) {
    let mut ticks = interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for number in 0_u64.. {
        ticks.tick().await;
        let detail = if number % CLOSE_EVERY == 0 {
            Detail::Full
        } else {
            Detail::Quick
        };
        // Reading `smaps_rollup` and `maps` takes milliseconds: not where launches are timed.
        let looked = tokio::task::spawn_blocking(move || {
            let sample = sampler.look(detail);
            (sampler, sample)
        });
        let Ok((back, sample)) = looked.await else {
            return;
        };
        sampler = back;
        match sample {
            Ok(sample) => note(&record, sample, merged(engine, &client).await),
            Err(error) => return note_end(&record, &error),
        }
    }
}

fn note(record: &Record, mut sample: Sample, merged: Merged) {
    sample.given_back_pages = merged.given_back;
    sample.shared_pages = merged.shared;
    record.sample(sample);
}

/// The run notices by itself that its server died; anything else is worth a word.
fn note_end(record: &Record, error: &HostError) {
    record.error(format!("sampling ended: {error}"));
}

async fn merged(engine: Engine, client: &Client) -> Merged {
    match engine {
        Engine::Off => Merged::default(),
        Engine::KsmDefaults | Engine::KsmFast | Engine::KsmAdvisor => ksm(Path::new(KSM)),
        Engine::Samepage => match client.describe_domain(DOMAIN).await {
            Ok(domain) => Merged {
                given_back: domain.stats.pages_sharing + domain.stats.pages_zero,
                shared: domain.stats.pages_shared,
            },
            Err(_) => Merged::default(),
        },
    }
}

/// What kernel KSM says (`Documentation/admin-guide/mm/ksm.rst`). It is one for the whole host, but
/// all was unmerged before the run, and nobody else's memory is expected to be mergeable.
fn ksm(directory: &Path) -> Merged {
    // A kernel before 6.10 does not count zero pages.
    let read = |file: &str| number(&directory.join(file)).unwrap_or(0);
    Merged {
        given_back: read("pages_sharing") + read("ksm_zero_pages"),
        shared: read("pages_shared"),
    }
}

/// How often kernel KSM has been through all memory.
pub(crate) fn ksm_scans() -> u64 {
    number(&Path::new(KSM).join("full_scans")).unwrap_or(0)
}

fn number(file: &Path) -> Option<u64> {
    std::fs::read_to_string(file).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ksm_is_asked_for_copies_and_zeros() {
        let directory = tempfile::tempdir().unwrap();
        for (file, text) in [("pages_sharing", "70\n"), ("pages_shared", "10\n")] {
            std::fs::write(directory.path().join(file), text).unwrap();
        }
        let before = ksm(directory.path());
        assert_eq!((before.given_back, before.shared), (70, 10));
        std::fs::write(directory.path().join("ksm_zero_pages"), "5\n").unwrap();
        assert_eq!(ksm(directory.path()).given_back, 75);
    }
}
