//! Which runs a call of the benchmark makes, and how long they take. Pure.

use clap::ValueEnum;

use super::model::{Arm, Engine, Fleet, Thp, Workload};

/// Limit of the cgroup where nothing is to run into it.
const AMPLE_LIMIT_BYTES: u64 = 8 << 30;
/// Limit of the cgroup where guests are launched until it is full.
const TIGHT_LIMIT_BYTES: u64 = 512 << 20;
/// Limit for idle guests that are launched until it is full: at 18 MiB a guest, ten without merging.
const IDLE_LIMIT_BYTES: u64 = 192 << 20;
/// Launches after which a fleet that does not fill its limit is taken to be large enough.
const FULL_VMS_MAX: usize = 60;
/// The same for idle guests, of which more fit.
const IDLE_VMS_MAX: usize = 100;

const ALL_ENGINES: [Engine; 5] = [
    Engine::Off,
    Engine::KsmDefaults,
    Engine::KsmFast,
    Engine::KsmAdvisor,
    Engine::Samepage,
];
/// Nobody, the KSM that gives back most at rest, and ours.
const THREE_ENGINES: [Engine; 3] = [Engine::Off, Engine::KsmFast, Engine::Samepage];

/// A set of runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Preset {
    /// Every figure of docs/density.md; about 90 minutes on 2 CPUs
    Full,
    /// A few guests of three workloads; about 9 minutes on 2 CPUs
    Quick,
    /// Pageload guests that show whether the benchmark works; under 3 minutes
    Ci,
}

/// What the command line asks for; what is empty or absent is left to the preset or the workload.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wishes {
    /// The set to choose from.
    pub preset: Option<Preset>,
    /// What guests do.
    pub workloads: Vec<Workload>,
    /// Who merges.
    pub engines: Vec<Engine>,
    /// The host's huge pages.
    pub thps: Vec<Thp>,
    /// How many guests.
    pub fleet: Option<Fleet>,
    /// Limit of the cgroup.
    pub memory_limit_bytes: Option<u64>,
}

/// Why there is nothing to run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("--preset {preset}: has no run with {wanted}")]
pub struct NothingToRun {
    preset: String,
    wanted: String,
}

/// The runs that `wishes` ask for, in the order in which they are made: one workload after the
/// other, and in each the engines one after the other.
///
/// # Errors
/// If the preset has no such run.
pub fn arms(wishes: &Wishes) -> Result<Vec<Arm>, NothingToRun> {
    let groups = match (wishes.preset, wishes.workloads.as_slice()) {
        (None, workloads @ [_, ..]) => asked_for(workloads, wishes),
        (preset, _) => chosen(preset.unwrap_or(Preset::Quick), wishes)?,
    };
    Ok(groups.iter().flat_map(|group| group.arms(wishes)).collect())
}

/// Runs of one workload that differ by their engine alone.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Group {
    workload: Workload,
    thp: Thp,
    engines: Vec<Engine>,
    fleet: Fleet,
    /// Limit of the cgroup where `fleet` is launched until it is full.
    tight_limit_bytes: u64,
}

impl Group {
    fn new(workload: Workload, thp: Thp, engines: &[Engine], vms: usize) -> Group {
        let fleet = match workload {
            Workload::Storm => Fleet::UntilFull(vms),
            _ => Fleet::Vms(vms),
        };
        Group {
            workload,
            thp,
            engines: engines.to_vec(),
            fleet,
            tight_limit_bytes: TIGHT_LIMIT_BYTES,
        }
    }

    fn arms(&self, wishes: &Wishes) -> Vec<Arm> {
        let fleet = wishes.fleet.unwrap_or(self.fleet);
        let usual_limit_bytes = match fleet {
            Fleet::Vms(_) => AMPLE_LIMIT_BYTES,
            Fleet::UntilFull(_) => self.tight_limit_bytes,
        };
        let arm = |&engine: &Engine| Arm {
            workload: self.workload,
            engine,
            thp: self.thp,
            fleet,
            memory_limit_bytes: wishes.memory_limit_bytes.unwrap_or(usual_limit_bytes),
        };
        self.engines.iter().map(arm).collect()
    }
}

/// Workloads named on the command line, with every engine and huge page mode named there.
fn asked_for(workloads: &[Workload], wishes: &Wishes) -> Vec<Group> {
    let engines = distinct(&wishes.engines, &ALL_ENGINES);
    let thps = distinct(&wishes.thps, &[Thp::Madvise]);
    let of_workload = |workload: Workload| {
        let group = |thp| Group::new(workload, thp, &engines, usual_vms(workload));
        thps.iter().copied().map(group).collect::<Vec<_>>()
    };
    distinct(workloads, &[])
        .into_iter()
        .flat_map(of_workload)
        .collect()
}

