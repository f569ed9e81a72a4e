//! Whether the benchmark's own numbers add up: the same memory, counted by ways that know nothing
//! of each other.

use super::figures::{measured, mib};
use crate::density::model::{Engine, Memory, Oracle, Run, Sample};

/// What two ways to count may differ by: this part of the larger one,
const PART: f64 = 0.1;
/// and this much, for what the server needs for itself, and for what changes between two looks.
const SLACK_MIB: f64 = 16.0;
const PAGE_BYTES: u64 = 4096;

/// What does not add up in the last sample that was measured, a sentence each; empty where all
/// does. A run without samples has nothing to add up, which is a sentence too.
pub fn disagreements(run: &Run) -> Vec<String> {
    let samples = measured(run);
    let Some(last) = samples.last() else {
        return vec!["no sample was measured".to_owned()];
    };
    let mut found = Vec::new();
    found.extend(kinds(&last.memory));
    found.extend(peak(run, samples));
    let with_pss = samples
        .iter()
        .rev()
        .find(|sample| sample.pss_bytes.is_some());
    found.extend(with_pss.and_then(pss));
    if let Some(oracle) = &run.oracle {
        found.extend(contents(run.arm.engine, last, oracle));
    }
    found
}

/// The cgroup's usage is the sum of its kinds.
fn kinds(memory: &Memory) -> Option<String> {
    let parts = memory.anon_bytes + memory.shmem_bytes + memory.file_bytes + memory.kernel_bytes;
    let (usage, sum) = (mib(memory.usage_bytes), mib(parts));
    (!near(usage, sum))
        .then(|| format!("the group's usage is {usage:.1} MiB, the sum of its kinds {sum:.1} MiB"))
}

/// Nothing is above the peak.
fn peak(run: &Run, samples: &[Sample]) -> Option<String> {
    let usages = samples.iter().map(|sample| sample.memory.usage_bytes);
    let most = usages.max().unwrap_or(0);
    (most > run.peak_bytes).then(|| {
        let (most, peak) = (mib(most), mib(run.peak_bytes));
        format!("a sample has {most:.1} MiB, above the group's peak of {peak:.1} MiB")
    })
}

/// The server's share is what the cgroup holds of anonymous memory and pool, and mapped files.
fn pss(sample: &Sample) -> Option<String> {
    let memory = &sample.memory;
    let pss = mib(sample.pss_bytes?);
    let low = mib(memory.anon_bytes + memory.shmem_bytes);
    let high = low + mib(memory.file_bytes);
    let is_between = (low..=high).contains(&pss);
    (!is_between && !near(pss, low) && !near(pss, high))
        .then(|| format!("PSS is {pss:.1} MiB, anonymous memory and pool are {low:.1} MiB"))
}

/// Guests' contents take at least a page each, and at most what was touched. What an engine says it
/// gave back is no more than can be given back.
fn contents(engine: Engine, sample: &Sample, oracle: &Oracle) -> Vec<String> {
    let pages_mib = |pages: u64| mib(pages * PAGE_BYTES);
    let held = mib(sample.memory.anon_bytes + sample.memory.shmem_bytes);
    let (unique, touched) = (
        pages_mib(oracle.unique_contents),
        pages_mib(oracle.touched_pages),
    );
    let mut found = Vec::new();
    if held < unique && !near(held, unique) {
        found.push(format!(
            "guests have {unique:.1} MiB of different contents, anonymous memory and pool are \
             {held:.1} MiB"
        ));
    }
    if engine == Engine::Off && !near(held, touched) {
        found.push(format!(
            "guests touched {touched:.1} MiB, anonymous memory and pool are {held:.1} MiB"
        ));
    }
    let ideal = touched - unique;
    let given_back = pages_mib(sample.given_back_pages);
    if engine != Engine::Off && given_back > ideal && !near(given_back, ideal) {
        found.push(format!(
            "the engine gave {given_back:.1} MiB back, an ideal one would give {ideal:.1} MiB"
        ));
    }
    found
}

fn near(one: f64, other: f64) -> bool {
    (one - other).abs() <= SLACK_MIB + PART * one.max(other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::density::model::{Thp, Workload};
    use crate::density::report::synthetic::{arm, run};

    const MIB: u64 = 1 << 20;

    /// A run whose numbers add up: 200 MiB touched, of which 50 MiB are left.
    fn sound(engine: Engine) -> Run {
        let mut run = run(arm(Workload::Phase, engine, Thp::Madvise));
        let anon_mib = if engine == Engine::Off { 205 } else { 55 };
        for sample in &mut run.samples {
            sample.memory = Memory {
                usage_bytes: (anon_mib + 30) * MIB,
                anon_bytes: anon_mib * MIB,
                shmem_bytes: 0,
                file_bytes: 10 * MIB,
                kernel_bytes: 20 * MIB,
            };
            sample.pss_bytes = Some((anon_mib + 4) * MIB);
            sample.given_back_pages = (200 - 50) * 256;
        }
        run.peak_bytes = 300 * MIB;
        run.oracle = Some(Oracle {
            guests: 4,
            touched_pages: 200 * 256,
            unique_contents: 50 * 256,
            ..Oracle::default()
        });
        run
    }

    #[test]
    fn numbers_that_add_up_are_not_complained_about() {
        for engine in [Engine::Off, Engine::KsmFast, Engine::Samepage] {
            assert_eq!(
                disagreements(&sound(engine)),
                Vec::<String>::new(),
                "{engine}"
            );
        }
    }

    #[test]
    fn each_way_to_count_is_held_to_the_others() {
        let complaint = |change: &dyn Fn(&mut Run)| {
            let mut run = sound(Engine::Samepage);
            change(&mut run);
            let found = disagreements(&run);
            assert_eq!(found.len(), 1, "{found:?}");
            found[0].clone()
        };
        let all = |run: &mut Run, change: &dyn Fn(&mut Sample)| {
            run.samples.iter_mut().for_each(change);
        };
        let usage = complaint(&|run| all(run, &|one| one.memory.usage_bytes += 60 * MIB));
        assert!(
            usage.contains("145.0 MiB, the sum of its kinds 85.0"),
            "{usage}"
        );
        let peak = complaint(&|run| run.peak_bytes = 84 * MIB);
        assert!(peak.contains("above the group's peak of 84.0"), "{peak}");
        let pss = complaint(&|run| all(run, &|one| one.pss_bytes = Some(20 * MIB)));
        assert!(pss.contains("PSS is 20.0"), "{pss}");
        let pss = complaint(&|run| all(run, &|one| one.pss_bytes = Some(99 * MIB)));
        assert!(pss.contains("PSS is 99.0"), "{pss}");
        let given_back = complaint(&|run| all(run, &|one| one.given_back_pages = 300 * 256));
        assert!(given_back.contains("gave 300.0 MiB back"), "{given_back}");
        let contents = complaint(&|run| {
            let oracle = run.oracle.as_mut().unwrap();
            oracle.unique_contents = 100 * 256;
            oracle.touched_pages = 300 * 256;
        });
        assert!(
            contents.contains("100.0 MiB of different contents"),
            "{contents}"
        );
        let none = complaint(&|run| run.samples.clear());
        assert_eq!(none, "no sample was measured");
    }

    #[test]
    fn without_merging_all_that_was_touched_is_held() {
        let mut run = sound(Engine::Off);
        run.oracle.as_mut().unwrap().touched_pages = 300 * 256;
        let found = disagreements(&run);
        assert_eq!(
            found,
            ["guests touched 300.0 MiB, anonymous memory and pool are 205.0 MiB"]
        );
    }
}
