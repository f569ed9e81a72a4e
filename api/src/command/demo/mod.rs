//! `samepage demo`: same-page merging at work, measured and verified.
//!
//! The demo is a client like any other: a server of its own (a child process), VMs over the REST
//! API. Merging is stopped while the guests fill their memory, so that the memory before and
//! after are the same guests with the same contents.

mod guest;
mod linux;
mod pageload;
mod progress;
mod pss;
mod server;
mod summary;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use dedup::Run;
use tokio::signal::unix::{SignalKind, signal};

use crate::cli::DemoArgs;
use crate::client::Client;
use crate::command::{CommandError, print};
use crate::model::{Domain, VmDescription};
use crate::note::note;
use crate::request::{ActionType, MergePatch};
use guest::Guest;
use progress::Progress;
use server::DemoServer;
use summary::Summary;

/// The merge domain of all the demo's VMs.
const DOMAIN: &str = "demo";
/// Time between two looks at the guests.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);
/// Sharing has settled when it has not grown for this long, whole scans of memory included. What is
/// equal at another place is shared once it was calm for 10 s.
const CALM_TIME: Duration = Duration::from_secs(12);
/// Whole scans that must go by without growth. The first of a page's visits only takes note.
const CALM_SCANS: u64 = 2;
/// Passes that every guest verifies after its pages were merged.
const PASSES_AFTER: u64 = 2;

/// Runs the demo.
///
/// # Errors
/// If something keeps it from its end: no KVM, a guest that ends, a phase that takes too long.
pub async fn demo(args: &DemoArgs) -> Result<ExitCode, CommandError> {
    let mut interrupt = signal(SignalKind::interrupt()).map_err(CommandError::os("sigint"))?;
    let mut terminate = signal(SignalKind::terminate()).map_err(CommandError::os("sigterm"))?;
    let started = Instant::now();
    let guest = Guest::from_args(args)?;
    let mut server = DemoServer::start(DOMAIN).await?;
    let mut progress = Progress::new(args.json);
    let shown = tokio::select! {
        shown = show(&guest, &server, &mut progress) => Some(shown),
        _ = interrupt.recv() => None,
        _ = terminate.recv() => None,
    };
    progress.end_line();
    server.stop().await;
    let Some(summary) = shown else {
        note(format_args!("demo interrupted"));
        return Ok(ExitCode::from(130));
    };
    let summary = Summary {
        elapsed_ms: u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
        ..summary?
    };
    print(&if args.json {
        summary.to_json()?
    } else {
        summary.to_text()
    })?;
    match summary.shortcoming() {
        None => Ok(ExitCode::SUCCESS),
        Some(shortcoming) => Err(CommandError::Other(shortcoming)),
    }
}

/// All phases; the VMs are gone afterwards.
async fn show(
    guest: &Guest,
    server: &DemoServer,
    progress: &mut Progress,
) -> Result<Summary, CommandError> {
    let stage = Stage {
        guest,
        client: server.client(),
        server,
        phase_time: guest.phase_time(),
    };
    stage.set_run(Run::Stop).await?;
    stage.launch(progress).await?;
    stage.wait_filled(progress).await?;
    let memory_before_bytes = server.pss_bytes()?;
    stage.set_run(Run::Merge).await?;
    stage.wait_settled(memory_before_bytes, progress).await?;
    stage.wait_verified(progress).await?;

    let domain = stage.client.describe_domain(DOMAIN).await?;
    let memory_after_bytes = server.pss_bytes()?;
    progress.note("stopping");
    let vms = stage.stop_all().await?;
    let accounts = guest.accounts(stage.client, &vms).await?;
    Ok(Summary {
        vms: guest.vms(),
        guest: guest.name(),
        memory_before_bytes,
        memory_after_bytes,
        pages_shared: domain.stats.pages_shared,
        pages_sharing: domain.stats.pages_sharing,
        pages_zero: domain.stats.pages_zero,
        duplicate_pages: guest.duplicate_pages()?,
        saved_bytes: domain.stats.saved_bytes,
        verify_errors: accounts.iter().map(|account| account.errors).sum(),
        verify_passes: accounts.iter().filter_map(|account| account.passes).sum(),
        elapsed_ms: 0,
    })
}

/// The demo's server and guests.
struct Stage<'a> {
    guest: &'a Guest,
    client: &'a Client,
    server: &'a DemoServer,
    phase_time: Duration,
}

