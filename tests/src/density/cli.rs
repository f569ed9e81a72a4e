//! The command line of the benchmark.

use std::path::PathBuf;

use bytesize::ByteSize;
use clap::builder::PossibleValue;
use clap::{Parser, ValueEnum, value_parser};

use super::model::{Engine, Fleet, Thp, Workload};
use super::plan::{Preset, Wishes};

/// Least memory that a server and one guest can be given.
const MEMORY_LIMIT_MIN_BYTES: u64 = 64 << 20;

/// Measure how many real guests fit, and what they cost: without merging, with kernel KSM, with
/// Samepage
#[derive(Debug, Parser)]
#[command(
    name = "density",
    version,
    max_term_width = 100,
    after_help = "\
Every run is a server of its own in a memory cgroup of its own; guests are launched over its REST
API. Root is needed for the cgroup and for the host's settings, which are as before afterwards.

Examples:
  density                                        the quick preset
  density --preset full --json density.json --svg plots --document docs/density.md
  density --workload idle --engine off,ksm,samepage --vms 40
  density --workload agents --engine ksm-fast,samepage --thp madvise,always --vms 10
  density --workload idle --engine off,samepage --until-full=100 --memory-limit 512MiB
  density --preset full --workload idle          only the idle runs of the preset
  density --from density.json --svg plots        table and plots of an earlier run again
  density --restore                              host settings, after the benchmark was killed

Exit status:
  0    every run came to its end without an error
  1    a run had errors (the table and the JSON name them), or the benchmark failed
  2    wrong arguments
  130  SIGINT, SIGTERM or SIGHUP ended it; nothing is left behind"
)]
pub struct Cli {
    /// A set of runs; --workload, --engine and --thp then choose among them
    /// [default: quick, or the --workload alone]
    #[arg(long, value_enum, value_name = "NAME")]
    pub preset: Option<Preset>,

    /// What the guests do
    #[arg(long, value_enum, value_delimiter = ',', value_name = "NAME,...")]
    pub workload: Vec<Workload>,

    /// Who merges [default: all]
    #[arg(long, value_enum, value_delimiter = ',', value_name = "NAME,...")]
    pub engine: Vec<EngineChoice>,

    /// Transparent huge pages of the host, one run with each [default: madvise]
    #[arg(long, value_enum, value_delimiter = ',', value_name = "MODE,...")]
    pub thp: Vec<Thp>,

    /// Guests in each run [default: as the workload has it]
    #[arg(long, value_name = "N", value_parser = value_parser!(u16).range(1..=500))]
    pub vms: Option<u16>,

    /// Launch guests until one is refused or ended, or there are MAX
    #[arg(
        long,
        value_name = "MAX",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "100",
        value_parser = value_parser!(u16).range(1..=500),
        conflicts_with = "vms"
    )]
    pub until_full: Option<u16>,

    /// Limit of the memory cgroup, such as 512MiB or 2GiB [default: 8GiB; 512MiB if until full]
    #[arg(long, value_name = "SIZE", value_parser = memory_limit)]
    pub memory_limit: Option<u64>,

    /// Write everything that was found to FILE, with every sample; written anew after each run
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,

    /// Write plots to DIR
    #[arg(long, value_name = "DIR")]
    pub svg: Option<PathBuf>,

    /// Write the generated parts of the document FILE anew, or, for the root of the repository,
    /// those of all its documents
    #[arg(long, value_name = "FILE")]
    pub document: Option<PathBuf>,

    /// Run nothing: make table, plots and document from the JSON in FILE
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with_all = ["preset", "workload", "engine", "thp", "vms", "until_full",
            "memory_limit", "json"]
    )]
    pub from: Option<PathBuf>,

    /// Run nothing: bring back what a benchmark that was killed has left changed
    #[arg(long, exclusive = true)]
    pub restore: bool,
}

/// What `--engine` can name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EngineChoice {
    /// This one.
    One(Engine),
    /// Kernel KSM, each way it is run.
    Ksm,
}

impl Cli {
    /// What is to be run.
    pub fn wishes(&self) -> Wishes {
        let fleet = match (self.vms, self.until_full) {
            (Some(vms), _) => Some(Fleet::Vms(vms.into())),
            (None, Some(most)) => Some(Fleet::UntilFull(most.into())),
            (None, None) => None,
        };
        Wishes {
            preset: self.preset,
            workloads: self.workload.clone(),
            engines: self
                .engine
                .iter()
                .flat_map(|choice| choice.engines())
                .collect(),
            thps: self.thp.clone(),
            fleet,
            memory_limit_bytes: self.memory_limit,
        }
    }
}

impl EngineChoice {
    fn engines(self) -> Vec<Engine> {
        match self {
            EngineChoice::One(engine) => vec![engine],
            EngineChoice::Ksm => vec![Engine::KsmDefaults, Engine::KsmFast, Engine::KsmAdvisor],
        }
    }
}