/// What is left of the preset.
fn chosen(preset: Preset, wishes: &Wishes) -> Result<Vec<Group>, NothingToRun> {
    let has = |named: &[Workload], workload| named.is_empty() || named.contains(&workload);
    let mut groups = match preset {
        Preset::Full => full(),
        Preset::Quick => quick(),
        Preset::Ci => ci(),
    };
    groups.retain(|group| {
        let is_thp = wishes.thps.is_empty() || wishes.thps.contains(&group.thp);
        has(&wishes.workloads, group.workload) && is_thp
    });
    for group in &mut groups {
        let wanted = |engine: &Engine| wishes.engines.is_empty() || wishes.engines.contains(engine);
        group.engines.retain(wanted);
    }
    groups.retain(|group| !group.engines.is_empty());
    if groups.is_empty() {
        return Err(NothingToRun {
            preset: format!("{preset:?}").to_lowercase(),
            wanted: wanted(wishes),
        });
    }
    Ok(groups)
}

/// The options that choose among a preset's runs, as they were given.
fn wanted(wishes: &Wishes) -> String {
    fn list<T: ToString>(option: &str, values: &[T]) -> Option<String> {
        let names: Vec<String> = values.iter().map(T::to_string).collect();
        (!names.is_empty()).then(|| format!("{option} {}", names.join(",")))
    }
    let options = [
        list("--workload", &wishes.workloads),
        list("--engine", &wishes.engines),
        list("--thp", &wishes.thps),
    ];
    options.into_iter().flatten().collect::<Vec<_>>().join(" ")
}

/// The values given without repetitions, or the usual ones.
fn distinct<T: Copy + PartialEq>(given: &[T], usual: &[T]) -> Vec<T> {
    let mut values = Vec::new();
    for &value in if given.is_empty() { usual } else { given } {
        if !values.contains(&value) {
            values.push(value);
        }
    }
    values
}

/// Guests of a workload where nobody says how many.
fn usual_vms(workload: Workload) -> usize {
    match workload {
        Workload::Idle | Workload::Burst | Workload::Latency => 40,
        Workload::Agents => 10,
        Workload::TwoImages => 8,
        Workload::Phase => 12,
        Workload::Storm => FULL_VMS_MAX,
    }
}

fn full() -> Vec<Group> {
    let usual = |workload, engines: &[Engine]| {
        Group::new(workload, Thp::Madvise, engines, usual_vms(workload))
    };
    vec![
        usual(Workload::Idle, &ALL_ENGINES),
        // Half the fleet: what huge pages do shows in the ratio of the engines, and 40 guests take
        // another five minutes.
        Group::new(Workload::Idle, Thp::Always, &THREE_ENGINES, 20),
        Group {
            fleet: Fleet::UntilFull(IDLE_VMS_MAX),
            tight_limit_bytes: IDLE_LIMIT_BYTES,
            ..usual(Workload::Idle, &THREE_ENGINES)
        },
        // Each of ten takes 40 s of CPU to boot where the guest's kernel mode is emulated.
        usual(Workload::Agents, &THREE_ENGINES),
        usual(Workload::TwoImages, &THREE_ENGINES),
        usual(Workload::Burst, &THREE_ENGINES),
        usual(Workload::Phase, &THREE_ENGINES),
        usual(Workload::Storm, &THREE_ENGINES),
        usual(Workload::Latency, &THREE_ENGINES),
    ]
}

fn quick() -> Vec<Group> {
    let group = |workload, vms| Group::new(workload, Thp::Madvise, &THREE_ENGINES, vms);
    vec![
        group(Workload::Idle, 8),
        group(Workload::Phase, 4),
        group(Workload::Storm, FULL_VMS_MAX),
    ]
}

fn ci() -> Vec<Group> {
    vec![Group::new(Workload::Phase, Thp::Madvise, &THREE_ENGINES, 3)]
}

