//! What runs in the demo's VMs, and how to tell how far it is.

use pageload_workload::{Expected, Workload, layout};
use vmm::VmConfig;
use vmm::config::BUILTIN_PAGELOAD;

use super::DOMAIN;
use crate::cli::{DemoArgs, DemoGuest, VmArgs};
use crate::client::Client;
use crate::command::CommandError;
use crate::model::{Report, VmDescription};
use crate::vm_args;

/// `phase` of a pageload guest's report.
const PHASE_VERIFYING: u64 = 2;
const PHASE_FAILED: u64 = 4;

/// The demo's guests.
#[derive(Debug)]
pub(super) struct Guest {
    kind: DemoGuest,
    vms: u16,
    mem_mib: u32,
    /// Of VM 0; the others' differ in the workload's seed.
    config: VmConfig,
}

/// What the guests found, over all VMs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Verified {
    pub(super) errors: u64,
    pub(super) passes: u64,
}

impl Guest {
    pub(super) fn from_args(args: &DemoArgs) -> Result<Guest, CommandError> {
        let mem_mib = args.mem_mib.unwrap_or(match args.guest {
            DemoGuest::Pageload => 64,
            DemoGuest::Linux => 128,
        });
        let (kernel, initrd) = match args.guest {
            DemoGuest::Pageload => (BUILTIN_PAGELOAD.into(), None),
            DemoGuest::Linux => {
                let given = |path: &Option<std::path::PathBuf>, flag: &str| {
                    path.clone().ok_or_else(|| {
                        CommandError::Other(format!("--guest linux: needs {flag} FILE"))
                    })
                };
                (
                    given(&args.kernel, "--kernel")?,
                    Some(given(&args.initrd, "--initrd")?),
                )
            }
        };
        let config = vm_args::to_config(&VmArgs {
            kernel: Some(kernel),
            initrd,
            mem_mib: Some(u64::from(mem_mib)),
            merge_domain: DOMAIN.parse().ok(),
            ..VmArgs::default()
        })?;
        Ok(Guest {
            kind: args.guest,
            vms: args.vms,
            mem_mib,
            config,
        })
    }

    pub(super) fn name(&self) -> &'static str {
        self.kind.name()
    }

    pub(super) fn vms(&self) -> u16 {
        self.vms
    }

    pub(super) fn total_mem_mib(&self) -> u64 {
        u64::from(self.vms) * u64::from(self.mem_mib)
    }

    pub(super) fn id(&self, number: u16) -> String {
        format!("{}-{number:03}", self.name())
    }

    pub(super) fn config(&self, number: u16) -> VmConfig {
        let mut config = self.config.clone();
        if self.kind == DemoGuest::Pageload {
            config.boot_source.boot_args = Some(workload(number).to_string());
        }
        config
    }

    /// How many guests have all their contents in memory.
    pub(super) async fn filled(
        &self,
        client: &Client,
        vms: &[VmDescription],
    ) -> Result<u16, CommandError> {
        let mut filled = 0;
        for vm in vms {
            if self.passes_of(client, vm).await?.is_some() {
                filled += 1;
            }
        }
        Ok(filled)
    }

    /// Passes that each guest has verified so far.
    pub(super) async fn passes(
        &self,
        client: &Client,
        vms: &[VmDescription],
    ) -> Result<Vec<u64>, CommandError> {
        let mut passes = Vec::with_capacity(vms.len());
        for vm in vms {
            passes.push(self.passes_of(client, vm).await?.unwrap_or(0));
        }
        Ok(passes)
    }

    /// Errors and passes of all guests, also after their end.
    pub(super) async fn verified(
        &self,
        client: &Client,
        vms: &[VmDescription],
    ) -> Result<Verified, CommandError> {
        let mut verified = Verified::default();
        for vm in vms {
            verified.passes += self.passes_of(client, vm).await?.unwrap_or(0);
            verified.errors += vm.report.as_ref().map_or(0, |report| report.verify_errors);
        }
        Ok(verified)
    }

    /// Passes of one guest; `None` while it is still filling its memory.
    async fn passes_of(
        &self,
        _client: &Client,
        vm: &VmDescription,
    ) -> Result<Option<u64>, CommandError> {
        let report = vm.report.clone().unwrap_or_default();
        if report.phase == PHASE_FAILED && report.verify_errors == 0 {
            return Err(CommandError::Other(format!(
                "vm {}: the guest failed",
                vm.id
            )));
        }
        let Report {
            phase,
            verify_passes,
            ..
        } = report;
        Ok((phase >= PHASE_VERIFYING).then_some(verify_passes))
    }

    /// Pages that could be given back: copies of a content beyond its first, and pages of zeros.
    /// Counted by the workload's own oracle; `None` where nobody knows.
    pub(super) fn duplicate_pages(&self) -> Result<Option<u64>, CommandError> {
        if self.kind == DemoGuest::Linux {
            return Ok(None);
        }
        let pages = layout::page_count(u64::from(self.mem_mib) << 20);
        let vms: Vec<_> = (0..self.vms)
            .map(|number| (workload(number), pages))
            .collect();
        let Expected {
            pages_sharing,
            pages_zero,
            ..
        } = pageload_workload::expect(&vms)
            .map_err(|error| CommandError::Other(format!("workload: {error}")))?;
        Ok(Some(pages_sharing + pages_zero))
    }
}

/// What VM `number` does: the fleet's usual mix, with pages of its own.
fn workload(number: u16) -> Workload {
    Workload {
        seed: u64::from(number) + 1,
        ..Workload::default()
    }
}
