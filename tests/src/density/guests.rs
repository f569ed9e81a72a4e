//! What the guests are: their images and configurations, and what they say of themselves.

use std::fs::File;
use std::io;
use std::path::PathBuf;

use pageload_workload::Workload as Pageload;
use serde_json::{Value, json};
use vmm::VmConfig;
use vmm::config::{BUILTIN_PAGELOAD, HugePages};

use super::model::{Arm, Engine, Thp, Workload};
use crate::binary;
use crate::debian::{self, Agent};
use crate::linux;

/// The merge domain of all guests, whoever merges: so one guard watches over them in each arm.
pub(crate) const DOMAIN: &str = "density";

/// First line of the Linux guest's own.
const LINUX_READY: &str = "samepage-init: ready";
/// How all lines of the program in the Debian guest begin.
const AGENT_MARK: &str = "samepage-agent: ";
const LINUX_MEM_MIB: u64 = 128;
/// Pause of the Debian guest's program between two rounds: its usual one.
const AGENT_SLEEP_MS: u64 = 3000;
/// The guest whose rounds are checked against what the program gives on the host, by its seed. Each
/// takes seconds of CPU, so it is one; a wrong page would show in any.
const CHECKED_SEED: u64 = 1;
/// Its rounds that are checked.
const CHECKED_ROUNDS: u64 = 8;

/// What one guest boots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The Linux guest, which boots to its shell and then has nothing to do.
    Idle,
    /// The Debian guest with its Python program, by its seed.
    Agent(u64),
    /// The bare-metal guest that knows each of its pages.
    Pageload {
        /// What it does.
        work: Pageload,
        /// Its memory.
        mem_mib: u64,
    },
}

/// What a line on a guest's console tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Said {
    /// It is ready for work.
    Ready,
    /// It has done a round of work, with this result.
    Round { number: u64, digest: String },
}

/// The files that guests boot.
#[derive(Debug, Clone, Default)]
pub(crate) struct Images {
    linux: Option<PathBuf>,
    initramfs: Option<PathBuf>,
    debian: Vec<PathBuf>,
    /// What the guest with [`CHECKED_SEED`] must print, from its first round on.
    digests: Vec<String>,
}

impl Images {
    /// Builds what the runs need and is not in the cache.
    ///
    /// # Panics
    /// If a guest cannot be built.
    pub(crate) fn prepare(arms: &[Arm]) -> Images {
        let mut images = Images::default();
        let boots_linux = |arm: &Arm| matches!(arm.workload, Workload::Idle | Workload::TwoImages);
        if arms.iter().any(boots_linux) {
            let guest = linux::guest();
            images.linux = Some(guest.vmlinux.clone());
            images.initramfs = Some(guest.initramfs.clone());
        }
        let boots_debian =
            |arm: &Arm| matches!(arm.workload, Workload::Agents | Workload::TwoImages);
        if arms.iter().any(boots_debian) {
            let guest = debian::guest();
            images.debian = vec![guest.vmlinux.clone(), guest.rootfs.clone()];
            images.digests = debian::expected_digests(CHECKED_SEED, CHECKED_ROUNDS);
        }
        images
    }

    /// Reads all files that a run's server reads. A page of the page cache is charged to the group
    /// that read it first, so without this the first run of a workload would pay for the others.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub(crate) fn read_into_page_cache(&self) -> io::Result<()> {
        let server = binary::samepage();
        let linux = self.linux.iter().chain(&self.initramfs);
        for file in linux
            .chain(&self.debian)
            .map(PathBuf::as_path)
            .chain([server])
        {
            io::copy(&mut File::open(file)?, &mut io::sink())?;
        }
        Ok(())
    }

    /// What the guest must print in its first rounds; empty where nobody knows.
    pub(crate) fn digests(&self, kind: Kind) -> Vec<String> {
        match kind {
            Kind::Agent(CHECKED_SEED) => self.digests.clone(),
            _ => Vec::new(),
        }
    }

    /// The body of `PUT /vms/{id}`.
    pub(crate) fn config(&self, kind: Kind, arm: Arm) -> Value {
        let mut config = match kind {
            Kind::Idle => {
                let mut config = VmConfig::new(self.linux.clone().unwrap_or_default());
                config.boot_source.initrd_path.clone_from(&self.initramfs);
                config.boot_source.boot_args = Some("console=ttyS0 quiet".to_owned());
                config.machine_config.mem_size_mib = LINUX_MEM_MIB;
                config
            }
            Kind::Agent(seed) => {
                let agent = Agent {
                    seed,
                    rounds: 0,
                    sleep_ms: AGENT_SLEEP_MS,
                };
                agent.config()
            }
            Kind::Pageload { work, mem_mib } => {
                let mut config = VmConfig::new(BUILTIN_PAGELOAD);
                config.boot_source.boot_args = Some(work.to_string());
                config.machine_config.mem_size_mib = mem_mib;
                config
            }
        };
        config.machine_config.vcpu_count = 1;
        // Guest memory has huge pages if its owner asks for them, whatever the host's setting is.
        if arm.thp == Thp::Always {
            config.machine_config.huge_pages = HugePages::Transparent;
        }
        let mut config = json!(config);
        // As a client writes it: the name of the other engine is no field of ours to be typed.
        config["samepage"] = json!({ "merge_domain": DOMAIN, "merge": merge(arm.engine) });
        config
    }
}