impl Stage<'_> {
    async fn set_run(&self, run: Run) -> Result<(), CommandError> {
        let patch = MergePatch {
            run: Some(run),
            ..MergePatch::default()
        };
        self.client.patch_domain(DOMAIN, &patch).await?;
        Ok(())
    }

    async fn launch(&self, progress: &mut Progress) -> Result<(), CommandError> {
        for number in 0..self.guest.vms() {
            progress.note(&format!(
                "launching: vm {} of {}",
                number + 1,
                self.guest.vms()
            ));
            let (id, config) = (self.guest.id(number), self.guest.config(number));
            self.client.create_vm(&id, &config).await?;
            self.client.act(&id, ActionType::InstanceStart).await?;
        }
        Ok(())
    }

    /// Waits until every guest has made all the contents it is going to make.
    async fn wait_filled(&self, progress: &mut Progress) -> Result<(), CommandError> {
        let deadline = Instant::now() + self.phase_time;
        loop {
            let vms = self.healthy_vms().await?;
            let accounts = self.guest.accounts(self.client, &vms).await?;
            let filled = accounts
                .iter()
                .filter(|account| account.passes.is_some())
                .count();
            progress.filling(filled, vms.len(), self.server.pss_bytes()?);
            if filled == vms.len() {
                return Ok(());
            }
            self.before(deadline, "the guests to fill their memory")
                .await?;
        }
    }

    /// Waits until all duplicates are shared, or sharing does not grow any more.
    async fn wait_settled(
        &self,
        memory_before_bytes: u64,
        progress: &mut Progress,
    ) -> Result<(), CommandError> {
        let duplicate_pages = self.guest.duplicate_pages()?;
        let deadline = Instant::now() + self.phase_time;
        let mut most_pages = 0;
        let mut grown_at = Instant::now();
        let mut grown_scan = self.client.describe_domain(DOMAIN).await?.stats.full_scans;
        loop {
            self.healthy_vms().await?;
            let domain = self.client.describe_domain(DOMAIN).await?;
            let memory_bytes = self.server.pss_bytes()?;
            progress.merging(
                &domain.stats,
                memory_before_bytes,
                memory_bytes,
                duplicate_pages,
            );
            let pages = given_back(&domain);
            if pages > most_pages {
                (most_pages, grown_at) = (pages, Instant::now());
                grown_scan = domain.stats.full_scans;
            }
            let is_calm = grown_at.elapsed() >= CALM_TIME
                && domain.stats.full_scans >= grown_scan + CALM_SCANS;
            // The guests' images are alike too: a few more pages than the workload's are given
            // back. So the last of the workload's may still be missing when the count is reached.
            if is_calm || Instant::now() >= deadline {
                return Ok(());
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }

    /// Waits until every guest has verified all its pages again, merged as they are now.
    async fn wait_verified(&self, progress: &mut Progress) -> Result<(), CommandError> {
        let deadline = Instant::now() + self.phase_time;
        let before = self.passes().await?;
        loop {
            let now = self.passes().await?;
            // A pass that was under way does not count.
            let is_done = |(now, before): &(&u64, &u64)| **now > **before + PASSES_AFTER;
            let done = now.iter().zip(&before).filter(is_done).count();
            progress.note(&format!("verifying: {done} of {} vms done", before.len()));
            if done == before.len() {
                return Ok(());
            }
            self.before(deadline, "the guests to verify their memory")
                .await?;
        }
    }

    async fn passes(&self) -> Result<Vec<u64>, CommandError> {
        let accounts = self
            .guest
            .accounts(self.client, &self.healthy_vms().await?)
            .await?;
        Ok(accounts
            .iter()
            .map(|account| account.passes.unwrap_or(0))
            .collect())
    }

    /// All VMs, none of which may have ended.
    async fn healthy_vms(&self) -> Result<Vec<VmDescription>, CommandError> {
        let vms = self.client.list_vms().await?;
        let ended = vms
            .iter()
            .find_map(|vm| Some((vm, vm.end_message.as_ref()?)));
        match ended {
            None => Ok(vms),
            Some((vm, why)) => Err(CommandError::Other(format!("vm {} ended: {why}", vm.id))),
        }
    }

    async fn stop_all(&self) -> Result<Vec<VmDescription>, CommandError> {
        for vm in self.client.list_vms().await? {
            self.client.act(&vm.id, ActionType::InstanceStop).await?;
        }
        Ok(self.client.list_vms().await?)
    }

    /// Sleeps until the next look.
    async fn before(&self, deadline: Instant, awaited: &str) -> Result<(), CommandError> {
        if Instant::now() >= deadline {
            let time = self.phase_time.as_secs();
            return Err(CommandError::Other(format!(
                "waited {time} s for {awaited}"
            )));
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
        Ok(())
    }
}

/// Guest pages that take no memory any more.
fn given_back(domain: &Domain) -> u64 {
    domain.stats.pages_sharing + domain.stats.pages_zero
}