impl ValueEnum for EngineChoice {
    fn value_variants<'a>() -> &'a [EngineChoice] {
        &[
            EngineChoice::One(Engine::Off),
            EngineChoice::One(Engine::KsmDefaults),
            EngineChoice::One(Engine::KsmFast),
            EngineChoice::One(Engine::KsmAdvisor),
            EngineChoice::One(Engine::Samepage),
            EngineChoice::Ksm,
        ]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(match self {
            EngineChoice::Ksm => PossibleValue::new("ksm").help("All three of KSM"),
            EngineChoice::One(engine) => {
                PossibleValue::new(engine.to_string()).help(match engine {
                    Engine::Off => "Nobody",
                    Engine::KsmDefaults => "Kernel KSM: 100 pages, then 20 ms",
                    Engine::KsmFast => "Kernel KSM: 5,000 pages, then 20 ms; zero pages",
                    Engine::KsmAdvisor => "Kernel KSM with its scan-time advisor",
                    Engine::Samepage => "Samepage's own engine",
                })
            }
        })
    }
}

impl ValueEnum for Workload {
    fn value_variants<'a>() -> &'a [Workload] {
        &Workload::ALL
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.to_string()).help(match self {
            Workload::Idle => "Linux guests of one image that boot to their shell",
            Workload::Agents => "Debian guests that run one Python program",
            Workload::TwoImages => "The two above, alternating",
            Workload::Burst => "A launch every 0.5 to 2 s; each guest lives for 30 s",
            Workload::Phase => "Guests that load the same data, diverge, and converge",
            Workload::Storm => "Guests until the limit; then all write to what they share",
            Workload::Latency => "One guest that times its writes beside 20 busy vCPUs a CPU",
        }))
    }
}

impl ValueEnum for Thp {
    fn value_variants<'a>() -> &'a [Thp] {
        &[Thp::Madvise, Thp::Always]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.to_string()))
    }
}

/// Reads a size with its unit.
fn memory_limit(text: &str) -> Result<u64, String> {
    let size: ByteSize = text
        .parse()
        .map_err(|_| "must be a size such as 512MiB or 2GiB".to_owned())?;
    if size.as_u64() < MEMORY_LIMIT_MIN_BYTES {
        let least = ByteSize::b(MEMORY_LIMIT_MIN_BYTES);
        return Err(format!("must be {least} at least"));
    }
    Ok(size.as_u64())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &str) -> Result<Cli, String> {
        let words = std::iter::once("density").chain(words.split_whitespace());
        Cli::try_parse_from(words).map_err(|error| error.to_string())
    }

    #[test]
    fn ksm_stands_for_its_three_settings() {
        let cli = parse("--workload idle --engine off,ksm --vms 4").unwrap();
        let wishes = cli.wishes();
        assert_eq!(
            wishes.engines,
            [
                Engine::Off,
                Engine::KsmDefaults,
                Engine::KsmFast,
                Engine::KsmAdvisor
            ]
        );
        assert_eq!(wishes.fleet, Some(Fleet::Vms(4)));
    }

    #[test]
    fn until_full_has_a_most_of_its_own() {
        let fleet = |words| parse(words).unwrap().wishes().fleet;
        assert_eq!(fleet("--until-full"), Some(Fleet::UntilFull(100)));
        assert_eq!(fleet("--until-full=7"), Some(Fleet::UntilFull(7)));
        assert_eq!(fleet(""), None);
    }

    #[test]
    fn sizes_have_units() {
        let limit = |text: &str| {
            parse(&format!("--memory-limit {text}"))
                .unwrap()
                .memory_limit
        };
        assert_eq!(limit("512MiB"), Some(512 << 20));
        assert_eq!(limit("2GiB"), Some(2 << 30));
        assert_eq!(limit("1GB"), Some(1_000_000_000));
    }

    #[test]
    fn a_bad_value_is_named_with_its_option() {
        for (words, option, value) in [
            ("--engine kms", "--engine", "kms"),
            ("--workload idle,idel", "--workload", "idel"),
            ("--thp never", "--thp", "never"),
            ("--vms 0", "--vms", "0"),
            ("--until-full=many", "--until-full", "many"),
            ("--memory-limit 1MiB", "--memory-limit", "1MiB"),
            ("--memory-limit lots", "--memory-limit", "lots"),
            ("--preset ful", "--preset", "ful"),
            ("--vms 3 --until-full", "--vms", "--until-full"),
            ("--from a.json --vms 3", "--from", "--vms"),
        ] {
            let error = parse(words).unwrap_err();
            assert!(error.contains(option), "{words}: {error}");
            assert!(error.contains(value), "{words}: {error}");
        }
    }
}