impl Kind {
    /// The begin of the guest's id.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Idle => "idle",
            Kind::Agent(_) => "agent",
            Kind::Pageload { .. } => "pageload",
        }
    }

    /// Whether it tells on its console how far it is. The others tell the monitor.
    pub(crate) fn talks(self) -> bool {
        !matches!(self, Kind::Pageload { .. })
    }
}

/// The value of `merge` in a guest's `samepage` settings.
fn merge(engine: Engine) -> Value {
    match engine {
        Engine::Off => json!(false),
        Engine::KsmDefaults | Engine::KsmFast | Engine::KsmAdvisor => json!("ksm"),
        Engine::Samepage => json!(true),
    }
}

/// What a line on the console tells, if it is one of the guest's own.
pub(crate) fn read_line(kind: Kind, line: &str) -> Option<Said> {
    let line = line.trim_end_matches('\r');
    if kind == Kind::Idle {
        // The first process of the Debian guest is the same: there it is not the last word.
        return (line == LINUX_READY).then_some(Said::Ready);
    }
    let words = line.strip_prefix(AGENT_MARK)?;
    let mut words = words.split_whitespace();
    match (words.next()?, words.next(), words.next()) {
        ("ready", None, None) => Some(Said::Ready),
        ("round", Some(number), Some(digest)) => Some(Said::Round {
            number: number.parse().ok()?,
            digest: digest.to_owned(),
        }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::density::model::Fleet;

    #[test]
    fn consoles_are_read_by_lines() {
        let agent = Kind::Agent(1);
        let idle = read_line(Kind::Idle, "samepage-init: ready\r");
        assert_eq!(idle, Some(Said::Ready));
        assert_eq!(read_line(agent, "samepage-init: ready"), None);
        assert_eq!(read_line(agent, "samepage-agent: ready"), Some(Said::Ready));
        let round = Said::Round {
            number: 3,
            digest: "ab12".to_owned(),
        };
        assert_eq!(
            read_line(agent, "samepage-agent: round 3 ab12 990"),
            Some(round)
        );
        for other in ["", "ready", "samepage-agent: round x ab 1", "~ # "] {
            assert_eq!(read_line(agent, other), None, "{other}");
        }
    }

    #[test]
    fn configurations_differ_by_who_merges_alone() {
        let kind = Kind::Pageload {
            work: Pageload::quiet(3),
            mem_mib: 32,
        };
        let images = Images::default();
        let config = |engine| images.config(kind, arm(engine, Thp::Madvise));
        let mut off = config(Engine::Off);
        assert_eq!(off["samepage"]["merge"], json!(false));
        let ours = config(Engine::Samepage);
        assert_eq!(ours["machine-config"]["mem_size_mib"], 32);
        assert_eq!(ours["boot-source"]["boot_args"], kind_args(kind));
        off["samepage"]["merge"] = json!(true);
        assert_eq!(off, ours);
        let ksm = config(Engine::KsmAdvisor);
        assert_eq!(ksm["samepage"]["merge"], "ksm");
    }

    #[test]
    fn guests_ask_for_huge_pages_where_the_host_is_to_give_them_to_all() {
        let huge_pages = |thp| {
            let config = Images::default().config(Kind::Idle, arm(Engine::Off, thp));
            config["machine-config"]["huge_pages"].clone()
        };
        assert_eq!(huge_pages(Thp::Madvise), "None");
        assert_eq!(huge_pages(Thp::Always), "Transparent");
    }

    fn arm(engine: Engine, thp: Thp) -> Arm {
        Arm {
            workload: Workload::Idle,
            engine,
            thp,
            fleet: Fleet::Vms(1),
            memory_limit_bytes: 1 << 30,
        }
    }

    fn kind_args(kind: Kind) -> String {
        match kind {
            Kind::Pageload { work, .. } => work.to_string(),
            _ => String::new(),
        }
    }
}
