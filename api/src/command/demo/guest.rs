//! What runs in the demo's VMs, and how to tell how far it is.

use std::time::Duration;

use vmm::VmConfig;

use super::{DOMAIN, linux, pageload};
use crate::cli::{DemoArgs, DemoGuest};
use crate::client::Client;
use crate::command::CommandError;
use crate::model::VmDescription;
use crate::vm_args::{self, VmArgs};

/// The demo's guests.
#[derive(Debug)]
pub(super) struct Guest {
    kind: DemoGuest,
    vms: u16,
    mem_mib: u32,
    /// Of every VM, but for its boot arguments.
    config: VmConfig,
}

/// What a guest says of itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Account {
    /// Passes over its memory that it has verified; `None` while it still fills it.
    pub(super) passes: Option<u64>,
    /// Wrong contents it has found.
    pub(super) errors: u64,
}

impl Guest {
    pub(super) fn from_args(args: &DemoArgs) -> Result<Guest, CommandError> {
        let (kernel, initrd, default_mem_mib) = match args.guest {
            DemoGuest::Pageload => (vmm::config::BUILTIN_PAGELOAD.into(), None, 64),
            DemoGuest::Linux => {
                let kernel = linux::kernel(args.kernel.as_deref())?;
                (kernel, Some(linux::initrd(args.initrd.as_deref())?), 128)
            }
        };
        let mem_mib = args.mem_mib.unwrap_or(default_mem_mib);
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

    /// Bound of each phase of the demo: far more than it takes, so that what is stuck ends.
    pub(super) fn phase_time(&self) -> Duration {
        let vms = u64::from(self.vms);
        let secs = match self.kind {
            DemoGuest::Pageload => 60 + vms * u64::from(self.mem_mib) / 64,
            // Where KVM emulates the guest's kernel mode, two of them keep a core busy for a minute.
            DemoGuest::Linux => 120 + vms * 60,
        };
        Duration::from_secs(secs)
    }

    pub(super) fn id(&self, number: u16) -> String {
        format!("{}-{number:03}", self.name())
    }

    pub(super) fn config(&self, number: u16) -> VmConfig {
        let mut config = self.config.clone();
        config.boot_source.boot_args = Some(match self.kind {
            DemoGuest::Pageload => pageload::workload(number).to_string(),
            DemoGuest::Linux => linux::boot_args(),
        });
        config
    }

    /// What each guest says of itself, also after its end.
    pub(super) async fn accounts(
        &self,
        client: &Client,
        vms: &[VmDescription],
    ) -> Result<Vec<Account>, CommandError> {
        let mut accounts = Vec::with_capacity(vms.len());
        for vm in vms {
            accounts.push(match self.kind {
                DemoGuest::Pageload => pageload::account(vm)?,
                DemoGuest::Linux => {
                    let console = client.console_history(&vm.id).await?;
                    linux::account(&String::from_utf8_lossy(&console))
                }
            });
        }
        Ok(accounts)
    }

    /// Pages that could be given back: copies of a content beyond its first, and pages of zeros.
    /// `None` where nobody knows: what Linux has in its memory no oracle can tell.
    pub(super) fn duplicate_pages(&self) -> Result<Option<u64>, CommandError> {
        match self.kind {
            DemoGuest::Pageload => pageload::duplicate_pages(self.vms, self.mem_mib).map(Some),
            DemoGuest::Linux => Ok(None),
        }
    }
}