/// About how long a run takes, in seconds, on 2 CPUs whose KVM emulates the guest's kernel mode.
/// For the time that is shown before the start and while it runs, and for nothing else.
pub fn expected_s(arm: &Arm) -> f64 {
    let vms = match arm.fleet {
        Fleet::Vms(vms) => vms,
        // What fits is what is to be found out; a limit of the usual size takes about so many.
        Fleet::UntilFull(most) => most.min(30),
    };
    #[expect(clippy::cast_precision_loss, reason = "hundreds of guests at most")]
    let vms = vms as f64;
    // Merging beside booting guests takes CPU from them.
    let slowness = if arm.engine == Engine::Samepage {
        1.3
    } else {
        1.0
    };
    let rest_s = match arm.engine {
        Engine::Off => 15.0,
        Engine::KsmDefaults | Engine::KsmAdvisor => 120.0,
        Engine::KsmFast | Engine::Samepage => 25.0,
    };
    // Start and stop of the server, and the look at the guests' memory at the end.
    let ends_s = 6.0 + 0.2 * vms;
    ends_s
        + match arm.workload {
            // Guests that boot at the same time slow one another down.
            Workload::Idle => (3.4 + 0.05 * vms) * vms * slowness + rest_s + 10.0,
            Workload::Agents => 20.0 * vms + 20.0,
            Workload::TwoImages => 13.0 * vms + 20.0,
            Workload::Burst => 1.25 * vms + 30.0,
            Workload::Phase => 45.0,
            Workload::Storm => 1.2 * vms + 20.0,
            Workload::Latency => 50.0,
        }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn total_s(preset: Preset) -> f64 {
        let wishes = Wishes {
            preset: Some(preset),
            ..Wishes::default()
        };
        arms(&wishes).unwrap().iter().map(expected_s).sum()
    }

    #[test]
    fn presets_take_the_time_that_their_help_says() {
        assert!(
            total_s(Preset::Full) < 80.0 * 60.0,
            "{}",
            total_s(Preset::Full)
        );
        assert!(
            total_s(Preset::Quick) < 10.0 * 60.0,
            "{}",
            total_s(Preset::Quick)
        );
        assert!(total_s(Preset::Ci) < 180.0, "{}", total_s(Preset::Ci));
    }

    #[test]
    fn named_workloads_run_with_every_engine_and_huge_page_mode_once() {
        let wishes = Wishes {
            workloads: vec![Workload::Idle, Workload::Idle],
            engines: vec![Engine::Samepage, Engine::Off, Engine::Samepage],
            thps: vec![Thp::Always, Thp::Madvise],
            fleet: Some(Fleet::Vms(3)),
            ..Wishes::default()
        };
        let runs: Vec<_> = arms(&wishes)
            .unwrap()
            .iter()
            .map(|arm| (arm.engine, arm.thp))
            .collect();
        assert_eq!(
            runs,
            [
                (Engine::Samepage, Thp::Always),
                (Engine::Off, Thp::Always),
                (Engine::Samepage, Thp::Madvise),
                (Engine::Off, Thp::Madvise),
            ]
        );
    }

    #[test]
    fn a_fleet_until_full_has_a_tight_limit_unless_one_is_given() {
        let limit = |fleet, memory_limit_bytes| {
            let wishes = Wishes {
                workloads: vec![Workload::Idle],
                engines: vec![Engine::Off],
                fleet,
                memory_limit_bytes,
                ..Wishes::default()
            };
            arms(&wishes).unwrap()[0].memory_limit_bytes
        };
        assert_eq!(limit(None, None), AMPLE_LIMIT_BYTES);
        assert_eq!(limit(Some(Fleet::UntilFull(9)), None), TIGHT_LIMIT_BYTES);
        assert_eq!(limit(Some(Fleet::UntilFull(9)), Some(7)), 7);
    }

    #[test]
    fn a_preset_is_narrowed_by_the_other_options() {
        let wishes = Wishes {
            preset: Some(Preset::Full),
            workloads: vec![Workload::Idle],
            engines: vec![Engine::Off, Engine::KsmFast],
            thps: vec![Thp::Always],
            ..Wishes::default()
        };
        let arms = arms(&wishes).unwrap();
        let engines: Vec<_> = arms.iter().map(|arm| arm.engine).collect();
        assert_eq!(engines, [Engine::Off, Engine::KsmFast]);
        assert!(arms.iter().all(|arm| arm.thp == Thp::Always));
    }

    #[test]
    fn what_a_preset_does_not_have_is_named() {
        let wishes = Wishes {
            preset: Some(Preset::Ci),
            workloads: vec![Workload::Agents],
            engines: vec![Engine::Off],
            ..Wishes::default()
        };
        let error = arms(&wishes).unwrap_err().to_string();
        assert_eq!(
            error,
            "--preset ci: has no run with --workload agents --engine off"
        );
    }

    #[test]
    fn a_storm_runs_until_its_limit() {
        let wishes = Wishes {
            workloads: vec![Workload::Storm],
            ..Wishes::default()
        };
        let arms = arms(&wishes).unwrap();
        assert_eq!(arms.len(), 5);
        assert!(
            arms.iter()
                .all(|arm| matches!(arm.fleet, Fleet::UntilFull(_)))
        );
    }
}
